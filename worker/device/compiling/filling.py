"""Compiles ahead of a rollout what workers of this machine's kind run: `smallcat warm`.

The model is loaded as a worker loads it, with the worker's settings, and each function of the default size is
compiled in this process, unless the fleet has it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from worker.contract.errors import SettingsError, SmallcatError, first_line
from worker.contract.settings import WorkerSettings
from worker.device.compiling.claims import Store
from worker.device.compiling.compiler import Piece
from worker.device.compiling.kernel_cache import KernelCache
from worker.device.compiling.process import cache_of
from worker.device.compiling.traced import carried
from worker.device.model_runner import ModelRunner
from worker.model import loader


@dataclass(frozen=True)
class Filled:
    """A function and a lane, and how it was found or compiled."""

    #: As they are in a worker's log: "step", and its kind and latents.
    what: str
    lane: str
    #: Whether the fleet had it already.
    was_there: bool
    #: Seconds that it took to compile and store.
    seconds: float
    #: Why the fleet has not got it now; empty: it has.
    problem: str = ""


def fill(settings: WorkerSettings, shared: Store) -> Iterator[Filled]:
    """Compile into `shared` what it lacks. The files beside the model are not looked at: no code is of one.

    Raises `SettingsError` where this machine cannot, `StorageError`, `OSError`.
    """
    if settings.device == "cpu" or not torch.cuda.is_available():
        raise SettingsError("There is no GPU here: run it on a machine with a GPU of the workers' kind.")
    runner = ModelRunner(settings, loader.load(settings), compiles_alone=True)
    return filled(runner.default_pieces(), cache_of(settings, runner.setup, shared))


def filled(pieces: list[Piece], cache: KernelCache) -> Iterator[Filled]:
    """Compile each of `pieces` that the fleet lacks. Raises what its store raises when it is read."""
    for piece in pieces:
        what, lane, started_s = piece.lanes.what, piece.lane, time.monotonic()
        if cache.is_shared(what, lane):
            yield Filled(what, lane, True, 0.0)
            continue
        try:
            recorder = piece.lanes.record(lane, *piece.example())
            problem = cache.keep(what, lane, *carried(recorder))
        except SmallcatError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever torch raises where something does not compile
            problem = f"it does not compile: {first_line(error)}"
        yield Filled(what, lane, False, time.monotonic() - started_s, problem)
