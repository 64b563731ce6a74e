"""A runner without a model. It keeps the contract of `worker.engine.runner.Runner`, and fails on demand.

A job is known by its seed. Tests order what happens by events and gates, without a sleep.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from worker.contract.errors import NotFiniteError, OutOfMemoryError, SmallcatError
from worker.contract.job import Job
from worker.contract.served_model import Defaults, ServedModel
from worker.engine.runner import FirstPass, JobInputs, Outcome, Picture

#: What the fake serves.
SERVED = ServedModel(
    name="fake", revision="f" * 40, defaults=Defaults(width=64, height=64, steps=4, guidance_scale=7.5)
)
#: Seconds that a test waits for an event; only a failing test waits so long.
SOON_S = 20.0


@dataclass
class FakeState:
    """A job in flight."""

    job: Job
    steps: int
    rows: int
    lane: Hashable
    step: int = 0
    warnings: tuple[str, ...] = ()
    text_tokens: int = 0
    lora_rows: int = 0
    #: Whether a second pass follows.
    goes_on: bool = False


@dataclass
class Faults:
    """What goes wrong for one job."""

    #: Raised by `prepare`.
    prepare: BaseException | None = None
    #: Raised by `prepare` for its second pass.
    second: BaseException | None = None
    #: Step (from 0) -> the outcome of this job alone; the other jobs of the batch go on.
    outcome: dict[int, SmallcatError] = field(default_factory=dict)
    #: Step (from 0) -> raised, for the whole batch that the job is in.
    batch: dict[int, BaseException] = field(default_factory=dict)
    #: Raised by `decode`, for all pictures of that call.
    decode: BaseException | None = None
    #: Its latents are not finite: `decode` returns an error for it alone.
    nan: bool = False


class FakeRunner:
    """A device for tests; each attribute below makes something happen."""

    job_s = 1.0
    is_compiling = False

    def __init__(self, max_rows: int = 8, memory_rows: int = 10**6, *, decodes_beside: bool = False) -> None:
        self.max_rows = max_rows
        self.decodes_beside = decodes_beside
        #: Rows that fit in memory; a step of more raises `OutOfMemoryError`.
        self.memory_rows = memory_rows
        #: Calls of `step` (from 0) that raise `OutOfMemoryError`, whatever their rows.
        self.oom_calls: set[int] = set()
        #: What goes wrong, by seed.
        self.faults: dict[int, Faults] = {}
        #: Called with the seed of a job whose second pass is prepared, before it is.
        self.on_second: Callable[[int], None] = lambda seed: None
        #: Seeds whose text and picture fit in memory on the engine's thread alone.
        self.out_of_memory_beside: set[int] = set()
        #: Warnings of each job, by seed.
        self.warnings: dict[int, tuple[str, ...]] = {}
        #: While clear, a step waits; `entered` is set when it does.
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        #: The same for a call of `decode`.
        self.decode_gate = threading.Event()
        self.decode_gate.set()
        self.decode_entered = threading.Event()
        #: While clear, the pictures of a call of `decode` are not ready.
        self.picture_gate = threading.Event()
        self.picture_gate.set()
        #: Called at each call of `decode`, with the number of calls so far.
        self.on_decode: Callable[[int], None] = lambda count: None
        #: Seeds of each call of `decode`, in order.
        self.decoded: list[list[int]] = []
        #: Rows of a job at each of its steps, by seed; by default guidance decides.
        self.rows: dict[int, list[int]] = {}
        #: Evaluations of the model for each step that a job asks for.
        self.order = 1
        #: Called with the seeds in each step before it runs.
        self.on_step: Callable[[list[int]], None] = lambda seeds: None
        #: Seeds of each step that succeeded, in order.
        self.batches: list[list[int]] = []
        #: Steps that succeeded, by seed.
        self.steps_done: Counter[int] = Counter()
        #: Seeds in order of `prepare`.
        self.prepared: list[int] = []
        #: What each job began with, by seed.
        self.inputs: dict[int, JobInputs | FirstPass | None] = {}
        self._calls = 0

    def cap(self, lane: Hashable) -> int:
        """The same for each lane."""
        return self.max_rows

    @property
    def most_rows(self) -> int:
        """The same however many jobs wait."""
        return self.max_rows

    def most(self, lane: Hashable) -> int:
        """The same however many jobs wait."""
        return self.max_rows

    def step_s(self, lane: Hashable, rows: int, text_tokens: int = 0, lora_rows: int = 0) -> float:
        """Each row costs one."""
        return float(rows)

    def prepare(self, job: Job, inputs: JobInputs | FirstPass | None = None) -> FakeState:
        """As the contract says."""
        is_second = isinstance(inputs, FirstPass)
        if is_second:
            self.on_second(job.seed)
        self.prepared.append(job.seed)
        self.inputs[job.seed] = inputs
        self._check_memory(job)
        if error := self._faults(job).second if is_second else self._faults(job).prepare:
            raise error
        job = job.resolved(SERVED)
        assert job.steps is not None
        assert job.guidance_scale is not None
        rows = 2 if job.guidance_scale > 1 else 1
        rows = self.rows.get(job.seed, [rows])[0]
        warnings = self.warnings.get(job.seed, ())
        second = job.second_pass
        if is_second:
            assert second is not None
            lane = second.width, second.height
            return FakeState(job, second.steps_run * self.order, rows, lane, warnings=warnings)
        lane = job.width or 0, job.height or 0
        return FakeState(
            job, job.steps * self.order, rows, lane, warnings=warnings, goes_on=second is not None
        )

    def step(self, states: Sequence[FakeState]) -> list[SmallcatError | None]:
        """As the contract says: if it raises, all states are unchanged."""
        call, self._calls = self._calls, self._calls + 1
        seeds = [state.job.seed for state in states]
        assert len({state.lane for state in states}) == 1, "a step is of one lane"
        assert all(state.step < state.steps for state in states), "a finished job takes no step"
        self.on_step(seeds)
        self.entered.set()
        assert self.gate.wait(SOON_S), "nobody opened the gate"
        rows = sum(state.rows for state in states)
        if rows > self.memory_rows or call in self.oom_calls:
            raise OutOfMemoryError(f"{rows} rows")
        for state in states:
            if error := self._faults(state.job).batch.get(state.step):
                raise error
        outcomes = [self._faults(state.job).outcome.get(state.step) for state in states]
        self.batches.append(seeds)
        for state, outcome in zip(states, outcomes, strict=True):
            if outcome is None:
                state.step += 1
                if (rows := self.rows.get(state.job.seed)) and state.step < state.steps:
                    state.rows = rows[state.step]
                self.steps_done[state.job.seed] += 1
        return outcomes

    def decode(self, states: Sequence[FakeState], *, is_alone: bool = False) -> Iterator[Outcome]:
        """As the contract says."""
        self.decode_entered.set()
        assert self.decode_gate.wait(SOON_S), "nobody opened the gate"
        self.decoded.append([state.job.seed for state in states])
        self.on_decode(len(self.decoded))
        for state in states:
            self._check_memory(state.job)
            if error := self._faults(state.job).decode:
                raise error
        return self._when_ready(
            [
                NotFiniteError("NaN")
                if self._faults(state.job).nan
                else FirstPass(picture_of(state.job))
                if state.goes_on
                else picture_of(state.job)
                for state in states
            ]
        )

    def _when_ready(self, outcomes: list[Outcome]) -> Iterator[Outcome]:
        assert self.picture_gate.wait(SOON_S), "nobody opened the gate"
        yield from outcomes

    def _check_memory(self, job: Job) -> None:
        if job.seed in self.out_of_memory_beside and threading.current_thread().name != "engine":
            raise OutOfMemoryError("beside a step")

    def _faults(self, job: Job) -> Faults:
        return self.faults.get(job.seed, Faults())


def picture_of(job: Job) -> Picture:
    """The picture that the fake makes of a job: small, unless the job's image is put back into it."""
    size = (job.height or 8, job.width or 8) if job.mask else (8, 8)
    return Picture(np.full((*size, 3), job.seed % 251, np.uint8))


def job_of(seed: int, **fields: object) -> Job:
    """A job of the fake's model, resolved."""
    return Job.parse({"prompt": f"picture {seed}", "seed": seed} | fields).resolved(SERVED)
