"""Noise schedulers as matrices of weights, so that one formula steps jobs with different schedulers.

A scheduler keeps a few tensors from step to step (the latents, earlier predictions). Most schedulers are
linear: they make the next tensors as weighted sums of these, of the prediction and of noise.
`Samplers.schedule` measures the weights on diffusers' own scheduler object (`worker.device.probe`), once for
each scheduler and number of steps, and checks them against it. A step of a batch of jobs, each at another
step of another schedule, is then one product of small matrices.

A scheduler that is not linear (it clips or thresholds) has no weights. `Samplers.own` makes a `Sampler` of
it, which calls the scheduler object itself. A `Sampler` never changes: it returns its successor, so that a
step that fails can be run again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import threading
from collections.abc import Hashable, Mapping
from typing import Any

import diffusers
import torch

from worker.contract.choices import Scheduler
from worker.contract.errors import InvalidJobError
from worker.device.family import SchedulerClass, Schedulers
from worker.device.probe import read_off
from worker.device.schedule import Sampler, Schedule

logger = logging.getLogger("smallcat.samplers")

#: diffusers' class for each name that a job can ask for, and what it takes besides the model's own config.
#: These are for models that predict noise or v. Flow-matching models need others.
CLASSES: dict[Scheduler, SchedulerClass] = {
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

#: Schedules that are kept for other jobs: 9 names by a few numbers of steps, up to 30 KB each.
KEPT = 64


class Samplers:
    """Schedules and samplers from the model's own scheduler config. Safe to use from several threads."""

    def __init__(self, schedulers: Schedulers) -> None:
        own = schedulers.own
        self._schedulers = schedulers
        self._prototypes = {Scheduler.DEFAULT: type(own).from_config(own.config)}
        zero_snr = own.config.get("rescale_betas_zero_snr", False)
        for name, (kind, options) in schedulers.classes.items():
            # A class that knows no zero terminal SNR leaves it out of its config, and takes other noise.
            if zero_snr and "rescale_betas_zero_snr" not in _parameters(kind):
                continue
            # Not every class supports every noise schedule. `own` refuses jobs that ask for such a class.
            with contextlib.suppress(ValueError, NotImplementedError, TypeError):
                self._prototypes[name] = getattr(diffusers, kind).from_config(own.config, **options)
        self._lock = threading.Lock()
        self._cached = functools.lru_cache(KEPT)(self._schedule)

    def schedule(
        self, name: Scheduler, steps: int, options: Mapping[str, Hashable] | None = None
    ) -> Schedule:
        """The schedule of `steps` steps: the same object for the same arguments while the cache keeps it.

        `options`: see `worker.device.family.ModelFamily.timestep_options`.
        Raises `InvalidJobError` when the scheduler refuses the number of steps, or does not fit the model.
        """
        # One at a time: the cache by itself would let two threads make the same schedule.
        with self._lock:
            return self._cached(name, steps, tuple(sorted((options or {}).items())))

    def own(
        self,
        name: Scheduler,
        steps: int,
        generator: torch.Generator,
        options: Mapping[str, Hashable] | None = None,
    ) -> Sampler:
        """A sampler for `steps` steps that draws its noise from `generator` (on the CPU).

        For a schedule without weights. Raises as `schedule` does.
        """
        fits = {Scheduler.DEFAULT, *self._schedulers.classes}
        if name not in fits:
            names = " or ".join(f'"{each}"' for each in Scheduler if each in fits)
            raise InvalidJobError(f'scheduler is "{name}", but this is {self._schedulers.kind}: use {names}.')
        if name not in self._prototypes:
            raise InvalidJobError(
                f'scheduler is "{name}", which does not support this model\'s noise schedule: use "default".'
            )
        scheduler = copy.deepcopy(self._prototypes[name])
        self._refuse(name, scheduler, steps)
        try:
            scheduler.set_timesteps(steps, **(options or {}))
        except (ValueError, IndexError, TypeError, RuntimeError) as error:
            raise InvalidJobError(
                f'steps is {steps}, which scheduler "{name}" refuses with this model '
                f"({next(iter(str(error).splitlines()), '')[:200]}): use another number or another scheduler."
            ) from None
        if hasattr(scheduler, "set_begin_index"):
            # As diffusers' SDXL pipeline does. Its SD pipeline looks the first timestep up, and then fails at
            # the last step where rounding made the first two equal (Karras sigmas, zero terminal SNR).
            scheduler.set_begin_index(0)
        takes = inspect.signature(scheduler.step).parameters
        step_options: dict[str, Any] = {}
        if "eta" in takes:
            step_options["eta"] = 0.0
        if "generator" in takes:
            step_options["generator"] = generator
        return Sampler(scheduler, generator, scheduler.timesteps.cpu(), step_options)

    def _schedule(self, name: Scheduler, steps: int, options: tuple[tuple[str, Hashable], ...]) -> Schedule:
        schedule = read_off(self.own(name, steps, torch.Generator("cpu").manual_seed(0), dict(options)))
        if schedule.weights is None:
            logger.info(
                'Scheduler "%s" with %d steps is not linear with this model: it steps its jobs one by one.',
                name,
                steps,
            )
        return schedule

    @staticmethod
    def _refuse(name: Scheduler, scheduler: Any, steps: int) -> None:
        """Refuse what diffusers refuses too, with a message that names the limit."""
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


def _parameters(kind: str) -> Mapping[str, inspect.Parameter]:
    """What diffusers' scheduler class of that name takes as its config."""
    return inspect.signature(getattr(diffusers, kind).__init__).parameters
