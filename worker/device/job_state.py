"""A job on board, and how the next steps of several become one batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Sequence

import torch

from worker.contract.errors import JobError, NotFiniteError, RenderError, first_line
from worker.contract.job import Job
from worker.device.errors import is_out_of_memory
from worker.device.host_copy import Arrival
from worker.device.samplers import SLOTS, Sampler, Schedule
from worker.device.step import Batch
from worker.device.text_encoder import Text


class Check:
    """Whether each job of a step is finite: known at once on a CPU, on a GPU when the step is computed."""

    def __init__(self, finite: torch.Tensor) -> None:
        """`finite`: (jobs,) bool, on the device. On a GPU it is sent for, and not waited for."""
        self._arrival = Arrival(finite)

    @property
    def is_known(self) -> bool:
        """Whether nobody has to wait for the answer."""
        return self._arrival.is_there

    def is_finite(self, place: int) -> bool:
        """Whether the job at `place` is. Waits until the step is computed."""
        return self._answers[place]

    @functools.cached_property
    def _answers(self) -> list[bool]:
        # All at once: for each tensor that becomes a number, a thread has to ask for Python's lock again.
        return self._arrival.wait()[0].tolist()


class JobState:
    """One job on board. Made by `ModelRunner.prepare`, changed by `ModelRunner.step` alone."""

    def __init__(
        self,
        job: Job,
        text: Text,
        conditions: dict[str, torch.Tensor],
        schedule: Schedule,
        sampler: Sampler | None,
        generator: torch.Generator,
        latents: torch.Tensor,
    ) -> None:
        #: The job, with all that it left open filled in.
        self.job = job
        #: Steps done.
        self.step = 0
        #: Steps in all. Some schedulers take more than the job's: PNDM at least one.
        self.steps = len(schedule.timesteps)
        #: One sentence for each thing the caller should know.
        self.warnings = text.warnings
        #: Classifier-free guidance, the job's.
        self.guidance = job.guidance_scale or 0.0
        self._text = text
        self._conditions = conditions
        self._schedule = schedule
        #: For a scheduler that does more than add, itself.
        self._sampler = sampler
        self._generator = generator
        #: Drawn for the present step, which may have to be taken again.
        self._noise: torch.Tensor | None = None
        #: Whether the last step's result is finite, and this job's place in the answer.
        self._check: tuple[Check, int] | None = None
        #: (SLOTS, channels, height, width), float32, on the device; see `Schedule`.
        self._state = latents.new_zeros((SLOTS, *latents.shape))
        self._state[0] = latents
        #: When all of this is there; None: it is.
        self._made: torch.cuda.Event | None = None
        if latents.is_cuda:
            self._depart()

    @property
    def lane(self) -> Hashable:
        """Renders of equal lanes may share a step: the latents' (channels, height, width)."""
        return tuple(self._state.shape[1:])

    @property
    def rows(self) -> int:
        """Rows in the next forward of the UNet: 2 with guidance, else 1."""
        if len(self._text.embeddings) == 1:
            return 1
        return 2 if self.job.guidance_start <= self.step / self.steps < self.job.guidance_stop else 1

    @property
    def latents(self) -> torch.Tensor:
        """(1, channels, height, width) float32, after the steps done so far."""
        return self._state[:1]

    def outcome(
        self, check: Check, place: int, state: torch.Tensor, prediction: torch.Tensor
    ) -> JobError | None:
        """Be a step further, given what the step computed for this job; or be as before, and say why.

        On a GPU `check`, in which this job has `place`, is asked at the next step: till then it is computed.
        """
        before, self._check = self._check, (check, place)
        asked = self._check if check.is_known else before
        try:
            if asked is not None and not asked[0].is_finite(asked[1]):
                raise self._not_finite()
            self._advance(state, prediction)
        except JobError as error:
            return error
        return None

    def failure(self) -> NotFiniteError | None:
        """Why the latents are of no use, if so. Waits until they are computed."""
        if self._check is not None and not self._check[0].is_finite(self._check[1]):
            return self._not_finite()
        return None

    def arrive(self) -> None:
        """Let the current stream wait for what `prepare` set off on another one."""
        if self._made is not None:
            torch.cuda.current_stream().wait_event(self._made)
            self._made = None

    def _depart(self) -> None:
        """Mark all that was made on the current stream as wanted by the steps', which is another one."""
        self._made = torch.cuda.Event()
        self._made.record()
        for tensor in (self._state, self._text.embeddings, self._text.pooled, *self._conditions.values()):
            if tensor is not None:
                # Its memory is not given to others before the steps that read it are done.
                tensor.record_stream(torch.cuda.default_stream(self._state.device))

    def _advance(self, state: torch.Tensor, prediction: torch.Tensor) -> None:
        if self._sampler is not None:
            state = state.clone()
            latents, sampler = self._advanced(self._sampler, prediction)
            if not bool(latents.isfinite().all()):
                raise self._not_finite()
            state[0], self._sampler = latents[0], sampler
        self._state, self._noise = state, None
        self.step += 1

    def _advanced(self, sampler: Sampler, prediction: torch.Tensor) -> tuple[torch.Tensor, Sampler]:
        try:
            return sampler.advance(prediction[None], self._state[:1], self.step)
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise
            raise RenderError(
                f'Scheduler "{self.job.scheduler}" failed at step {self.step + 1} of {self.steps} '
                f"({first_line(error)}): use another scheduler or another number of steps."
            ) from error

    def _not_finite(self) -> NotFiniteError:
        return NotFiniteError(
            f"The latents are no longer finite at step {self.step + 1} of {self.steps}: "
            "try another scheduler, less guidance, or a worker with SMALLCAT_DTYPE=fp32."
        )

    # What this job brings into a batch.

    def _time(self) -> float:
        return self._schedule.timesteps[self.step]

    def _input_scale(self) -> float:
        if self._sampler is None:
            return self._schedule.input_scale[self.step]
        return float(self._sampler.model_input(torch.ones(1, 1, 1, 1), self.step))

    def _weights(self) -> torch.Tensor:
        weights = self._schedule.weights
        # Its own scheduler makes the next state, in `_advance`; the step leaves the one it found.
        return torch.eye(SLOTS, SLOTS + 2) if weights is None else weights[self.step]

    def _fresh_noise(self) -> torch.Tensor | None:
        """Noise for the present step, the same however often it is asked for; None: it takes none."""
        if self._noise is None and self._schedule.draws and self._schedule.draws[self.step]:
            self._noise = torch.randn((1, *self._state.shape[1:]), generator=self._generator)[0]
        return self._noise

    def _prompted(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of the job's rows that the next step has: a guided job's own prompt is its second."""
        return rows[-self.rows :]


def batch_of(renders: Sequence[JobState]) -> Batch:
    """The next step of `renders`, of one lane and none of them done, as tensors on their device."""
    device = renders[0]._state.device
    for render in renders:
        render.arrive()
    jobs, rows = len(renders), [render.rows for render in renders]
    ends = list(itertools.accumulate(rows))
    first, last = [end - count for end, count in zip(ends, rows, strict=True)], [end - 1 for end in ends]
    owner = [place for place in range(jobs) for _ in range(rows[place])]
    weights = torch.stack([render._weights() for render in renders])
    scales = [render._input_scale() for render in renders]
    guidance = [render.guidance for render in renders]
    times = [renders[place]._time() for place in owner]
    # Many small things, few transfers.
    numbers = _sent(torch.cat([weights.flatten(), torch.tensor(scales + guidance + times)]), device)
    weights, input_scale, guided, time_of_row = numbers.split([weights.numel(), jobs, jobs, len(owner)])
    places = _sent(torch.tensor(first + last + owner), device)
    without, prompted, job_of_row = places.split([jobs, jobs, len(owner)])
    return Batch(
        states=torch.stack([render._state for render in renders]),
        noise=_noise_of(renders, device),
        weights=weights.view(jobs, SLOTS, SLOTS + 2),
        input_scale=input_scale,
        guidance=guided,
        without=without,
        prompted=prompted,
        job_of_row=job_of_row,
        times=time_of_row,
        text=torch.cat([render._prompted(render._text.embeddings) for render in renders]),
        conditions={
            name: torch.cat([render._prompted(render._conditions[name]) for render in renders])
            for name in renders[0]._conditions
        },
    )


def _noise_of(renders: Sequence[JobState], device: torch.device) -> torch.Tensor:
    """(jobs, channels, height, width): what the steps draw, zeros where they draw none."""
    drawn = [render._fresh_noise() for render in renders]
    shape = renders[0]._state.shape[1:]
    if all(noise is None for noise in drawn):
        return torch.zeros((len(renders), *shape), device=device)
    return _sent(torch.stack([torch.zeros(shape) if noise is None else noise for noise in drawn]), device)


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on the device, without waiting for it to be there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
