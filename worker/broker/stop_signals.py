"""The signals that end a worker, each in order: no job is lost, and nobody reads a traceback.

    SIGTERM, SIGINT (Ctrl-C), SIGHUP (its terminal is closed)    it stops, and finishes jobs for a while
    SIGQUIT, or a second one of any                              it stops, and gives all jobs back at once

Celery's own answers are others: it starts anew at SIGHUP, and leaves the threads that run jobs at the rest.
"""

# mypy: disallow-subclassing-any=False
# Celery's steps are not typed.

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, NoReturn

from celery import signals
from celery.bootsteps import StartStopStep
from celery.worker import state

from worker.contract.plain_log import ended

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

_hurry: Callable[[], None] = lambda: None  # noqa: E731 -- until `set_hurry` is called
#: Whether SIGHUP is to be ignored, as of a process that nohup has started.
_ignores_hangup = False


def set_hurry(hurry: Callable[[], None]) -> None:
    """Say how all jobs are given back at once. Called in a thread of its own, perhaps several times."""
    global _hurry
    _hurry = hurry


def until_ready() -> None:
    """Until the worker's steps start, let each of the signals end the process at once, in one line."""
    global _ignores_hangup
    _ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    _install(_leave)


class StopSignals(StartStopStep):
    """Takes the signals over from Celery, which has installed its own when the worker's steps start."""

    def start(self, worker: Any) -> None:
        """Install the handlers; they stay until the process ends."""

        def stop(number: int, _: FrameType | None) -> None:
            is_first = state.should_stop is None or state.should_stop is False
            if number == signal.SIGQUIT or not is_first:
                # In a thread: this one may hold a lock that is needed.
                threading.Thread(target=lambda: _hurry(), name="hurry", daemon=True).start()
            if is_first:
                state.should_stop = 0
                name = signal.Signals(number).name
                signals.worker_shutting_down.send(sender=worker.hostname, sig=name, how="Warm", exitcode=0)

        _install(stop)


def _install(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in _SIGNALS:
        if number != signal.SIGHUP or not _ignores_hangup:
            signal.signal(number, handler)
    if _ignores_hangup:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    raise ended(f"{signal.Signals(number).name} ended the worker before it was ready.")
