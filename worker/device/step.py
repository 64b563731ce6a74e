"""One denoising step of a batch, as one pure function of tensors: what a CUDA graph can hold.

    state ─► latents ─► rows ─► model ─► guidance ─► weights x (state, prediction, noise) ─► state

The jobs of a batch differ in everything but their lane (`worker.device.family`): each brings its own text,
timestep, guidance and the numbers of its own scheduler's step (`worker.device.schedulers.samplers`). J is the
number of jobs, R that of rows: a job has a row for its prompt, one for each prompt that AND composes, and
one more with guidance. `*shape` is that of a job's latents. P is the most prompts that a job of the batch
has, as a power of 2.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from worker.device.loras.job_set import LoraSet, RowLoras
from worker.device.schedulers.schedule import SLOTS, Mix
from worker.device.text.job_text import TEXT_BIAS, Row, batched


class Forward(Protocol):
    """The model: see `worker.device.family.ModelFamily.forward`."""

    def __call__(
        self,
        latents: torch.Tensor,
        times: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
        *,
        prompted: torch.Tensor,
        job_of_row: torch.Tensor,
        loras: RowLoras | None = None,
    ) -> torch.Tensor:
        """The output for each row, (R, *shape) float32."""


#: The mix of latents without noise.
CLEAN: Mix = (1.0, 0.0)


@dataclass(frozen=True)
class Kept:
    """What a job with a mask keeps of its image in a step."""

    #: (3, *shape) float32, on the device: 1 where it draws and 0 where it keeps; the image's latents; noise.
    tensors: torch.Tensor
    #: How noisy the latents after the step are: what those of the image and the noise are multiplied with.
    mix: Mix


@dataclass(frozen=True)
class StepInputs:
    """What one job brings to its next step."""

    #: (SLOTS, *shape) float32, on the device: the latents, and what the scheduler keeps from step to step.
    state: torch.Tensor
    #: (*shape) float32, on the CPU: noise drawn for this step; None: the step adds none.
    noise: torch.Tensor | None
    #: (SLOTS, SLOTS + 2) float32, on the CPU: see `worker.device.schedulers.schedule.Schedule.weights`.
    weights: torch.Tensor
    #: What the latents are multiplied with to be the model's input.
    input_scale: float
    #: How far each prompt moves the prediction: the scale of guidance times the prompt's own weight. From the
    #: row without a prompt where `is_guided`, else from that of the first prompt.
    guidance: Sequence[float]
    #: Whether the first row is the one without a prompt.
    is_guided: bool
    #: How far the guided prediction is scaled back to the deviation of the first prompt's, 0 to 1.
    rescale: float
    #: Timestep of the scheduler.
    time: float
    #: The text of each row, on the device.
    texts: Sequence[Row]
    #: What the model takes besides, by name: (rows, ...) each, on the device.
    conditions: Mapping[str, torch.Tensor]
    #: What its LoRAs change of the model; None: nothing.
    loras: LoraSet | None = None
    #: What it keeps of the image that it begins with; None: nothing.
    kept: Kept | None = None

    @property
    def rows(self) -> int:
        """Rows in the forward."""
        return len(self.texts)


@dataclass(frozen=True)
class Batch:
    """What a step takes, on the device. All but the conditions and the indices is float32."""

    #: (J, SLOTS, *shape): the latents, and what the scheduler keeps from step to step.
    states: torch.Tensor
    #: (J, *shape): fresh noise; zeros where a step adds none.
    noise: torch.Tensor
    #: (J, SLOTS, SLOTS + 2): see `worker.device.schedulers.schedule.Schedule.weights`.
    weights: torch.Tensor
    #: (J,): what the latents are multiplied with to be the model's input.
    input_scale: torch.Tensor
    #: (J, P): how far each prompt of a job moves the prediction; 0 where it has fewer prompts.
    guidance: torch.Tensor
    #: (J,) int64: each job's row without its prompt; without guidance that of its first prompt.
    without: torch.Tensor
    #: (J, P) int64: the rows of its prompts; where it has fewer, the row before.
    prompted: torch.Tensor
    #: (R,) int64: the job that each row belongs to.
    job_of_row: torch.Tensor
    #: (R,) float32: timesteps.
    times: torch.Tensor
    #: What the model takes besides, by name: (R, ...) each.
    conditions: dict[str, torch.Tensor]
    #: (J,): how far each job's guidance is rescaled; None where that of none is.
    rescale: torch.Tensor | None = None
    #: (J, 3, *shape) and (J, 2): what each job keeps of its image (`Kept`); of one without a mask ones and
    #: zeros. None where no job has a mask.
    kept: torch.Tensor | None = None
    mixes: torch.Tensor | None = None
    #: The LoRAs of the jobs; None where no job has one.
    loras: RowLoras | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All of them, always in the same order."""
        named = [getattr(self, field.name) for field in dataclasses.fields(self)[:-5]]
        named += [self.conditions[name] for name in sorted(self.conditions)]
        named += [each for each in (self.rescale, self.kept, self.mixes) if each is not None]
        return named if self.loras is None else [*named, self.loras.table, self.loras.room]

    @property
    def kind(self) -> str:
        """What differs in shape between batches of one lane and size, for log and metrics: `77 tokens`."""
        tokens = max((each.shape[1] for each in self.conditions.values() if each.ndim == 3), default=0)
        prompts = self.prompted.shape[1]
        parts = [f"{tokens} tokens", *([f"{prompts} prompts"] if prompts > 1 else [])]
        parts += ["some hidden"] if TEXT_BIAS in self.conditions else []
        parts += ["some rescaled"] if self.rescale is not None else []
        return ", ".join(parts if self.loras is None else [*parts, self.loras.kind])

    def unmasked(self) -> Batch:
        """The same without what jobs keep of their images."""
        return dataclasses.replace(self, kept=None, mixes=None)

    def zeros(self, jobs: int, rows: int) -> Batch:
        """A batch of `jobs` and `rows` with tensors of these shapes and dtypes, all zeros."""

        def zeros(tensor: torch.Tensor, count: int) -> torch.Tensor:
            return tensor.new_zeros((count, *tensor.shape[1:]))

        of_jobs = ("states", "noise", "weights", "input_scale", "guidance", "without", "prompted")
        return Batch(
            **{name: zeros(getattr(self, name), jobs) for name in of_jobs},
            job_of_row=zeros(self.job_of_row, rows),
            times=zeros(self.times, rows),
            conditions={name: zeros(tensor, rows) for name, tensor in self.conditions.items()},
            rescale=None if self.rescale is None else zeros(self.rescale, jobs),
            kept=None if self.kept is None else zeros(self.kept, jobs),
            mixes=None if self.mixes is None else zeros(self.mixes, jobs),
            loras=None if self.loras is None else self.loras.zeros(jobs),
        )


