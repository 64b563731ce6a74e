"""What the engine asks of what computes: `worker.device.model_runner` is the real one."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from worker.contract.errors import SmallcatError
from worker.contract.job import Job
from worker.engine.batcher import Costs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Picture:
    """A decoded picture, off the device."""

    #: (height, width, 3) uint8 RGB.
    pixels: NDArray[np.uint8]
    #: The safety checker's verdict; None: the model has none, or it is off.
    nsfw: bool | None = None


#: What becomes of a finished job.
Outcome = Picture | SmallcatError


class JobState(Protocol):
    """A job on board, as its runner keeps it."""

    @property
    def lane(self) -> Hashable:
        """Renders of equal lanes may share a step."""

    @property
    def rows(self) -> int:
        """Rows in the next forward of the UNet: 2 with guidance, 1 without."""

    @property
    def step(self) -> int:
        """Steps done."""

    @property
    def steps(self) -> int:
        """Steps in all; some schedulers take more than the job's."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the caller should know although the picture is fine."""


R = TypeVar("R", bound=JobState)


class Runner(Costs, Protocol[R]):
    """What computes. See `worker.device.model_runner.ModelRunner`."""

    @property
    def max_rows(self) -> int:
        """Rows worth having in one step of the size most jobs have."""

    @property
    def job_s(self) -> float:
        """Seconds of the device's time for the steps of a job of the model's defaults, in full batches."""

    @property
    def decodes_beside(self) -> bool:
        """Whether `decode` may run on another thread while `step` does, and gains by it."""

    def prepare(self, job: Job) -> R:
        """Encode the text, draw the noise. Raises for this job alone. Called on any thread."""

    def step(self, renders: Sequence[R]) -> list[SmallcatError | None]:
        """Run one step of renders of one lane. Those whose outcome is an error are as they were before."""

    def decode(self, renders: Sequence[R]) -> Iterator[Outcome]:
        """Set off the decoding of finished renders.

        Returns their pictures, or errors, in order. Each is waited for when it is asked for, on any one
        thread.
        """
