"""The folder of an embedded stack, and the guard that ends all of its processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
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
    """Raised when a part cannot be started or ended by itself; names it and shows the end of its log."""


class Home:
    """A stack's folder. No process that was started with `spawn` outlives it.

    A guard process (`guard.py`) sees to that. It reads from a pipe, and ends the processes when this side
    closes the pipe or is killed. `PR_SET_PDEATHSIG` is no alternative: it exists on Linux only, and fires
    when the *thread* that started the child ends.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Use `path`, which stays and belongs to one stack at a time. None: a new folder, removed by `close`.

        Raises `StackError` when another stack is running in `path`.
        """
        #: Whether the folder stays after `close`.
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
            # The guard shares the lock, so that the folder stays locked until its processes have ended.
            pass_fds=[self._lock] if path is not None else [],
            start_new_session=True,
            cwd="/",
        )
        assert self._guard.stdin is not None  # noqa: S101 - for mypy: PIPE was asked for
        self._orders = self._guard.stdin
        if path is None:
            self.path = Path(tempfile.gettempdir()) / f"smallcat-{secrets.token_hex(6)}"
            # Before the folder is made, so that it is removed even if this process is killed in between.
            self.tell_guard(f"remove {self.path}")
            self.path.mkdir(mode=0o700)
        (self.path / "logs").mkdir(exist_ok=True)

    def kept_values(self, part: str, new: Mapping[str, str]) -> dict[str, str]:
        """What `part` keeps between runs of a kept folder, such as its password: `new` at the first one.

        The file is readable by its owner alone. One that is damaged counts as none.
        """
        file = self.path / f"{part}.json"
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            values = {name: str(known.get(name, value)) for name, value in new.items()}
        except (OSError, ValueError, AttributeError):
            values = dict(new)
        if self.kept:
            write_privately(file, json.dumps(values))
        return values

    def keep(self, part: str, values: Mapping[str, str]) -> None:
        """Replace what `part` keeps. Does nothing in a temporary folder."""
        if self.kept:
            write_privately(self.path / f"{part}.json", json.dumps(dict(values)))

    def tell_guard(self, line: str) -> None:
        """Send the guard an order (see `guard.py`). Does nothing after `close`."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            os.write(self._orders.fileno(), f"{line}\n".encode())

    def spawn(
        self, argv: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """Start `argv` in a process group of its own, with its output appended to `log`.

        The new process gives the guard its number before it becomes `argv`: there is no moment at which the
        guard does not know it.
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
        """End the processes that still run, remove a temporary folder, and return when that is done."""
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


def write_privately(path: Path, text: str) -> None:
    """Write a file that its owner alone can read (mode 0600), whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(
        os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)
    draft.replace(path)


def _locked(folder: Path) -> int:
    """A file descriptor that holds the lock of `folder`. Raises `StackError` when another stack holds it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StackError(f"Another stack is running in {folder}. Stop it, or name another folder.") from None
    return lock
