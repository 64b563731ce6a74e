"""What was compiled before is loaded before a worker takes its first job, if that is quick.

Loading takes seconds while nothing is served, and half a minute beside jobs, which hold Python's lock. Where
the fleet's storage is slow or away, the worker does not wait for it: it serves uncompiled, and loads or
compiles beside.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Final, TypeVar

from worker.device.compiling.compiler import Piece
from worker.model.placement import Choice

#: Seconds that a worker waits, in all, for the storage to answer, beside its first small picture; and for
#: what was found there to be loaded.
SEEK_S: Final = 5.0
LOAD_S: Final = 25.0

T = TypeVar("T")


class Ahead:
    """The code of some pieces, sought while something else is done, and loaded after that."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        """Begin to look for it. The first of `pieces` is the one without which the others gain little."""
        self._sought = [(piece, piece.seek()) for piece in pieces]

    def load(self) -> Choice | None:
        """Load what was found, and run it. None: the first piece is not compiled, at least not yet."""
        began_s = time.monotonic()
        found: list[tuple[Piece, str]] = []
        for piece, sought in self._sought:
            trace = _within(sought, began_s + SEEK_S)
            if not trace and not found:
                return None
            if trace:
                found.append((piece, trace))
        loads = [(piece, piece.load(trace)) for piece, trace in found]
        until_s = time.monotonic() + LOAD_S
        loaded = [piece for piece, load in loads if _within(load, until_s)]
        if not loaded or loaded[0] is not self._sought[0][0]:
            return None
        for piece in loaded:
            piece.run()
        seconds = time.monotonic() - began_s
        return Choice("compile", "yes", f"it was compiled before, and loaded in {seconds:.1f} s")


def _within(future: Future[T], until_s: float) -> T | None:
    """Its result; None: it is not there in time, or an error. `until_s`: by the monotonic clock."""
    try:
        return future.result(timeout=max(0.0, until_s - time.monotonic()))
    except Exception:  # noqa: BLE001 - a timeout, or what was logged where it was raised
        return None