@dataclass(frozen=True)
class Step:
    """What a step gives."""

    #: (J, SLOTS, *shape): the states after it.
    states: torch.Tensor
    #: (J, *shape) float32: the guided prediction, for schedulers that are not linear.
    predictions: torch.Tensor
    #: (J,) bool: whether state and prediction are finite throughout.
    finite: torch.Tensor


#: The fields of a `Step`, as a plain tuple for the compiler.
Fields = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def denoise(forward: Forward, batch: Batch) -> Fields:
    """The step of `batch`."""
    return with_kept(denoise_all(forward, batch), batch)


def denoise_all(forward: Forward, batch: Batch) -> Fields:
    """The step of `batch` as if no job kept anything of its image: what is compiled."""
    scaled = batch.states[:, 0] * _for_each(batch.input_scale, batch.noise)
    # A family that takes no LoRAs needs no argument for them.
    loras = {} if batch.loras is None else {"loras": batch.loras}
    output = forward(
        scaled[batch.job_of_row],
        batch.times,
        batch.conditions,
        prompted=batch.prompted[:, 0],
        job_of_row=batch.job_of_row,
        **loras,
    )
    # Ho and Salimans (2022), equation 6, in the parametrisation of Saharia et al. (2022); for several prompts
    # Liu et al. (2022), equation 11. A job's rows alone are added: what is not finite stays its own.
    without = output[batch.without]
    moves = output[batch.prompted] - without[:, None]
    predictions = without + (_for_each(batch.guidance, moves) * moves).sum(1)
    if batch.rescale is not None:
        predictions = _rescaled(predictions, output[batch.prompted[:, 0]], batch.rescale)
    sources = torch.cat([batch.states, predictions[:, None], batch.noise[:, None]], dim=1)
    states = torch.bmm(batch.weights, sources.flatten(2)).view(batch.states.shape)
    finite = (states.isfinite().flatten(1).all(1)) & (predictions.isfinite().flatten(1).all(1))
    return states, predictions, finite


def with_kept(step: Fields, batch: Batch) -> Fields:
    """The step of `batch`, from what `denoise_all` gave for it, with what jobs keep of their images."""
    if batch.kept is None or batch.mixes is None:
        return step
    states, predictions, finite = step
    latents = blended(states[:, 0], batch.kept, _for_each(batch.mixes, batch.kept[:, :2]))
    return torch.cat([latents[:, None], states[:, 1:]], dim=1), predictions, finite


