"""Noise schedulers: one diffusers scheduler object a job, so that jobs of any kind share a batch.

The arithmetic is diffusers' own. `Samplers` makes a `Sampler` for each job; a `Sampler` never changes, it
returns its successor, so that a step that fails can be taken again from where it was.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch

from worker.errors import InvalidJobError
from worker.job import Scheduler

#: diffusers' class for each name that a job can ask for, and what it takes besides the model's own config.
CLASSES: dict[Scheduler, tuple[str, dict[str, Any]]] = {
    Scheduler.DDIM: ("DDIMScheduler", {}),
    Scheduler.EULER: ("EulerDiscreteScheduler", {}),
    Scheduler.EULER_ANCESTRAL: ("EulerAncestralDiscreteScheduler", {}),
    # Lu et al. (2022), DPM-Solver++(2M): the deterministic second-order multistep solver, whatever variant
    # the model's own config asks for.
    Scheduler.DPMPP_2M: (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False},
    ),
    Scheduler.DPMPP_2M_KARRAS: (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    Scheduler.PNDM: ("PNDMScheduler", {}),
    Scheduler.UNIPC: ("UniPCMultistepScheduler", {}),
    Scheduler.LCM: ("LCMScheduler", {}),
}


@dataclass(frozen=True)
class Sampler:
    """One job's scheduler at one step. `latents` everywhere: (1, channels, height, width), float32."""

    _scheduler: Any
    #: The job's noise generator on the CPU, after the draws so far.
    _generator: torch.Generator
    #: Timesteps of all steps, in order, on the CPU.
    timesteps: torch.Tensor
    #: Arguments that `scheduler.step` of this class takes (diffusers: prepare_extra_step_kwargs).
    _options: dict[str, Any] = field(default_factory=dict)

    @property
    def noise_scale(self) -> float:
        """What the first noise is multiplied with."""
        return float(self._scheduler.init_noise_sigma)

    def model_input(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """The latents as the UNet wants them before step `step`. May be called again for the same step."""
        scaled: torch.Tensor = self._scheduler.scale_model_input(latents, self.timesteps[step])
        return scaled

    def advance(
        self, prediction: torch.Tensor, latents: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, Sampler]:
        """The latents after step `step`, given the UNet's guided prediction, and the sampler for the next.

        Neither `latents` nor this sampler is changed.
        """
        following = replace(
            self, _scheduler=_twin(self._scheduler), _generator=_twin_generator(self._generator)
        )
        options = dict(self._options)
        if "generator" in options:
            options["generator"] = following._generator
        after: torch.Tensor = following._scheduler.step(
            prediction, self.timesteps[step], latents, **options, return_dict=False
        )[0]
        return after, following


class Samplers:
    """Makes a job's sampler from the model's own scheduler config. Safe to use from several threads."""

    def __init__(self, pipeline: Any) -> None:
        own = pipeline.scheduler
        # A latent consistency pipeline passes arguments that no other scheduler takes.
        self._lcm_only = isinstance(pipeline, diffusers.LatentConsistencyModelPipeline)
        self._prototypes = {Scheduler.DEFAULT: type(own).from_config(own.config)}
        for name, (kind, options) in CLASSES.items():
            # Some noise schedules are known to some classes alone: `make` refuses the others.
            with contextlib.suppress(ValueError, NotImplementedError, TypeError):
                self._prototypes[name] = getattr(diffusers, kind).from_config(own.config, **options)

    def make(self, name: Scheduler, steps: int, generator: torch.Generator) -> Sampler:
        """A sampler for `steps` steps that draws its noise from `generator` (on the CPU).

        Raises `InvalidJobError` when the scheduler cannot do that many steps, or the model not that one.
        """
        if self._lcm_only and name not in (Scheduler.DEFAULT, Scheduler.LCM):
            raise InvalidJobError(
                f'scheduler is "{name}", but this is a latent consistency model: use "default" or "lcm".'
            )
        if name not in self._prototypes:
            raise InvalidJobError(
                f'scheduler is "{name}", which does not know this model\'s noise: use "default".'
            )
        scheduler = copy.deepcopy(self._prototypes[name])
        self._refuse(name, scheduler, steps)
        try:
            scheduler.set_timesteps(steps)
        except (ValueError, IndexError, TypeError, RuntimeError) as error:
            raise InvalidJobError(
                f'steps is {steps}, which scheduler "{name}" refuses with this model '
                f"({next(iter(str(error).splitlines()), '')[:200]}): use another number or another scheduler."
            ) from None
        if hasattr(scheduler, "set_begin_index"):
            # As diffusers' SDXL call does. Its SD call looks the first timestep up, which fails at the last
            # step where rounding made the first two timesteps the same (Karras sigmas, zero terminal SNR).
            scheduler.set_begin_index(0)
        takes = inspect.signature(scheduler.step).parameters
        options: dict[str, Any] = {}
        if "eta" in takes:
            options["eta"] = 0.0
        if "generator" in takes:
            options["generator"] = generator
        return Sampler(scheduler, generator, scheduler.timesteps.cpu(), options)

    @staticmethod
    def _refuse(name: Scheduler, scheduler: Any, steps: int) -> None:
        """Refuse with a limit what diffusers refuses without one."""
        config = scheduler.config
        if isinstance(scheduler, diffusers.LCMScheduler) and steps > config.original_inference_steps:
            raise InvalidJobError(
                f'steps is {steps}, the limit of scheduler "{name}" with this model is '
                f"{config.original_inference_steps}: 4 to 8 are enough."
            )
        if isinstance(scheduler, diffusers.PNDMScheduler) and steps < 4 and not config.skip_prk_steps:
            raise InvalidJobError(
                f'steps is {steps}, but scheduler "{name}" with this model begins with 4 Runge-Kutta steps: '
                "use 4 or more, or another scheduler."
            )


def _twin(scheduler: Any) -> Any:
    """A scheduler in the same state, whose own steps leave the first one as it is.

    Schedulers replace their tensors and the items of their lists at a step; what some add to in place
    (PNDM's Runge-Kutta sum) has four dimensions, like latents. Tables of sigmas and betas are shared.
    """
    twin = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            setattr(twin, name, list(value))
        elif isinstance(value, torch.Tensor) and value.ndim == 4:
            setattr(twin, name, value.clone())
    return twin


def _twin_generator(generator: torch.Generator) -> torch.Generator:
    twin = torch.Generator("cpu")
    twin.set_state(generator.get_state())
    return twin
