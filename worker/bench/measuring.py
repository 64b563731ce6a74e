"""What is measured, in which order, and with how much patience: from settings to a `Report`."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from worker.bench import kernels, runs
from worker.bench.report import PACKAGES, Cat, Experiment, Point, Rate, Report, Setup
from worker.contract.errors import SettingsError
from worker.contract.settings import WorkerSettings
from worker.contract.versions import versions
from worker.device import attention
from worker.model import loader


@dataclass(frozen=True)
class Patience:
    """How much is measured."""

    #: Sides of the pictures in b, in pixels, rising.
    sides_px: Sequence[int]
    #: Seconds that one attention may take in b.
    limit_s: float
    #: Jobs of the batches in c, rising. A CPU is full with few.
    gpu_jobs: Sequence[int]
    cpu_jobs: Sequence[int]
    #: Whole pictures in a; the fastest counts.
    pictures: int
    #: Seconds of steps that are timed for each batch in c.
    seconds: float
    #: Whether each backend is compiled; else only what a worker would choose.
    compiles_all: bool


FULL = Patience(
    sides_px=(256, 384, 512, 768, 1024, 1536, 2048),
    limit_s=20.0,
    gpu_jobs=(1, 2, 4, 8, 16, 32),
    cpu_jobs=(1, 2, 4),
    pictures=3,
    seconds=1.0,
    compiles_all=True,
)
#: Three minutes on a fast GPU, where most of it goes to compiling once.
QUICK = Patience(
    sides_px=(256, 512, 1024, 2048),
    limit_s=5.0,
    gpu_jobs=(1, 2, 4, 8, 16),
    cpu_jobs=(1, 2),
    pictures=1,
    seconds=0.3,
    compiles_all=False,
)


def setups(backends: Sequence[str], *, on_gpu: bool, patience: Patience) -> list[Setup]:
    """How the UNet is to run in a and c, in the order of measuring: what needs no compiling first."""
    eager = [Setup(backend, compiled=False) for backend in backends]
    if not on_gpu:
        return eager  # A worker compiles nothing there.
    compiled = backends if patience.compiles_all else ("auto",)
    return eager + [Setup(backend, compiled=True) for backend in compiled]


class Measuring:
    """One run of the benchmark."""

    def __init__(
        self,
        settings: WorkerSettings,
        experiments: Collection[Experiment],
        patience: Patience,
        *,
        steps: int,
        command: str,
    ) -> None:
        """Load the model once, to see what there is. Raises `SettingsError` when that cannot be done."""
        self._settings = settings
        self._experiments, self._patience = experiments, patience
        self._command = command
        loaded = loader.load(settings)
        self._device, self._served = loaded.device, loaded.served
        self._dtype = str(loaded.dtype).removeprefix("torch.")
        self._device_name = next(each.choice for each in loaded.choices if each.what == "device")
        self._place = kernels.place_in(loaded.pipeline)
        del loaded
        runs.free()
        problems = attention.probe(self._device)
        self._refused = {name: problem for name, problem in problems.items() if problem}
        self._backends = [name for name, problem in problems.items() if not problem]
        on_gpu = self._device.type == "cuda"
        self._setups = setups(self._backends, on_gpu=on_gpu, patience=patience)
        self._plan = runs.Plan(
            steps=steps,
            pictures=patience.pictures if "a" in experiments else 0,
            jobs=(patience.gpu_jobs if on_gpu else patience.cpu_jobs) if "c" in experiments else (),
            seconds=patience.seconds,
        )
        if not self._plan.measurements:
            self._setups = []

    @property
    def total(self) -> int:
        """Things to do."""
        points = len(self._backends) * len(self._patience.sides_px) if "b" in self._experiments else 0
        return points + len(self._setups) * (1 + self._plan.measurements)

    def report(self, tell: Callable[[str], None]) -> Report:
        """Measure everything. `tell` is called before each of the `total` things to do, with what it is."""
        points = list(self._points(tell)) if "b" in self._experiments else []
        cats: list[Cat] = []
        rates: list[Rate] = []
        for setup in self._setups:
            self._run(setup, tell, cats, rates)
            runs.free()
        defaults = self._served.defaults
        return Report(
            device=self._device_name,
            versions={**versions(PACKAGES), "python": platform.python_version()},
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            command=self._command,
            model=self._served.name,
            dtype=self._dtype,
            width=defaults.width,
            height=defaults.height,
            steps=self._plan.steps,
            guidance_scale=defaults.guidance_scale,
            refused=self._refused,
            cats=cats,
            points=points,
            rates=rates,
        )

    def _points(self, tell: Callable[[str], None]) -> Iterator[Point]:
        for backend in self._backends:
            sides_px = self._patience.sides_px
            curve = kernels.curve(
                backend, self._place, sides_px, self._device, limit_s=self._patience.limit_s
            )
            for side_px in sides_px:
                tell(f"{backend} at {side_px} px")
                yield next(curve)

    def _run(self, setup: Setup, tell: Callable[[str], None], cats: list[Cat], rates: list[Rate]) -> None:
        """All figures of `setup`, or why there are none."""
        tell(f"{setup}: {'compiling, a minute or two the first time' if setup.compiled else 'warming up'}")
        try:
            bench = runs.Bench(self._settings, setup, self._plan)
        except SettingsError as error:
            reason = str(error)
            if self._plan.pictures:
                tell(reason)
                cats.append(Cat(setup, left_out=reason))
            for jobs in self._plan.jobs:
                tell(reason)
                rates.append(Rate(setup, jobs, left_out=reason))
            return
        if self._plan.pictures:
            tell(f"{setup}: one picture")
            cats.append(bench.cat())
        found = bench.rates()
        for jobs in self._plan.jobs:
            tell(f"{setup}: {jobs} jobs")
            rates.append(next(found))
