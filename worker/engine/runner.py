"""What the engine asks of a device. `worker.device.model_runner` implements it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from worker.contract.errors import SmallcatError
from worker.contract.job import Job
from worker.engine.batcher import Costs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Picture:
    """A decoded picture in the host's memory."""

    #: (height, width, 3) uint8 RGB.
    pixels: NDArray[np.uint8]
    #: The safety checker's verdict; None: the model has none, or it is off.
    nsfw: bool | None = None
    #: What the caller should know of how it was decoded.
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobInputs:
    """The pictures that a job begins with, at the job's size, in the host's memory; nobody changes them.

    With `padding` they are of the part of the image that is drawn.
    """

    #: (height, width, 3) uint8 RGB, turned as it is seen, on white where it was transparent.
    image: NDArray[np.uint8]
    #: (height, width) uint8: 255 where the image is to be drawn, 0 where it stays, as the mask's file or the
    #: image's alpha channel says: with neither blur nor threshold. None: all of it is drawn.
    mask: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class FirstPass:
    """What a job's first pass gave: its second one begins with it."""

    #: Latents or pixels: the runner's own.
    result: Any


#: What comes of a job's last step: with a first pass, the job goes on in another lane.
Outcome = Picture | FirstPass | SmallcatError


class JobState(Protocol):
    """What a runner keeps of a job that is in flight."""

    @property
    def lane(self) -> Hashable:
        """Jobs of equal lanes may share a step."""

    @property
    def rows(self) -> int:
        """Rows in the next forward of the model: one for each prompt, and one more with guidance."""

    @property
    def text_tokens(self) -> int:
        """Tokens of the longest text in the next forward; 0 where the model has none."""

    @property
    def lora_rows(self) -> int:
        """How many of its rows have LoRAs: all or none."""

    @property
    def step(self) -> int:
        """Steps of the model done."""

    @property
    def steps(self) -> int:
        """Steps of the model in total, each of which costs a forward.

        Some schedulers take more than the job asks for: Heun and its kind evaluate the model twice a step.
        """

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the caller should know although the picture is fine."""


StateT = TypeVar("StateT", bound=JobState)


class Sizes(Protocol):
    """How many rows the steps of a device have. That may change while it serves."""

    @property
    def max_rows(self) -> int:
        """The cap of a step of the model's default size, in rows, >= 1."""

    @property
    def most_rows(self) -> int:
        """The same while many jobs wait, >= `max_rows`."""

    @property
    def job_s(self) -> float:
        """Seconds of the device's time for a job of the model's defaults, in full batches, > 0."""


class Runner(Costs, Sizes, Protocol[StateT]):
    """Runs the model on one device.

    Each method may raise a `MachineError`, which ends the engine; `OutOfMemoryError` is the exception: then
    the engine tries again with fewer jobs.
    """

    @property
    def decodes_beside(self) -> bool:
        """Whether `decode` may run on another thread while `step` runs, and gains by it."""

    @property
    def is_compiling(self) -> bool:
        """Whether something compiles or is captured, so that a step may take minutes."""

    def prepare(self, job: Job, inputs: JobInputs | FirstPass | None = None) -> StateT:
        """Encode the text and draw the noise, and `inputs` where the job has an image.

        With a `FirstPass` it is the job's second pass, with a lane and steps of its own. An error is this
        job's alone. Called on any thread.
        """

    def step(self, states: Sequence[StateT]) -> list[SmallcatError | None]:
        """Run one step of jobs of one lane, none of them finished.

        Returns each job's error, or None for one that is a step further. A job with an error is unchanged. If
        this raises, all are unchanged.
        """

    def decode(self, states: Sequence[StateT], *, is_alone: bool = False) -> Iterator[Outcome]:
        """Start to decode finished jobs, of any lanes.

        Returns their pictures or errors, in order; of a job whose second pass is to come the first. The
        iterator waits for each one, and may be read on any one thread. `is_alone`: nothing runs beside it, so
        that what does not fit in memory now never does, whole.
        """
