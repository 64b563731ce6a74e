"""A benchmark that takes its turn on the GPU: several of them compile side by side, and one measures.

    for precision in fp16 fp8; do
        SMALLCAT_PRECISION=$precision python -m tests.benchmarks.held /tmp/turn \
            tests.benchmarks.engine --model /tmp/sdxl --job "steps=30 scheduler=euler" &
    done; wait

Runs a module as `python -m` does. It waits for the file's lock before it measures the cost of steps, and
before its first load, from which on it keeps the lock until it ends. They use one GPU where
CUDA_VISIBLE_DEVICES names it, and find each other's compiled code where TORCHINDUCTOR_CACHE_DIR is one folder
for all.
"""

from __future__ import annotations

import fcntl
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worker.bench.saturation import Load
from worker.device import warm_up


class Turn:
    """The lock, which this process has or has not."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")  # as long as the process lives
        self._is_kept = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """For a while."""
        if self._is_kept:
            yield
            return
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def keep(self) -> None:
        """Until the process ends."""
        if not self._is_kept:
            print("ready to measure", flush=True)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._is_kept = True


def hold(turn: Turn) -> None:
    """Have what measures wait for its turn."""
    begin: Callable[..., None] = Load.begin
    measure_steps: Callable[..., Any] = warm_up.measure_steps

    def begun(load: Load, jobs: int) -> None:
        turn.keep()
        begin(load, jobs)

    def measured(*given: Any, **named: Any) -> Any:
        with turn.taken():
            return measure_steps(*given, **named)

    Load.begin = begun  # type: ignore[method-assign]
    warm_up.measure_steps = measured


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    hold(Turn(Path(sys.argv[1])))
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
