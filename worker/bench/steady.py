"""Rates in a steady state: under load a GPU's clock falls within seconds, to what hours of work give."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import torch

#: Seconds between two looks at the GPU.
EVERY_S = 0.5


@dataclass(frozen=True)
class Steady:
    """What was measured after the time to warm up."""

    images_s: float
    #: Medians while it was measured: the clock of the GPU's cores in MHz, its power in W; None on a CPU, and
    #: where NVIDIA's driver does not say.
    mhz: float | None = None
    watts: float | None = None


class Gauges:
    """Looks at the GPU's clock and power from time to time. A context manager."""

    def __init__(self, read: Callable[[], tuple[float, float]] | None = None) -> None:
        """`read`: MHz and W at this moment; None: those of torch's GPU, if there is one."""
        self._read = read or (_of_the_gpu if torch.cuda.is_available() else None)
        self._seen: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gauges", daemon=True)

    @property
    def medians(self) -> tuple[float | None, float | None]:
        """MHz and W."""
        if not self._seen:
            return None, None
        mhz, watts = (statistics.median(values) for values in zip(*self._seen, strict=True))
        return mhz, watts

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while self._read is not None:
            try:
                self._seen.append(self._read())
            except Exception:  # noqa: BLE001 - a figure that is not there is no fault of the benchmark
                return
            if self._stop.wait(EVERY_S):
                return


def _of_the_gpu() -> tuple[float, float]:
    """By nvidia-ml-py, which finds the GPU that CUDA_VISIBLE_DEVICES means."""
    return float(torch.cuda.clock_rate()), torch.cuda.power_draw() / 1e3


@dataclass
class Window:
    """Counts pictures once the time to warm up is over."""

    #: Seconds to warm up, >= 0, and to measure, > 0.
    warm_s: float
    seconds: float
    clock: Callable[[], float] = time.perf_counter
    gauges: Gauges = field(default_factory=Gauges)

    def measure(self, run: Callable[[], int]) -> Steady:
        """Call `run`, which returns how many pictures it made, until the time is over.

        The first call compiles: it is not part of the time to warm up. A call counts whole.
        """
        run()
        begun_s = self.clock()
        while self.clock() - begun_s < self.warm_s:
            run()
        made, begun_s = 0, self.clock()
        with self.gauges:
            while (took_s := self.clock() - begun_s) < self.seconds:
                made += run()
        return Steady(made / took_s, *self.gauges.medians)
