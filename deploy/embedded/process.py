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
    """One part of a stack: start, stop, kill, pause and restart it as often as you like.

    `on_loss` is called with this part, from a thread of its own, when the process ends although nobody
    asked it to.
    """

    #: Seconds, > 0, that the part may take until it is ready.
    start_timeout_s = 10.0
    #: Seconds, > 0, between SIGTERM and SIGKILL in `stop`.
    grace_s = 10.0
    #: Seconds, > 0, between two looks at whether the part is ready. Its death is noticed at once.
    look_every_s = 0.02

    def __init__(self, home: Home, name: str) -> None:
        self.home = home
        self.name = name
        self.log = home.path / "logs" / f"{name}.log"
        self.on_loss: Callable[[Process], None] | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        self._ended.set()
        self._asked_to_end = False
        #: Where in the log the present run begins, in bytes.
        self._log_start = 0

    @abstractmethod
    def _argv(self) -> list[str]:
        """The program and its arguments. Secrets do not belong here: other users can see it."""

    @abstractmethod
    def _environment(self) -> dict[str, str]:
        """The program's whole environment."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether the part serves its clients. Called again and again while it starts."""

    @property
    def pid(self) -> int:
        """Process id of the present or the last run. Raises `StackError` when there was none."""
        if self._popen is None:
            raise StackError(f"{self.name} was never started.")
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Whether the process is there; a paused one is."""
        return not self._ended.is_set()

    def start(self) -> None:
        """Start and return when the part is ready. Raises `StackError` when it is not in time, or dies."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start without waiting, so that several parts can start at once."""
        if self.running:
            raise StackError(f"{self.name} is running already.")
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
        """Return when the part is ready. Raises `StackError` when it is not in time, or dies."""
        deadline = time.monotonic() + self.start_timeout_s
        while not self._is_ready():
            if self._ended.wait(self.look_every_s):
                raise self.failure(f"{self.name} ended with {self._outcome()} while starting.")
            if time.monotonic() > deadline:
                self.kill()
                raise self.failure(f"{self.name} was not ready after {self.start_timeout_s:.0f} s.")

    def stop(self, grace_s: float | None = None) -> None:
        """End gracefully; after `grace_s` seconds, or the part's own default, by force."""
        if not self._asked_to_end:  # once only: to some programs a second SIGTERM means to hurry
            self.ask_to_end()
        if not self._ended.wait(self.grace_s if grace_s is None else grace_s):
            self.kill()

    def ask_to_end(self) -> None:
        """Send SIGTERM, without waiting. A paused process goes on first, or it would not hear it."""
        self._asked_to_end = True
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End by SIGKILL, as a crash or the kernel would, and return when the process is gone."""
        self.kill_now()
        self._ended.wait()

    def kill_now(self) -> None:
        """Send SIGKILL, without waiting."""
        self._asked_to_end = True
        self._signal(signal.SIGKILL)

    def pause(self) -> None:
        """Freeze the process (SIGSTOP): its connections stay open, and nobody answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
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
        where = f", {self.log}" if self.home.kept else ""  # else it is gone when this is read
        return StackError(f"{sentence} The end of its log{where}:\n{tail}")

    def lost(self) -> StackError:
        """The error for a part that ended although nobody asked it to."""
        return self.failure(f"{self.name} ended with {self._outcome()}.")

    def _outcome(self) -> str:
        code = self._popen.returncode if self._popen is not None else None
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"

    def _signal(self, number: signal.Signals) -> None:
        """Signal the whole process group: what a part has started is part of it."""
        if self.running and self._popen is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, number)

    def _watch(self, popen: subprocess.Popen[bytes]) -> None:
        popen.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(popen.pid, signal.SIGKILL)  # its children, if it left any
        self.home.order(f"forget {popen.pid}")
        self._ended.set()
        if self.on_loss is not None and not self._asked_to_end:
            self.on_loss(self)
