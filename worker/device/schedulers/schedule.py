"""What a noise scheduler does to one job: by weights (`Schedule`), or by the scheduler object (`Sampler`)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch

#: Tensors of the latents' shape that a job may keep from step to step, the latents among them. PNDM with
#: Runge-Kutta steps needs all: three predictions, the sum of those within a step, and the latents before it.
#: DPM-Solver++(2M) needs 3, UniPC 4, or 5 where the model's config asks for order 3.
SLOTS = 6
#: What latents and noise are multiplied with, to be together as noisy as those of a step.
Mix = tuple[float, float]


@dataclass(frozen=True)
class Brownian:
    """Noise from one path of a Brownian motion: its change over an interval, by its standard deviation."""

    #: Where the path begins and ends, in noise levels.
    ends: tuple[float, float]
    #: For each step: the interval whose noise it takes; None: it takes none.
    intervals: tuple[tuple[float, float] | None, ...]


@dataclass(frozen=True)
class Schedule:
    """All that a scheduler does in its steps with this model. Shared by jobs, and nobody changes it.

    A job's state is `SLOTS` tensors of the latents' shape, float32: the latents first, zeros in the others
    before step 0. Step `i` makes it `weights[i] @ [state..., prediction, noise]`.
    """

    #: Timesteps of all steps, in order. Some schedulers take more steps than were asked for.
    timesteps: tuple[float, ...]
    #: What the initial noise is multiplied with to be the first latents.
    noise_scale: float
    #: For each step: what the latents are multiplied with to be the model's input. Empty without weights.
    input_scale: tuple[float, ...]
    #: (steps, SLOTS, SLOTS + 2), float32, on the CPU. A slot that is not in use has a row and a column of
    #: zeros. None: with this model's config the scheduler is not linear, and each job needs a `Sampler`.
    weights: torch.Tensor | None
    #: For each step: whether it draws noise of the latents' shape. Where it does not, the noise has no
    #: weight. Empty without weights.
    draws: tuple[bool, ...]
    #: Where the noise is that of a Brownian path; None: it is drawn from the job's generator, step by step.
    brownian: Brownian | None = None
    #: Evaluations of the model that the scheduler takes for each step, but the last: 2 for Heun and its kind.
    order: int = 1
    #: Timesteps that were left out before the first, of a job that begins with an image.
    skipped: int = 0
    #: For each step of such a job: what the image's latents and noise are multiplied with, to be together the
    #: latents before it. Empty for other jobs, and without weights.
    mixes: tuple[Mix, ...] = ()


@dataclass(frozen=True)
class Sampler:
    """One job's scheduler object at one step. `latents`: (1, *shape), float32."""

    scheduler: Any
    #: The job's noise generator on the CPU, after the draws so far.
    generator: torch.Generator
    #: Timesteps of all steps, in order, on the CPU.
    timesteps: torch.Tensor
    #: Arguments that `scheduler.step` of this class takes (diffusers: prepare_extra_step_kwargs).
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def noise_scale(self) -> float:
        """What the initial noise is multiplied with: 1 for schedulers without a scale (flow matching)."""
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def model_input(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """The latents as the model takes them before step `step`. May be called again for the same step.

        Unchanged for schedulers that scale nothing (flow matching).
        """
        if not hasattr(self.scheduler, "scale_model_input"):
            return latents
        scaled: torch.Tensor = self.scheduler.scale_model_input(latents, self.timesteps[step])
        return scaled

    def mix(self, step: int) -> Mix:
        """See `Schedule.mixes`, by diffusers' `add_noise`. The sampler is at step `step`."""
        one, none, at = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), self.timesteps[step : step + 1]
        add_noise = self.scheduler.add_noise
        return float(add_noise(one, none, at)), float(add_noise(none, one, at))

    def advance(
        self, prediction: torch.Tensor, latents: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, Sampler]:
        """The latents after step `step`, given the model's guided prediction, and the sampler for the next.

        Neither `latents` nor this sampler is changed.
        """
        following = replace(
            self, scheduler=_copied(self.scheduler), generator=copied_generator(self.generator)
        )
        options = dict(self.options)
        if "generator" in options:
            options["generator"] = following.generator
        after: torch.Tensor = following.scheduler.step(
            prediction, self.timesteps[step], latents, **options, return_dict=False
        )[0]
        return after, following


def _copied(scheduler: Any) -> Any:
    """A scheduler in the same state, whose own steps leave the first one as it is.

    Schedulers replace their tensors and the items of their lists at a step. What some add to in place (PNDM's
    Runge-Kutta sum) has the axes of the latents. Tables of sigmas and betas have one axis, and are shared.
    """
    duplicate = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            setattr(duplicate, name, list(value))
        elif isinstance(value, torch.Tensor) and value.ndim > 1:
            setattr(duplicate, name, value.clone())
    return duplicate


def copied_generator(generator: torch.Generator) -> torch.Generator:
    """A generator in the same state, on the CPU."""
    duplicate = torch.Generator("cpu")
    duplicate.set_state(generator.get_state())
    return duplicate
