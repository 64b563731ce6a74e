"""The guard: ends the processes of a stack, and removes its folder, once the stack's own process is gone.

Run as a program (`python -I -S guard.py`) in a session of its own. It reads orders from standard input, one
a line, and carries them out when that input ends. The input ends when the stack closes the pipe, and also
when the stack was killed by SIGKILL and could clean up nothing itself.

    group N     end the process group N
    process N   end the process N alone
    forget N    N has ended and was reaped: another process may have its number by now
    remove PATH remove this folder, after the processes

Processes are ended by SIGKILL: a stack that was able to end them gracefully has done so before it closed
the pipe. Only the standard library is imported, and nothing of this project: the guard is ready within
milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable


def carry_out(orders: Iterable[str]) -> None:
    """Read all of `orders`, then carry them out: processes before folders."""
    kills: dict[int, Callable[[int, int], None]] = {}
    folders: list[str] = []
    for order in orders:
        verb, _, argument = order.rstrip("\n").partition(" ")
        if verb == "group":
            kills[int(argument)] = os.killpg
        elif verb == "process":
            kills[int(argument)] = os.kill
        elif verb == "forget":
            kills.pop(int(argument), None)
        elif verb == "remove":
            folders.append(argument)
    for number, kill in kills.items():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(number, signal.SIGKILL)
    for folder in folders:
        _remove(folder)


def _remove(folder: str) -> None:
    """Remove `folder`, in ten attempts: a process that is about to end may still write a file to it."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):  # noqa: PTH110 - importing pathlib would double the start-up time
            return


if __name__ == "__main__":
    # The stack handles these signals itself. The guard ends after the stack, when the pipe is closed.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    carry_out(sys.stdin)
