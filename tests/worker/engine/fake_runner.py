"""A runner without a model: keeps `worker.engine.runner.Runner`'s contract, and fails where it is told to.

Jobs are told apart by their seed. Everything that a test wants to order is an event or a gate, no sleep.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from worker.contract.errors import NotFiniteError, OutOfMemoryError, SmallcatError
from worker.contract.job import Defaults, Job, ServedModel
from worker.engine.runner import Picture

#: What the fake serves.
SERVED = ServedModel(
    name="fake", revision="f" * 40, defaults=Defaults(width=64, height=64, steps=4, guidance_scale=7.5)
)
#: Seconds that a test waits for what must come; only a failing test waits so long.
SOON_S = 20.0


@dataclass
class FakeRender:
    """A job on board."""

    job: Job
    steps: int
    rows: int
    lane: Hashable
    step: int = 0
    warnings: tuple[str, ...] = ()


@dataclass
class Faults:
    """What goes wrong for one job."""

    #: Raised by `prepare`.
    prepare: BaseException | None = None
    #: Step (from 0) -> the outcome of this job alone, mates unharmed.
    outcome: dict[int, SmallcatError] = field(default_factory=dict)
    #: Step (from 0) -> raised, for the whole batch that the job is in.
    batch: dict[int, BaseException] = field(default_factory=dict)
    #: Raised by `decode`, for all pictures of that call.
    decode: BaseException | None = None
    #: Its latents are not finite, which `decode` says of it alone.
    nan: bool = False


class FakeRunner:
    """See the module."""

    job_s = 1.0

    def __init__(self, max_rows: int = 8, memory_rows: int = 10**6, *, decodes_beside: bool = False) -> None:
        self.max_rows = max_rows
        self.decodes_beside = decodes_beside
        #: Rows that fit in memory: more are an `OutOfMemoryError`.
        self.memory_rows = memory_rows
        #: Calls of `step` (from 0) that are out of memory whatever their rows.
        self.oom_calls: set[int] = set()
        #: By seed.
        self.faults: dict[int, Faults] = {}
        #: Seeds for whose text and picture there is memory on the engine's thread alone.
        self.crowded: set[int] = set()
        #: Warnings of each job, by seed.
        self.warnings: dict[int, tuple[str, ...]] = {}
        #: While clear, a step waits; `entered` says that it does.
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        #: The same for a decoding.
        self.decode_gate = threading.Event()
        self.decode_gate.set()
        self.decoding = threading.Event()
        #: While clear, no picture of those that are set off arrives.
        self.arrival_gate = threading.Event()
        self.arrival_gate.set()
        #: Called with the number of decodings so far when one is set off.
        self.on_decode: Callable[[int], None] = lambda count: None
        #: Seeds of each decoding, in order.
        self.decoded: list[list[int]] = []
        #: Rows of a job at each of its steps, by seed; for others guidance says it.
        self.rows: dict[int, list[int]] = {}
        #: Called with the seeds in each step before it runs.
        self.on_step: Callable[[list[int]], None] = lambda seeds: None
        #: Seeds of each step that worked, in order.
        self.batches: list[list[int]] = []
        #: Steps that worked, by seed.
        self.steps_done: Counter[int] = Counter()
        #: Seeds in order of `prepare`.
        self.prepared: list[int] = []
        self._calls = 0

    def cap(self, lane: Hashable) -> int:
        """The same in each lane."""
        return self.max_rows

    def step_s(self, lane: Hashable, rows: int) -> float:
        """A row is a row."""
        return float(rows)

    def prepare(self, job: Job) -> FakeRender:
        """As the contract says."""
        self.prepared.append(job.seed)
        self._make_room(job)
        if error := self._faults(job).prepare:
            raise error
        job = job.resolved(SERVED)
        assert job.steps is not None
        assert job.guidance_scale is not None
        rows = 2 if job.guidance_scale > 1 else 1
        rows = self.rows.get(job.seed, [rows])[0]
        warnings = self.warnings.get(job.seed, ())
        return FakeRender(job, job.steps, rows, lane=(job.width, job.height), warnings=warnings)

    def step(self, renders: Sequence[FakeRender]) -> list[SmallcatError | None]:
        """As the contract says: what raises leaves all renders as they were."""
        call, self._calls = self._calls, self._calls + 1
        seeds = [render.job.seed for render in renders]
        assert len({render.lane for render in renders}) == 1, "a step is of one lane"
        assert all(render.step < render.steps for render in renders), "a finished job takes no step"
        self.on_step(seeds)
        self.entered.set()
        assert self.gate.wait(SOON_S), "nobody opened the gate"
        rows = sum(render.rows for render in renders)
        if rows > self.memory_rows or call in self.oom_calls:
            raise OutOfMemoryError(f"{rows} rows")
        for render in renders:
            if error := self._faults(render.job).batch.get(render.step):
                raise error
        outcomes = [self._faults(render.job).outcome.get(render.step) for render in renders]
        self.batches.append(seeds)
        for render, outcome in zip(renders, outcomes, strict=True):
            if outcome is None:
                render.step += 1
                if (rows := self.rows.get(render.job.seed)) and render.step < render.steps:
                    render.rows = rows[render.step]
                self.steps_done[render.job.seed] += 1
        return outcomes

    def decode(self, renders: Sequence[FakeRender]) -> Iterator[Picture | SmallcatError]:
        """As the contract says."""
        self.decoding.set()
        assert self.decode_gate.wait(SOON_S), "nobody opened the gate"
        self.decoded.append([render.job.seed for render in renders])
        self.on_decode(len(self.decoded))
        for render in renders:
            self._make_room(render.job)
            if error := self._faults(render.job).decode:
                raise error
        return self._arriving(
            [
                NotFiniteError("NaN") if self._faults(render.job).nan else picture_of(render.job)
                for render in renders
            ]
        )

    def _arriving(self, outcomes: list[Picture | SmallcatError]) -> Iterator[Picture | SmallcatError]:
        assert self.arrival_gate.wait(SOON_S), "nobody opened the gate"
        yield from outcomes

    def _make_room(self, job: Job) -> None:
        if job.seed in self.crowded and threading.current_thread().name != "engine":
            raise OutOfMemoryError("beside a step")

    def _faults(self, job: Job) -> Faults:
        return self.faults.get(job.seed, Faults())


def picture_of(job: Job) -> Picture:
    """The picture that the fake makes of a job."""
    return Picture(np.full((8, 8, 3), job.seed % 251, np.uint8))


def job_of(seed: int, **fields: object) -> Job:
    """A job of the fake's model, resolved."""
    return Job.parse({"prompt": f"picture {seed}", "seed": seed} | fields).resolved(SERVED)
