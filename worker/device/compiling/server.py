"""The process that compiles for a worker: what `worker.device.compiling.process` starts and talks to."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from multiprocessing.connection import Connection

from worker.contract.errors import first_line
from worker.contract.settings import WorkerSettings
from worker.device.compiling.traced import carried
from worker.device.model_runner import ModelRunner
from worker.model import loader

#: The process gives way to its worker where both want a core.
NICENESS = 10


def serve(connection: Connection, settings: WorkerSettings, gpu: int) -> None:
    """Compile what is asked for, until nobody asks. The whole of the other process."""
    _end_with_parent()
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    runner = ModelRunner(settings, loader.load(settings, gpu=gpu), compiles_alone=True)
    with contextlib.suppress(EOFError, OSError):
        while True:
            what, lane, argument, dynamic = pickle.loads(connection.recv_bytes())  # noqa: S301 - of our own
            try:
                answer = ("", *carried(runner.compile_like(what, lane, argument, dynamic)))
            except Exception as failure:  # noqa: BLE001 - whatever it is, the worker logs it
                answer = (first_line(failure) or type(failure).__name__, b"", "")
            connection.send_bytes(pickle.dumps(answer))


def _end_with_parent() -> None:
    """End this process with its parent, however that ends, and not by a key that is meant for the parent."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - it was spawned

    def wait() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
