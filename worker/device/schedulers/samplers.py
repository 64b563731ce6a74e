"""Noise schedulers as matrices of weights, so that one formula steps jobs with different schedulers.

A scheduler keeps a few tensors from step to step (the latents, earlier predictions). Most schedulers are
linear: they make the next tensors as weighted sums of these, of the prediction and of noise.
`Samplers.schedule` measures the weights on diffusers' own scheduler object
(`worker.device.schedulers.probe`), once for each scheduler and number of steps, and checks them against it. A
step of a batch of jobs, each at another step of another schedule, is then one product of small matrices.

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
from dataclasses import replace
from typing import Any

import diffusers
import torch

from worker.contract.choices import ALIGN_YOUR_STEPS, NoiseSchedule, Scheduler
from worker.contract.errors import InvalidJobError
from worker.contract.job import Job
from worker.device.family import SchedulerClass, Schedulers
from worker.device.schedulers.noise_schedules import config_of, is_offered, timesteps_of
from worker.device.schedulers.probe import read_off
from worker.device.schedulers.schedule import Sampler, Schedule

logger = logging.getLogger("smallcat.samplers")

_MULTISTEP = "DPMSolverMultistepScheduler"
#: diffusers' class for each name that a job can ask for, and what it takes besides the model's own config.
#: These are for models that predict noise or v. Flow-matching models need others.
CLASSES: dict[Scheduler, SchedulerClass] = {
    Scheduler.DDIM: ("DDIMScheduler", {}),
    Scheduler.EULER: ("EulerDiscreteScheduler", {}),
    Scheduler.EULER_ANCESTRAL: ("EulerAncestralDiscreteScheduler", {}),
    # Lu et al. (2022), DPM-Solver++(2M): the deterministic second-order multistep solver, whatever variant
    # the model's own config asks for.
    Scheduler.DPMPP_2M: (
        _MULTISTEP,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False},
    ),
    Scheduler.DPMPP_2M_KARRAS: (
        _MULTISTEP,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    Scheduler.PNDM: ("PNDMScheduler", {}),
    Scheduler.UNIPC: ("UniPCMultistepScheduler", {}),
    Scheduler.LCM: ("LCMScheduler", {}),
    Scheduler.HEUN: ("HeunDiscreteScheduler", {}),
    Scheduler.DPM2: ("KDPM2DiscreteScheduler", {}),
    Scheduler.DPM2_ANCESTRAL: ("KDPM2AncestralDiscreteScheduler", {}),
    Scheduler.LMS: ("LMSDiscreteScheduler", {}),
    Scheduler.DDPM: ("DDPMScheduler", {}),
    Scheduler.DEIS: ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_order": 2}),
    # With noise that ends at 0, diffusers sets `lower_order_final` itself, and warns each time.
    Scheduler.DPMPP_2S: (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True},
    ),
    Scheduler.DPMPP_SDE: ("DPMSolverSDEScheduler", {}),
    Scheduler.DPMPP_2M_SDE: (
        _MULTISTEP,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "use_karras_sigmas": False},
    ),
    Scheduler.DPMPP_3M_SDE: (
        _MULTISTEP,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "use_karras_sigmas": False},
    ),
    Scheduler.DPMPP_2S_ANCESTRAL: ("DPMPP2SAncestral", {}),
    Scheduler.TCD: ("TCDScheduler", {}),
    Scheduler.SA_SOLVER: ("SASolverScheduler", {"algorithm_type": "data_prediction"}),
}

#: Schedules that are kept for other jobs: names by numbers of steps, up to 60 KB each.
KEPT = 128


class Samplers:
    """Schedules and samplers from the model's own scheduler config. Safe to use from several threads."""

    def __init__(self, schedulers: Schedulers) -> None:
        self._schedulers = schedulers
        self._lock = threading.Lock()
        self._cached = functools.lru_cache(KEPT)(self._schedule)
        # When first asked for: some of diffusers' modules take long to load.
        self._prototype = functools.lru_cache(KEPT)(self._make_prototype)

    def schedule(
        self,
        name: Scheduler,
        steps: int,
        options: Mapping[str, Hashable] | None = None,
        *,
        noise: NoiseSchedule = NoiseSchedule.DEFAULT,
        eta: float | None = None,
        strength: float | None = None,
    ) -> Schedule:
        """The schedule of `steps` steps: the same object for the same arguments while the cache keeps it.

        `options`: see `worker.device.family.ModelFamily.timestep_options`. `noise`: how its noise levels lie.
        `eta`: the share of noise that is new in each step; None: the scheduler's own (`ETA`).
        `strength`: of a job that begins with an image, see `begin_index`; None: it begins with noise.
        Raises `InvalidJobError` when the scheduler refuses the number of steps, or does not fit the model.
        """
        # One at a time: the cache by itself would let two threads make the same schedule.
        with self._lock:
            return self._cached(name, steps, tuple(sorted((options or {}).items())), noise, eta, strength)

    def of(
        self, job: Job, options: Mapping[str, Hashable]
    ) -> tuple[Schedule, Sampler | None, torch.Generator]:
        """The schedule of a job with all its fields, its sampler where that has no weights, its generator.

        Raises as `schedule` does.
        """
        assert job.steps  # noqa: S101 - resolved, which mypy cannot know
        name, noise, eta = Scheduler(job.scheduler), job.schedule, job.eta
        strength = job.strength
        schedule = self.schedule(name, job.steps, options, noise=noise, eta=eta, strength=strength)
        generator = torch.Generator("cpu").manual_seed(job.seed)
        if schedule.weights is not None:
            return schedule, None, generator
        sampler = self.own(name, job.steps, generator, options, noise=noise, eta=eta, strength=strength)
        return schedule, sampler, generator

    def own(
        self,
        name: Scheduler,
        steps: int,
        generator: torch.Generator,
        options: Mapping[str, Hashable] | None = None,
        *,
        noise: NoiseSchedule = NoiseSchedule.DEFAULT,
        eta: float | None = None,
        strength: float | None = None,
    ) -> Sampler:
        """A sampler for `steps` steps that draws its noise from `generator` (on the CPU), or by its seed.

        For a schedule without weights. Raises as `schedule` does.
        """
        scheduler = copy.deepcopy(self._prototype(name, noise, eta is not None))
        if eta is not None and hasattr(scheduler, "eta"):
            scheduler.eta = eta
        self._refuse(name, scheduler, steps, noise)
        if hasattr(scheduler, "noise_sampler_seed"):
            scheduler.noise_sampler_seed = generator.initial_seed()
        asked = timesteps_of(scheduler, noise, steps, self._schedulers.align_your_steps)
        try:
            scheduler.set_timesteps(**asked, **(options or {}))
        except (ValueError, IndexError, TypeError, RuntimeError) as error:
            raise InvalidJobError(
                f'steps is {steps}, which scheduler "{name}" refuses with this model '
                f"({next(iter(str(error).splitlines()), '')[:200]}): use another number or another scheduler."
            ) from None
        begin = begin_index(scheduler, steps, strength)
        if hasattr(scheduler, "set_begin_index"):
            # As diffusers' SDXL pipeline does. Its SD pipeline looks the first timestep up, and then fails at
            # the last step where rounding made the first two equal (Karras sigmas, zero terminal SNR).
            scheduler.set_begin_index(begin)
        takes = inspect.signature(scheduler.step).parameters
        step_options: dict[str, Any] = {}
        if "eta" in takes:
            step_options["eta"] = eta or 0.0
        if "generator" in takes:
            step_options["generator"] = generator
        return Sampler(scheduler, generator, scheduler.timesteps.cpu()[begin:], step_options)

    def _make_prototype(self, name: Scheduler, noise: NoiseSchedule, with_eta: bool) -> Any:
        """The scheduler with the model's config. Raises `InvalidJobError` where that cannot be."""
        own, classes = self._schedulers.own, self._schedulers.classes
        if name is not Scheduler.DEFAULT and name not in classes:
            names = " or ".join(f'"{each}"' for each in Scheduler if each in {Scheduler.DEFAULT, *classes})
            raise InvalidJobError(f'scheduler is "{name}", but this is {self._schedulers.kind}: use {names}.')
        named, options = classes.get(name, (type(own).__name__, {}))
        kind = type(own) if name is Scheduler.DEFAULT else class_of(named, with_eta=with_eta)
        if not is_offered(kind, noise) or (
            noise is NoiseSchedule.ALIGN_YOUR_STEPS and not self._schedulers.align_your_steps
        ):
            raise InvalidJobError(
                f'schedule is "{noise}", which scheduler "{name}" does not have with this model: '
                f'use "{NoiseSchedule.DEFAULT}", or another scheduler.'
            )
        # A class that knows no zero terminal SNR leaves it out of its config, and takes other noise.
        is_zero_snr = own.config.get("rescale_betas_zero_snr", False)
        takes = inspect.signature(kind.__init__).parameters
        if name is Scheduler.DEFAULT or not is_zero_snr or "rescale_betas_zero_snr" in takes:
            # Not every class supports every noise schedule.
            with contextlib.suppress(ValueError, NotImplementedError, TypeError):
                return kind.from_config(own.config, **{**options, **config_of(kind, noise)})
        raise InvalidJobError(
            f'scheduler is "{name}", which does not support this model\'s noise schedule: use "default".'
        )

    def _schedule(
        self,
        name: Scheduler,
        steps: int,
        options: tuple[tuple[str, Hashable], ...],
        noise: NoiseSchedule,
        eta: float | None,
        strength: float | None,
    ) -> Schedule:
        generator = torch.Generator("cpu").manual_seed(0)
        own = self.own(name, steps, generator, dict(options), noise=noise, eta=eta, strength=strength)
        schedule = read_off(own, for_images=strength is not None)
        if strength is not None:
            schedule = replace(schedule, skipped=begin_index(own.scheduler, steps, strength))
        if schedule.weights is None:
            logger.info(
                'Scheduler "%s" with %d steps is not linear with this model: it steps its jobs one by one.',
                name,
                steps,
            )
        return schedule

    @staticmethod
    def _refuse(name: Scheduler, scheduler: Any, steps: int, noise: NoiseSchedule) -> None:
        """Refuse what diffusers refuses too, with a message that names the limit."""
        config = scheduler.config
        if noise is NoiseSchedule.ALIGN_YOUR_STEPS and steps != ALIGN_YOUR_STEPS:
            raise InvalidJobError(
                f'steps is {steps}, but schedule "{noise}" has {ALIGN_YOUR_STEPS}: use {ALIGN_YOUR_STEPS}.'
            )
        if (
            type(scheduler).__name__ in ("LCMScheduler", "TCDScheduler")
            and steps > config.original_inference_steps
        ):
            raise InvalidJobError(
                f'steps is {steps}, the limit of scheduler "{name}" with this model is '
                f"{config.original_inference_steps}: 4 to 8 are enough."
            )
        if isinstance(scheduler, diffusers.PNDMScheduler) and steps < 4 and not config.skip_prk_steps:
            raise InvalidJobError(
                f'steps is {steps}, but scheduler "{name}" with this model begins with 4 Runge-Kutta steps: '
                "use 4 or more, or another scheduler."
            )


def begin_index(scheduler: Any, steps: int, strength: float | None) -> int:
    """How many timesteps a job leaves out: those before `int(steps * strength)` steps of the scheduler.

    None, with noise to begin with. As diffusers' `StableDiffusionImg2ImgPipeline.get_timesteps`.
    """
    if strength is None:
        return 0
    return (steps - min(int(steps * strength), steps)) * int(getattr(scheduler, "order", 1))


def class_of(name: str, *, with_eta: bool = False) -> Any:
    """The scheduler class of a name in `CLASSES`: diffusers' own, unless it has none, or none with `eta`."""
    # Loaded when it is needed, as diffusers' own modules are.
    from worker.device.schedulers import ancestral

    if name in ancestral.OURS:
        return ancestral.OURS[name]
    own = getattr(diffusers, name)
    return ancestral.WITH_ETA.get(name, own) if with_eta else own
