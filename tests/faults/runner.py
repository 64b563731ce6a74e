"""A runner without torch for real workers: a job's prompt decides what happens to it.

name verb:argument verb:argument ...

sleep:SECONDS   its last step comes so much later
hold:PATH       its last step comes when PATH exists. It keeps its row meanwhile, as any scheduled job does:
                as many of them as there are rows let no other job take a step
steps take FAULTS_STEP_S seconds (default 0), whatever their rows
raise:KIND@WHERE    KIND in prepare, step or decode: Exception, SystemExit, MemoryError, OutOfMemoryError
nan:            its latents are not finite
kill:           its process dies by SIGKILL in its first step; kill:N, only in its first N attempts
kill2:N         the same in the first step of its second pass
lose:N          its device fails in its first step, in its first N attempts
break:N         the engine's own loop fails there, in its first N attempts; break:, in each
die:POINT       its process dies once at that point: see `tests.faults.app`
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from worker.contract.errors import DeviceError, NotFiniteError, OutOfMemoryError, SmallcatError
from worker.contract.job import Job
from worker.contract.served_model import Defaults, ServedModel
from worker.engine.runner import FirstPass, JobInputs, Outcome, Picture

#: What the fake serves.
SERVED = ServedModel(
    name="fake", revision="f" * 40, defaults=Defaults(width=64, height=64, steps=2, guidance_scale=1.0)
)
#: What `raise:` can raise. `OutOfMemoryError` is what the real runner makes of the device's.
RAISED: dict[str, type[BaseException]] = {
    "Exception": Exception,
    "SystemExit": SystemExit,
    "MemoryError": MemoryError,
    "OutOfMemoryError": OutOfMemoryError,
    "KeyboardInterrupt": KeyboardInterrupt,
}
#: Seconds of a step in which every job only waits.
IDLE_TURN_S = 0.005


@dataclass(frozen=True)
class Choice:
    """As `worker.model.placement.Choice`, which comes with torch."""

    what: str
    choice: str
    reason: str


def verbs_of(prompt: str) -> dict[str, str]:
    """The verbs of a prompt and their arguments."""
    words = [word.partition(":") for word in prompt.split()[1:]]
    return {verb: argument for verb, colon, argument in words if colon}


def pixel_of(job: Job) -> int:
    """The grey that a job's whole picture has."""
    return job.seed % 251


def size_of(job: Job) -> tuple[int, int]:
    """The height and the width of a job's picture: other jobs may begin with it."""
    width, height = job.picture_size
    return height or 8, width or 8


@dataclass
class FaultState:
    """A job in flight."""

    job: Job
    verbs: dict[str, str]
    steps: int
    ends_at: float
    rows: int = 1
    lane: Hashable = "lane"
    step: int = 0
    warnings: tuple[str, ...] = ()
    text_tokens: int = 0
    lora_rows: int = 0
    #: Which pass of the job it is: 1 or 2.
    number: int = 1

    @property
    def goes_on(self) -> bool:
        """Whether a second pass follows."""
        return self.number == 1 and self.job.second_pass is not None

    def waits(self) -> bool:
        """Whether its last step has to wait."""
        if self.step < self.steps - 1:
            return False
        hold = self.verbs.get("hold")
        return time.monotonic() < self.ends_at or (hold is not None and not Path(hold).exists())


class FaultRunner:
    """A `worker.engine.runner.Runner`. `note` gets each event; `may_die` decides on a kill."""

    served = SERVED
    job_s = 1.0
    decodes_beside = False
    is_compiling = is_compiled = False
    out_of_memory = padded_rows = 0
    choices = (Choice("device", "none", "a fake"), Choice("attention", "none", "a fake"))

    def __init__(
        self,
        max_rows: int,
        step_s: float,
        note: Callable[[str, Job], None],
        may_die: Callable[[str, int], bool],
    ) -> None:
        self.max_rows = max_rows
        self._step_s = step_s
        self._note = note
        self._may_die = may_die

    def warm_up(self) -> tuple[Choice, ...]:
        """There is nothing to warm up."""
        return (Choice("max rows", str(self.max_rows), "a fake"),)

    def memory(self) -> dict[str, int]:
        """It has no GPU."""
        return {}

    def utilisation(self) -> float | None:
        """Nor can it be asked how busy it is."""
        return None

    def preview(self, state: FaultState) -> None:
        """It has none."""

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
        """The same for any rows."""
        return 1.0

    def prepare(self, job: Job, inputs: JobInputs | FirstPass | None = None) -> FaultState:
        """As in `Runner`."""
        verbs = verbs_of(job.prompt)
        if isinstance(inputs, FirstPass):
            assert job.second_pass is not None
            return FaultState(job, verbs, job.second_pass.steps_run, 0.0, lane="larger", number=2)
        self._note("start", job)
        _raise(verbs, "prepare")
        assert job.steps is not None
        return FaultState(job, verbs, job.steps, time.monotonic() + float(verbs.get("sleep", 0)))

    def step(self, states: Sequence[FaultState]) -> list[SmallcatError | None]:
        """As in `Runner`: if it raises, all states are unchanged."""
        for state in states:
            _raise(state.verbs, "step")
            kill = "kill" if state.number == 1 else "kill2"
            if kill in state.verbs and self._may_die(state.job.id, int(state.verbs[kill] or 10**6)):
                os.kill(os.getpid(), signal.SIGKILL)
            if "lose" in state.verbs and self._may_die(state.job.id, int(state.verbs["lose"])):
                raise DeviceError("The device is gone.")
            if "break" in state.verbs and self._may_die(state.job.id, int(state.verbs["break"] or 10**6)):
                return []  # The engine expects an outcome for each job.
        going = [state for state in states if not state.waits()]
        time.sleep(self._step_s if going else IDLE_TURN_S)
        for state in going:
            state.step += 1
        return [None] * len(states)

    def decode(self, states: Sequence[FaultState], *, is_alone: bool = False) -> Iterator[Outcome]:
        """As in `Runner`."""
        for state in states:
            _raise(state.verbs, "decode")
        for state in states:
            self._note("first" if state.goes_on else "end", state.job)
        return iter(
            [
                NotFiniteError("NaN")
                if "nan" in state.verbs
                else FirstPass(None)
                if state.goes_on
                else Picture(np.full((*size_of(state.job), 3), pixel_of(state.job), np.uint8))
                for state in states
            ]
        )


def _raise(verbs: dict[str, str], where: str) -> None:
    kind, _, place = verbs.get("raise", "").partition("@")
    if kind and place == where:
        raise RAISED[kind](f"by {where}")