def blended(latents: torch.Tensor, kept: torch.Tensor, mixes: torch.Tensor) -> torch.Tensor:
    """Latents after a step, (J, *shape), with those of the images, as noisy as they are, where these stay.

    `kept`: (J, 3, *shape), see `Kept`. `mixes`: (J, 2, ...). As diffusers' inpainting pipelines, for models
    that know no masks. A job that keeps nothing has its own to the bit.
    """
    noisy = (mixes * kept[:, 1:]).sum(1)
    return torch.where(kept[:, 0] > 0, latents, noisy)


def _rescaled(predictions: torch.Tensor, prompted: torch.Tensor, rescale: torch.Tensor) -> torch.Tensor:
    """Guided predictions with the deviation of those for the prompt, by each job's share `rescale`.

    Lin et al. (2024), equations 15 and 16; diffusers' `rescale_noise_cfg`. A job whose share is 0 keeps its
    own to the bit.
    """
    axes = list(range(1, predictions.ndim))
    factor = prompted.std(dim=axes, keepdim=True) / predictions.std(dim=axes, keepdim=True)
    share = _for_each(rescale, predictions)
    rescaled = share * (predictions * factor) + (1 - share) * predictions
    return torch.where(share > 0, rescaled, predictions)


def _for_each(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """(J,) or (J, P) values in a shape in which each multiplies its own latents, (J, *shape) or with P."""
    return values.view(*values.shape, *[1] * (latents.ndim - values.ndim))


def batch_of(jobs: Sequence[StepInputs]) -> Batch:
    """The inputs of at least one job, all of one lane, as one batch on their device."""
    device = jobs[0].state.device
    rows = [job.rows for job in jobs]
    first = [end - count for end, count in zip(itertools.accumulate(rows), rows, strict=True)]
    owners = [index for index, count in enumerate(rows) for _ in range(count)]
    slots = 1 << (max(len(job.guidance) for job in jobs) - 1).bit_length()
    prompted, guidance = [], []
    for job, start in zip(jobs, first, strict=True):
        unused = [start] * (slots - len(job.guidance))
        prompted += [*range(start + job.is_guided, start + job.rows), *unused]
        guidance += [*job.guidance, *[0.0] * len(unused)]
    weights = torch.stack([job.weights for job in jobs])
    scales = [job.input_scale for job in jobs]
    rescale = torch.tensor([job.rescale for job in jobs])
    times = [jobs[owner].time for owner in owners]
    # Many small values, few transfers.
    numbers = _to_device(torch.cat([weights.flatten(), torch.tensor(scales + guidance + times)]), device)
    all_weights, input_scale, guidance_scale, time_of_row = numbers.split(
        [weights.numel(), len(jobs), len(guidance), len(owners)]
    )
    indices = _to_device(torch.tensor(first + prompted + owners), device)
    without, prompted_rows, job_of_row = indices.split([len(jobs), len(prompted), len(owners)])
    texts = batched([row for job in jobs for row in job.texts])
    return Batch(
        states=torch.stack([job.state for job in jobs]),
        noise=_noise_of(jobs, device),
        weights=all_weights.view(len(jobs), SLOTS, SLOTS + 2),
        input_scale=input_scale,
        guidance=guidance_scale.view(len(jobs), slots),
        without=without,
        prompted=prompted_rows.view(len(jobs), slots),
        job_of_row=job_of_row,
        times=time_of_row,
        conditions=texts
        | {name: torch.cat([job.conditions[name] for job in jobs]) for name in jobs[0].conditions},
        rescale=_to_device(rescale, device) if rescale.any() else None,
        **_kept_of(jobs, device),
        loras=RowLoras.of([job.loras for job in jobs]),
    )


def _kept_of(jobs: Sequence[StepInputs], device: torch.device) -> dict[str, torch.Tensor]:
    """The fields of a `Batch` about what the jobs keep of their images."""
    if all(job.kept is None for job in jobs):
        return {}
    nothing = jobs[0].state.new_zeros((3, *jobs[0].state.shape[1:]))
    nothing[0] = 1.0
    mixes = torch.tensor([(0.0, 0.0) if job.kept is None else job.kept.mix for job in jobs])
    kept = torch.stack([nothing if job.kept is None else job.kept.tensors for job in jobs])
    return {"kept": kept, "mixes": _to_device(mixes, device)}


def _noise_of(jobs: Sequence[StepInputs], device: torch.device) -> torch.Tensor:
    """(J, *shape): the noise of each job, zeros where it has none."""
    drawn, shape = [job.noise for job in jobs], jobs[0].state.shape[1:]
    if all(noise is None for noise in drawn):
        return torch.zeros((len(jobs), *shape), device=device)
    noises = [torch.zeros(shape) if noise is None else noise for noise in drawn]
    return _to_device(torch.stack(noises), device)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on the device, without waiting for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
