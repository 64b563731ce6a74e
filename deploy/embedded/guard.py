"""Ends what a stack has started, once the stack itself is gone.

Run as a program of its own (`python -I -S guard.py`), in a session of its own. It reads orders from
standard input, one a line, and acts when that input ends: which it does when the other side closes the
pipe, and just as surely when the other side was killed by SIGKILL and could not tidy up.

    group N     end the process group N
    process N   end the process N alone
    forget N    N has ended and was reaped: the number may belong to someone else by now
    remove PATH remove this folder, after the processes

Processes are ended by SIGKILL: by then there is nobody left to wait for a graceful end, and whoever was
able to ask for one has done so before closing the pipe. Only the standard library is used, and nothing of
this project is imported, so that it is up within milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable


def obey(orders: Iterable[str]) -> None:
    """Carry out `orders` when they end, processes before folders."""
    enders: dict[int, Callable[[int, int], None]] = {}
    folders: list[str] = []
    for order in orders:
        verb, _, argument = order.rstrip("\n").partition(" ")
        if verb == "group":
            enders[int(argument)] = os.killpg
        elif verb == "process":
            enders[int(argument)] = os.kill
        elif verb == "forget":
            enders.pop(int(argument), None)
        elif verb == "remove":
            folders.append(argument)
    for number, end in enders.items():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(number, signal.SIGKILL)
    for folder in folders:
        _remove(folder)


def _remove(folder: str) -> None:
    """Remove `folder`. A process that is just dying may still add a file to it, hence more than one try."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):  # noqa: PTH110 - pathlib would double the start-up time
            return


if __name__ == "__main__":
    # Signals meant for the stack are the stack's affair: this process ends when the stack has.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    obey(sys.stdin)
