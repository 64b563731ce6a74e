"""What processes that a process of this project starts have in common."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def end_with_parent(*ignored: signal.Signals) -> None:
    """End this process with its parent, however that ends, and not by a key that is meant for the parent.

    `ignored` are signals that do not end it either. Called in a process that multiprocessing spawned.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, *ignored):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - it was spawned

    def wait() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
