"""Where an embedded stack lives: a folder, and the promise that nothing outlives it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

#: The only address that a stack listens on.
HOST = "127.0.0.1"


class StackError(Exception):
    """Raised when a part cannot be started or was lost; the text says which, and shows the end of its log."""


class Home:
    """A folder, and the promise that no process started in it outlives it.

    A guard process (`deploy/embedded/guard.py`) keeps the promise. It holds the other end of a pipe, and
    acts when this side closes the pipe, or is killed. `PR_SET_PDEATHSIG` was the alternative, but it exists
    on Linux only, and fires when the *thread* that started the child ends.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Take `path`, which is kept and has one home at a time; None: a new folder, removed in the end.

        Raises `StackError` when another stack is running in `path`.
        """
        #: Whether the folder stays when the home ends.
        self.kept = path is not None
        self._lock = -1
        if path is not None:
            self.path = path.resolve()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path)
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # The guard shares the lock: a folder is free again only after its processes are gone.
            pass_fds=[self._lock] if path is not None else [],
            start_new_session=True,
            cwd="/",
        )
        assert self._guard.stdin is not None  # noqa: S101 - for mypy: PIPE was asked for
        self._orders = self._guard.stdin
        if path is None:
            self.path = Path(tempfile.gettempdir()) / f"smallcat-{secrets.token_hex(6)}"
            self.order(f"remove {self.path}")  # before it is there, so that it cannot be left behind
            self.path.mkdir(mode=0o700)
        (self.path / "logs").mkdir(exist_ok=True)

    def order(self, line: str) -> None:
        """Tell the guard. Does nothing when the guard is gone: then the home is closed."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            os.write(self._orders.fileno(), f"{line}\n".encode())

    def spawn(
        self, argv: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """Start `argv` in a process group of its own, with its output appended to `log`.

        The new process announces itself to the guard before it becomes `argv`, so there is no moment at
        which it could be left behind.
        """
        with log.open("ab") as output:
            return subprocess.Popen(
                ["/bin/sh", "-c", 'echo "group $$" >&0 && exec "$@" </dev/null', "sh", *argv],
                stdin=self._orders,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )

    def close(self) -> None:
        """End what still runs, remove the folder if it is a temporary one, and wait until that is done."""
        with contextlib.suppress(BrokenPipeError):
            self._orders.close()
        self._guard.wait()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _locked(folder: Path) -> int:
    """A file descriptor that holds the lock of `folder`. Raises `StackError` when another stack has it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StackError(f"Another stack is running in {folder}. Stop it, or use another folder.") from None
    return lock
