"""One denoising step of a batch, as one pure function of tensors: what a CUDA graph can hold.

    state ─► latents ─► rows ─► UNet ─► guidance ─► weights x (state, prediction, noise) ─► state

Jobs in a batch differ in everything but their latents' shape: each brings its own text, timestep, guidance
and the numbers of its own scheduler's step (`samplers`). J is the number of jobs, R that of rows: a
job has two rows with guidance and one without, in any order.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Batch:
    """What a step takes. Sampler arithmetic is float32, `text` and `conditions` are of the model's dtype."""

    #: (J, SLOTS, channels, height, width): the latents, and what the scheduler remembers.
    states: torch.Tensor
    #: (J, channels, height, width): fresh noise; zeros where a step draws none.
    noise: torch.Tensor
    #: (J, SLOTS, SLOTS + 2): see `worker.device.samplers.Schedule.weights`.
    weights: torch.Tensor
    #: (J,): what the latents are multiplied with before the UNet sees them.
    input_scale: torch.Tensor
    #: (J,): classifier-free guidance; of no effect where both rows are the same.
    guidance: torch.Tensor
    #: (J,) int64: each job's row without its prompt, and with it; the same row without guidance.
    without: torch.Tensor
    prompted: torch.Tensor
    #: (R,) int64: whose latents each row has.
    job_of_row: torch.Tensor
    #: (R,) float32: timesteps.
    times: torch.Tensor
    #: (R, tokens, width).
    text: torch.Tensor
    #: What the UNet takes besides, (R, width) each, by name; see `forward`.
    conditions: dict[str, torch.Tensor]

    def tensors(self) -> list[torch.Tensor]:
        """All of them, always in the same order."""
        named = [getattr(self, field.name) for field in dataclasses.fields(self)[:-1]]
        return named + [self.conditions[name] for name in sorted(self.conditions)]

    def room_for(self, jobs: int, rows: int) -> Batch:
        """Room on the device for a batch of `jobs` and `rows` of this shape: zeros."""

        def room(tensor: torch.Tensor, count: int) -> torch.Tensor:
            return tensor.new_zeros((count, *tensor.shape[1:]))

        of_jobs = ("states", "noise", "weights", "input_scale", "guidance", "without", "prompted")
        of_rows = ("job_of_row", "times", "text")
        return Batch(
            **{name: room(getattr(self, name), jobs) for name in of_jobs},
            **{name: room(getattr(self, name), rows) for name in of_rows},
            conditions={name: room(tensor, rows) for name, tensor in self.conditions.items()},
        )


@dataclass(frozen=True)
class Step:
    """What a step gives."""

    #: (J, SLOTS, channels, height, width): the states after it.
    states: torch.Tensor
    #: (J, channels, height, width) float32: the guided prediction, for schedulers that are not linear.
    predictions: torch.Tensor
    #: (J,) bool: whether state and prediction are finite throughout.
    finite: torch.Tensor


def denoise(unet: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The step of `batch`: the fields of a `Step`, plain for the compiler."""
    scaled = batch.states[:, 0] * batch.input_scale.view(-1, 1, 1, 1)
    output = forward(unet, scaled[batch.job_of_row], batch)
    # Ho and Salimans (2022), equation 6, in the parametrisation of Saharia et al. (2022).
    without, prompted = output[batch.without], output[batch.prompted]
    predictions = without + batch.guidance.view(-1, 1, 1, 1) * (prompted - without)
    sources = torch.cat([batch.states, predictions[:, None], batch.noise[:, None]], dim=1)
    states = torch.bmm(batch.weights, sources.flatten(2)).view(batch.states.shape)
    finite = (states.isfinite().flatten(1).all(1)) & (predictions.isfinite().flatten(1).all(1))
    return states, predictions, finite


def forward(unet: Any, rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The UNet's output for each row, (R, channels, height, width) float32."""
    conditions = dict(batch.conditions)
    timestep_cond = conditions.pop("timestep_cond", None)
    output: torch.Tensor = unet(
        rows.to(batch.text.dtype),
        batch.times,
        encoder_hidden_states=batch.text,
        timestep_cond=timestep_cond,
        added_cond_kwargs=conditions or None,
        cross_attention_kwargs={"prompted": batch.prompted, "job_of_row": batch.job_of_row},
        return_dict=False,
    )[0]
    return output.float()
