"""The process that compiles for a worker: what `worker.device.compiling.process` starts and talks to."""

from __future__ import annotations

import contextlib
import os
import pickle
from multiprocessing.connection import Connection

from worker.contract.child_process import end_with_parent
from worker.contract.errors import first_line
from worker.contract.settings import WorkerSettings
from worker.device.compiling.traced import carried
from worker.device.model_runner import ModelRunner
from worker.model import loader

#: The process gives way to its worker where both want a core.
NICENESS = 10


def serve(connection: Connection, settings: WorkerSettings, gpu: int) -> None:
    """Compile what is asked for, until nobody asks. The whole of the other process."""
    end_with_parent()
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
