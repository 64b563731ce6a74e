"""The process that compiles for a worker: what `worker.device.compiling.process` starts and talks to."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from worker.contract.child_process import end_with_parent
from worker.contract.errors import first_line
from worker.device.compiling.traced import Recorder, carried

#: The process gives way to its worker where both want a core.
NICENESS = 10


class Compiles(Protocol):
    """A `worker.device.model_runner.ModelRunner`, as this process needs it."""

    def compile_like(self, what: str, lane: str, argument: Any, dynamic: Sequence[torch.Tensor]) -> Recorder:
        """Compile the function that is called `what` for a call with `argument`."""


def serve(connection: Connection, load: Callable[[], Compiles]) -> None:
    """Compile what is asked for, until nobody asks. The whole of the other process.

    `load`: gives what compiles. It is called when the process is sure to end with its worker.
    """
    end_with_parent()
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    runner = load()
    with contextlib.suppress(EOFError, OSError):
        while True:
            what, lane, argument, dynamic = pickle.loads(connection.recv_bytes())  # noqa: S301 - of our own
            try:
                answer = ("", *carried(runner.compile_like(what, lane, argument, dynamic)))
            except Exception as failure:  # noqa: BLE001 - whatever it is, the worker logs it
                answer = (first_line(failure) or type(failure).__name__, b"", "")
            connection.send_bytes(pickle.dumps(answer))
