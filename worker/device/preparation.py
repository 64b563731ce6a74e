"""Makes jobs ready for the first step of a pass: text and image encoded, noise drawn, schedule made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from worker.contract.errors import InvalidJobError
from worker.contract.job import Job
from worker.device import beginnings
from worker.device.errors import mapped
from worker.device.family import Lane, ModelFamily
from worker.device.job_state import JobState
from worker.device.loras.cache import Loras
from worker.device.schedulers.samplers import Samplers
from worker.device.schedulers.schedule import Sampler, Schedule
from worker.device.text.embeddings import Files
from worker.device.text.encoder import TextEncoder
from worker.device.vae.encoder import VaeEncoder
from worker.device.vae.vaes import Vae, Vaes
from worker.engine.runner import FirstPass, JobInputs


class Preparation:
    """Prepares jobs of one model, on any number of threads at the same time.

    On a GPU it works on a stream beside that of the steps, and before it where both have work.
    """

    def __init__(
        self,
        family: ModelFamily,
        device: torch.device,
        files: Files | None,
        loras: Loras,
        encoder: VaeEncoder,
        vae_of: Callable[[ModelFamily], Vae],
    ) -> None:
        """`files`: those beside the model that jobs may name. `encoder`: of the model's own VAE.

        `vae_of`: makes both ways through another one.
        """
        self._family, self._device, self._loras = family, device, loras
        self._samplers = Samplers(family.schedulers)
        self._texts = TextEncoder(family, files)
        self._encoder = encoder
        self._vaes = Vaes(files, family, vae_of)
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def state_of(self, whole: Job, inputs: JobInputs | FirstPass | None) -> JobState:
        """The pass of `whole`, a resolved job, that begins with `inputs`.

        Raises as `ModelRunner.prepare`.
        """
        job = beginnings.pass_of(whole, inputs)
        beginnings.check(job, inputs)
        if job.upscale > 1:
            self._check_second(job)
        assert job.steps  # noqa: S101 - resolved, which mypy cannot know
        assert job.guidance_scale is not None  # noqa: S101
        lane, (schedule, sampler, generator) = self._plan(job)
        rows = self._family.rows(job.guidance_scale)
        with mapped("load the VAE"):
            vae = self._vaes.of(job)
        with mapped("encode the image"), self._beside():
            # Before anything else is drawn for the job.
            encoder = vae.encoder if vae else self._encoder
            beginning = beginnings.begin(encoder, lane, job, inputs, schedule, sampler, generator)
        with mapped("load the LoRAs"), self._beside():
            loras = self._loras.of(job)
        with mapped("encode the prompt"), self._beside():
            steps = _counted(job.steps, schedule)
            done = (whole.steps or 0) * schedule.order if isinstance(inputs, FirstPass) else 0
            if done:
                steps = len(schedule.timesteps)
            text = self._texts.encode(job, steps, done, guided=rows == 2, loras=loras.texts)
            conditions = self._family.conditions(job, len(text.prompts) + rows - 1)
            beginning = beginning.on(self._device)
            state = JobState(job, lane, text, conditions, schedule, sampler, generator, beginning)
        state.decoder, state.loras = vae.decoder if vae else None, loras.unet
        state.warnings += loras.warnings(job)
        return state

    def _plan(self, job: Job) -> tuple[Lane, tuple[Schedule, Sampler | None, torch.Generator]]:
        """The lane of a job of one pass, its schedule, and what goes with that. Raises `InvalidJobError`."""
        assert job.width and job.height and job.steps  # noqa: S101, PT018 - resolved, which mypy cannot know
        multiple = self._family.size_multiple
        if job.width % multiple or job.height % multiple:
            raise InvalidJobError(
                f"The size is {job.width} x {job.height}, but this model's sizes are multiples of {multiple}."
            )
        lane = self._family.lane(job.width, job.height)
        return lane, self._samplers.of(job, self._family.timestep_options(lane, job.steps))

    def _check_second(self, job: Job) -> None:
        """Refuse now what the second pass of a job could not do. Raises `InvalidJobError`."""
        try:
            self._plan(beginnings.pass_of(job, FirstPass(None)))
        except InvalidJobError as error:
            raise InvalidJobError(f"In the second pass: {error}") from None

    def _beside(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()


def _counted(steps: int, schedule: Schedule) -> int:
    """Steps as AUTOMATIC1111 counts them, who has two for each step of a scheduler of second order."""
    if schedule.order > 1:
        return steps * schedule.order
    return schedule.skipped + len(schedule.timesteps)
