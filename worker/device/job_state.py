"""A job in flight: its tensors on the device, and how far it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from worker.contract.choices import Upscaler
from worker.contract.errors import JobError, NotFiniteError, RenderError, SmallcatError, first_line
from worker.contract.job import Job
from worker.device.beginnings import Beginning, FirstLatents
from worker.device.errors import is_out_of_memory
from worker.device.family import Lane
from worker.device.host_copy import HostCopy
from worker.device.loras.job_set import LoraSet
from worker.device.schedulers.schedule import SLOTS, Sampler, Schedule
from worker.device.schedulers.step_noise import StepNoise
from worker.device.step import CLEAN, Kept, StepInputs, blended
from worker.device.text.job_text import JobText
from worker.device.vae.decoder import VaeDecoder
from worker.engine.runner import FirstPass, Outcome, Picture


class FiniteCheck:
    """Whether each job of a step is finite. On a CPU known at once, on a GPU when the step is computed."""

    def __init__(self, finite: torch.Tensor) -> None:
        """`finite`: (jobs,) bool, on the device. On a GPU its copy is begun, and not waited for."""
        self._copy = HostCopy(finite)

    @property
    def is_known(self) -> bool:
        """Whether `is_finite` returns at once."""
        return self._copy.is_complete

    def is_finite(self, index: int) -> bool:
        """Whether the job of this index in the step is finite. Waits until the step is computed."""
        return self._values[index]

    @functools.cached_property
    def _values(self) -> list[bool]:
        # All at once: for each tensor that becomes a number, a thread has to ask for Python's lock again.
        return self._copy.wait()[0].tolist()


class JobState:
    """One job in flight. Made by `ModelRunner.prepare`, changed by `ModelRunner.step` alone."""

    def __init__(
        self,
        job: Job,
        lane: Lane,
        text: JobText,
        conditions: Mapping[str, torch.Tensor],
        schedule: Schedule,
        sampler: Sampler | None,
        generator: torch.Generator,
        beginning: Beginning,
    ) -> None:
        """All tensors are on the device; those made there may still be at work on the current stream.

        The job is guided if `text` has a negative prompt. `conditions`: what the model takes beside it,
        (rows, ...) each, for as many rows as the job may have, all equal.
        `sampler`: for a schedule without weights. `generator` draws the noise that is left to draw.
        """
        rows = len(text.prompts) + (text.negative is not None)
        seen = {name: each.expand(rows, *each.shape[1:]) for name, each in beginning.seen.items()}
        #: The job, with every field filled in; of a second pass as `beginnings.pass_of` has it.
        self.job = job
        #: Jobs of equal lanes may share a step.
        self.lane = lane
        #: Steps done: evaluations of the model.
        self.step = 0
        #: Steps in all. Some schedulers take more than the job's: PNDM at least one, Heun nearly twice as
        #: many.
        self.steps = len(schedule.timesteps)
        #: One sentence for each thing the caller should know.
        self.warnings = (*text.warnings, *beginning.warnings)
        #: What makes pixels of its latents, where it has a VAE of its own; None: the model's.
        self.decoder: VaeDecoder | None = None
        #: What its LoRAs change of the model; None: nothing.
        self.loras: LoraSet | None = None
        self._text = text
        self._conditions = {**conditions, **seen}
        self._schedule = schedule
        #: For a scheduler that is not linear, the scheduler itself.
        self._sampler = sampler
        self._beginning, latents = beginning, beginning.latents
        self._noise_of_steps = StepNoise(schedule, generator, latents.shape)
        #: Drawn for the present step, which may have to be run again.
        self._noise: torch.Tensor | None = None
        #: Whether the last step's result is finite: the check, and this job's index in it.
        self._check: tuple[FiniteCheck, int] | None = None
        #: (SLOTS, *shape), float32, on the device; see `Schedule`.
        self._state = latents.new_zeros((SLOTS, *latents.shape))
        self._state[0] = latents
        #: Recorded when all tensors above are made; None: nobody has to wait for them.
        self._prepared: torch.cuda.Event | None = None
        if latents.is_cuda:
            self._record_prepared()

    @property
    def rows(self) -> int:
        """Rows in the next forward of the model: one for each prompt, and one more with guidance."""
        return len(self._text.prompts) + self._is_guided

    @property
    def text_tokens(self) -> int:
        """Tokens of the longest text in the next forward."""
        return self._text.tokens(self.step)

    @property
    def lora_rows(self) -> int:
        """How many of its rows have LoRAs: all or none."""
        return self.rows if self.loras is not None else 0

    @property
    def _is_guided(self) -> bool:
        if self._text.negative is None:
            return False
        return self.job.guidance_start <= self.step / self.steps < self.job.guidance_stop

    @property
    def latents(self) -> torch.Tensor:
        """(1, *shape) float32, after the steps done so far."""
        return self._state[:1]

    def scaled_latents(self) -> tuple[torch.Tensor, float]:
        """The latents after the steps done so far, (*shape) float32, and the scale of the model's input.

        Together they have about the variance of finished latents, whatever the scheduler. May be called from
        any thread: a step makes another tensor, and leaves this one as it is.
        """
        state, step = self._state, self.step
        if step >= self.steps:
            return state[0], 1.0
        if self._sampler is None:
            return state[0], self._schedule.input_scale[step]
        return state[0], float(self._sampler.model_input(torch.ones(1, 1), step))

    def next_inputs(self) -> StepInputs:
        """What this job brings to its next step. It must not be done.

        May be called again for the same step, with the same result. On a GPU the current stream waits until
        the job is prepared.
        """
        if self._prepared is not None:
            torch.cuda.current_stream().wait_event(self._prepared)
            self._prepared = None
        weights, is_guided = self._schedule.weights, self._is_guided
        texts = self._text.rows(self.step, guided=is_guided)
        scale = (self.job.guidance_scale or 0.0) if is_guided else 1.0
        return StepInputs(
            state=self._state,
            noise=self._step_noise(),
            # A scheduler that is not linear makes the next state, in `_advance`: the step keeps the old one.
            weights=torch.eye(SLOTS, SLOTS + 2) if weights is None else weights[self.step],
            input_scale=self._input_scale(),
            guidance=[scale * weight for weight in self._text.weights],
            is_guided=is_guided,
            rescale=self.job.guidance_rescale if is_guided else 0.0,
            time=self._schedule.timesteps[self.step],
            texts=texts,
            conditions={name: tensor[: len(texts)] for name, tensor in self._conditions.items()},
            loras=self.loras,
            kept=self._kept(),
        )

    @property
    def goes_on(self) -> bool:
        """Whether another pass follows this one."""
        return self.job.upscale > 1

    def first_latents(self) -> FirstPass | None:
        """What the second pass begins with, once this one is done; None: with a picture, or there is none."""
        if not self.goes_on or self.job.upscaler is not Upscaler.LATENT:
            return None
        return FirstPass(FirstLatents(self.lane, self.latents[0]))

    def finished(self, outcome: Picture | SmallcatError) -> Outcome:
        """What comes of the job: its picture as it was decoded, with which another pass may begin."""
        return FirstPass(outcome) if isinstance(outcome, Picture) and self.goes_on else outcome

    def advance(
        self, check: FiniteCheck, index: int, state: torch.Tensor, prediction: torch.Tensor
    ) -> JobError | None:
        """Take the result of a step: `state` and `prediction`, as in `Step`. Returns the error, if any.

        After an error the job is as it was before the step. This job has `index` in `check`, which on a GPU
        is read at the next step, because its value is known by then.
        """
        before, self._check = self._check, (check, index)
        due = self._check if check.is_known else before
        try:
            if due is not None and not due[0].is_finite(due[1]):
                raise self._not_finite()
            self._advance(state, prediction)
        except JobError as error:
            return error
        return None

    def as_now(self) -> Callable[[], None]:
        """What undoes an `advance`: called, it makes the job as it is now."""
        kept = self._state, self._noise, self._sampler, self._check, self.step

        def undo() -> None:
            self._state, self._noise, self._sampler, self._check, self.step = kept

        return undo

    def failure(self) -> NotFiniteError | None:
        """The error, if the latents are not finite. Waits until they are computed."""
        if self._check is not None and not self._check[0].is_finite(self._check[1]):
            return self._not_finite()
        return None

    def _record_prepared(self) -> None:
        """Let the stream of the steps, which is another one, know when this job's tensors are made."""
        self._prepared = torch.cuda.Event()
        self._prepared.record()
        kept = [] if self._beginning.kept is None else [self._beginning.kept]
        for tensor in (self._state, *kept, *self._conditions.values(), *self._text.tensors()):
            # Its memory is not given to others before the steps that read it are done.
            tensor.record_stream(torch.cuda.default_stream(self._state.device))

    def _advance(self, state: torch.Tensor, prediction: torch.Tensor) -> None:
        if self._sampler is not None:
            state = state.clone()
            latents, sampler = self._sampler_step(self._sampler, prediction)
            latents = self._with_kept(latents, sampler)
            if not bool(latents.isfinite().all()):
                raise self._not_finite()
            state[0], self._sampler = latents[0], sampler
        self._state, self._noise = state, None
        self.step += 1

    def _kept(self) -> Kept | None:
        """What the step keeps of the image. Where the sampler makes the next state, `_with_kept` does it."""
        if self._beginning.kept is None or self._sampler is not None:
            return None
        is_last = self.step + 1 == self.steps
        return Kept(self._beginning.kept, CLEAN if is_last else self._schedule.mixes[self.step + 1])

    def _with_kept(self, latents: torch.Tensor, sampler: Sampler) -> torch.Tensor:
        """Latents after the present step, (1, *shape), with what is kept of the image; `sampler` is, too."""
        if (kept := self._beginning.kept) is None:
            return latents
        mix = CLEAN if self.step + 1 == self.steps else sampler.mix(self.step + 1)
        mixes = latents.new_tensor(mix).view(1, 2, *[1] * (latents.ndim - 1))
        return blended(latents, kept[None], mixes)

    def _sampler_step(self, sampler: Sampler, prediction: torch.Tensor) -> tuple[torch.Tensor, Sampler]:
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
        loras = ", ".join(f'"{each.name}"' for each in self.job.loras)
        less = f"less weight of the LoRAs ({loras}), " if loras else ""
        return NotFiniteError(
            f"The latents are no longer finite at step {self.step + 1} of {self.steps}: "
            f"try {less}another scheduler, less guidance, or a worker with SMALLCAT_DTYPE=fp32."
        )

    def _input_scale(self) -> float:
        if self._sampler is None:
            return self._schedule.input_scale[self.step]
        return float(self._sampler.model_input(torch.ones(1, 1), self.step))

    def _step_noise(self) -> torch.Tensor | None:
        """Noise for the present step, the same however often it is asked for; None: it adds none."""
        if self._noise is None:
            self._noise = self._noise_of_steps.of(self.step)
        return self._noise
