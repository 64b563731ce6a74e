"""What is measured, in which order and for how long: from settings to a `Report`."""

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
class Scope:
    """How much is measured."""

    #: Experiment b: sides of the pictures in pixels, rising.
    sides_px: Sequence[int]
    #: Experiment b: seconds that one attention may take.
    limit_s: float
    #: Experiment c: jobs in a batch, rising. Few use all of a CPU.
    gpu_jobs: Sequence[int]
    cpu_jobs: Sequence[int]
    #: Experiment a: whole pictures; the fastest counts.
    pictures: int
    #: Experiment c: seconds of steps that are timed for each batch.
    seconds: float
    #: Whether each attention backend is compiled; otherwise only the worker's own choice is.
    compiles_all: bool


FULL = Scope(
    sides_px=(256, 384, 512, 768, 1024, 1536, 2048),
    limit_s=20.0,
    gpu_jobs=(1, 2, 4, 8, 16, 32),
    cpu_jobs=(1, 2, 4),
    pictures=3,
    seconds=1.0,
    compiles_all=True,
)
#: Takes three minutes on a fast GPU, most of it to compile once.
QUICK = Scope(
    sides_px=(256, 512, 1024, 2048),
    limit_s=5.0,
    gpu_jobs=(1, 2, 4, 8, 16),
    cpu_jobs=(1, 2),
    pictures=1,
    seconds=0.3,
    compiles_all=False,
)


def setups(backends: Sequence[str], *, on_gpu: bool, scope: Scope) -> list[Setup]:
    """The setups of experiments a and c in the order of measuring: first those that are not compiled."""
    eager = [Setup(backend, compiled=False) for backend in backends]
    if not on_gpu:
        return eager  # A worker compiles nothing on a CPU.
    compiled = backends if scope.compiles_all else ("auto",)
    return eager + [Setup(backend, compiled=True) for backend in compiled]


class Benchmark:
    """One run of the benchmark."""

    def __init__(
        self,
        settings: WorkerSettings,
        experiments: Collection[Experiment],
        scope: Scope,
        *,
        steps: int,
        command: str,
    ) -> None:
        """Load the model once to learn its size and backends. Raises `SettingsError` if that fails."""
        self._settings = settings
        self._experiments, self._scope = experiments, scope
        self._command = command
        loaded = loader.load(settings)
        self._device, self._served = loaded.device, loaded.served
        self._dtype = str(loaded.dtype).removeprefix("torch.")
        self._device_name = next(each.choice for each in loaded.choices if each.what == "device")
        self._layer = kernels.first_attention(loaded.pipeline)
        del loaded
        runs.free()
        problems = attention.probe(self._device)
        self._refused = {name: problem for name, problem in problems.items() if problem}
        self._backends = [name for name, problem in problems.items() if not problem]
        on_gpu = self._device.type == "cuda"
        self._setups = setups(self._backends, on_gpu=on_gpu, scope=scope)
        self._plan = runs.Plan(
            steps=steps,
            pictures=scope.pictures if "a" in experiments else 0,
            jobs=(scope.gpu_jobs if on_gpu else scope.cpu_jobs) if "c" in experiments else (),
            seconds=scope.seconds,
        )
        if not self._plan.measurements:
            self._setups = []

    @property
    def total(self) -> int:
        """The number of measurements and setups, for a progress bar."""
        points = len(self._backends) * len(self._scope.sides_px) if "b" in self._experiments else 0
        return points + len(self._setups) * (1 + self._plan.measurements)

    def report(self, on_start: Callable[[str], None]) -> Report:
        """Measure everything. `on_start` is called with the name of each of the `total` parts before it."""
        points = list(self._points(on_start)) if "b" in self._experiments else []
        cats: list[Cat] = []
        rates: list[Rate] = []
        for setup in self._setups:
            self._run(setup, on_start, cats, rates)
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

    def _points(self, on_start: Callable[[str], None]) -> Iterator[Point]:
        for backend in self._backends:
            sides_px = self._scope.sides_px
            curve = kernels.curve(backend, self._layer, sides_px, self._device, limit_s=self._scope.limit_s)
            for side_px in sides_px:
                on_start(f"{backend} at {side_px} px")
                yield next(curve)

    def _run(self, setup: Setup, on_start: Callable[[str], None], cats: list[Cat], rates: list[Rate]) -> None:
        """Add all figures of `setup`, or why there are none."""
        on_start(
            f"{setup}: {'compiling, a minute or two the first time' if setup.compiled else 'warming up'}"
        )
        try:
            loaded = runs.LoadedSetup(self._settings, setup, self._plan)
        except SettingsError as error:
            reason = str(error)
            if self._plan.pictures:
                on_start(reason)
                cats.append(Cat(setup, left_out=reason))
            for jobs in self._plan.jobs:
                on_start(reason)
                rates.append(Rate(setup, jobs, left_out=reason))
            return
        if self._plan.pictures:
            on_start(f"{setup}: one picture")
            cats.append(loaded.cat())
        found = loaded.rates()
        for jobs in self._plan.jobs:
            on_start(f"{setup}: {jobs} jobs")
            rates.append(next(found))
