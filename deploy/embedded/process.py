"""One part of an embedded stack: a process that can be started, stopped, killed, paused and watched."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from deploy.embedded.home import Home, StackError

#: Lines of a log that are shown when a part fails.
TAIL_LINES = 15


class Process(ABC):
    """One part of a stack, which can be started, stopped, killed, paused and restarted any number of times.

    `on_loss` is called with this part, from a thread of its own, when the process ends although neither
    `stop` nor `kill` was called.
    """

    #: Seconds, > 0, from the start until the part must be ready.
    start_timeout_s = 10.0
    #: Seconds, > 0, between SIGTERM and SIGKILL in `stop`.
    grace_s = 10.0
    #: Seconds, > 0, between two checks of whether the part is ready. Its end is noticed at once.
    check_every_s = 0.02

    def __init__(self, home: Home, name: str) -> None:
        self.home = home
        self.name = name
        self.log = home.path / "logs" / f"{name}.log"
        self.on_loss: Callable[[Process], None] | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        self._ended.set()
        self._asked_to_end = False
        #: Bytes of the log before the present run.
        self._log_start = 0

    @abstractmethod
    def _argv(self) -> list[str]:
        """The program and its arguments, without secrets: all users of the machine can read them."""

    @abstractmethod
    def _environment(self) -> dict[str, str]:
        """The program's whole environment."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether the part answers its clients. Called every `check_every_s` while it starts."""

    @property
    def pid(self) -> int:
        """Process id of the present or the last run. Raises `StackError` before the first one."""
        if self._popen is None:
            raise StackError(f"{self.name} has no process: start it first.")
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Whether the process exists; a paused one does."""
        return not self._ended.is_set()

    def start(self) -> None:
        """Start, and return when the part is ready. Raises `StackError` when it ends or takes too long."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start without waiting, so that several parts can start at once. Raises `StackError`."""
        if self.running:
            raise StackError(f"{self.name} is running already: stop it first.")
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self._asked_to_end = False
        self._ended.clear()
        try:
            self._popen = self.home.spawn(self._argv(), self._environment(), self.log)
        except BaseException:
            self._ended.set()
            raise
        threading.Thread(
            target=self._watch, args=[self._popen], name=f"watch {self.name}", daemon=True
        ).start()

    def wait_ready(self) -> None:
        """Return when the part is ready. Raises `StackError` when it ends or takes too long."""
        deadline = time.monotonic() + self.start_timeout_s
        while not self._is_ready():
            if self._ended.wait(self.check_every_s):
                raise self.failure(f"{self.name} ended with {self._outcome()} while starting.")
            if time.monotonic() > deadline:
                self.kill()
                raise self.failure(f"{self.name} was not ready after {self.start_timeout_s:.0f} s.")

    def stop(self, grace_s: float | None = None) -> None:
        """End gracefully; after `grace_s` seconds, or the part's own default, by force."""
        if not self._asked_to_end:  # once only: some programs end at once at a second SIGTERM
            self.ask_to_end()
        if not self._ended.wait(self.grace_s if grace_s is None else grace_s):
            self.kill()

    def ask_to_end(self) -> None:
        """Send SIGTERM, without waiting. A paused process is resumed, so that it can act on the signal."""
        self._asked_to_end = True
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End by SIGKILL, as at a crash or out of memory, and return when the process has ended."""
        self.kill_now()
        self._ended.wait()

    def kill_now(self) -> None:
        """Send SIGKILL, without waiting."""
        self._asked_to_end = True
        self._signal(signal.SIGKILL)

    def pause(self) -> None:
        """Freeze the process (SIGSTOP): its connections stay open and get no answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue a paused process (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        """Stop, then start on the same port with the same data."""
        self.stop()
        self.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Return True as soon as the process has ended, False after `timeout_s` seconds."""
        return self._ended.wait(timeout_s)

    def output(self) -> str:
        """What the present or the last run has written to its log."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def failure(self, sentence: str) -> StackError:
        """An error that says `sentence` and shows the end of the log."""
        lines = self.output().strip().splitlines()[-TAIL_LINES:]
        tail = "\n".join(f"    {line}" for line in lines) or "    (nothing)"
        where = f", {self.log}" if self.home.kept else ""  # a temporary log is removed with the stack
        return StackError(f"{sentence} The end of its log{where}:\n{tail}")

    def loss(self) -> StackError:
        """The error for a part that ended by itself."""
        return self.failure(f"{self.name} ended with {self._outcome()}.")

    def _outcome(self) -> str:
        code = self._popen.returncode if self._popen is not None else None
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"

    def _signal(self, number: signal.Signals) -> None:
        """Signal the whole process group: the part and the processes that it has started."""
        if self.running and self._popen is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, number)

    def _watch(self, popen: subprocess.Popen[bytes]) -> None:
        popen.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(popen.pid, signal.SIGKILL)  # processes that it started and left
        self.home.tell_guard(f"forget {popen.pid}")
        self._ended.set()
        if self.on_loss is not None and not self._asked_to_end:
            self.on_loss(self)
