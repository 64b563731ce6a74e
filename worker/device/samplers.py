"""Noise schedulers as numbers: what a scheduler does in a step, so that one formula steps jobs of any kind.

A scheduler keeps a few tensors from step to step (the latents, earlier predictions) and makes the next ones
by adding multiples of them. `Samplers.schedule` reads those multiples off diffusers' own scheduler object,
once for each scheduler and number of steps, and checks them against it; a batch of jobs, each at another
step of another schedule, is then one product of small matrices. The arithmetic stays diffusers' own.

A scheduler that does more than add (it clips or thresholds) has no such table. `Samplers.own` makes a
`Sampler` of it, which drives the scheduler object itself; a `Sampler` never changes, it returns its
successor, so that a step that fails can be taken again from where it was.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch

from worker.contract.errors import InvalidJobError
from worker.contract.job import Scheduler

logger = logging.getLogger("smallcat.samplers")

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

#: Tensors of the latents' shape that a job may keep from step to step, the latents among them. PNDM with
#: Runge-Kutta steps needs all: three predictions, the sum of those within a step, and the latents before it.
#: DPM-Solver++(2M) needs 3, UniPC 4, or 5 where the model's config asks for order 3.
SLOTS = 6
#: Schedules that are kept for further jobs: 9 names by a few numbers of steps; 30 KB each, or less.
KEPT = 64


@dataclass(frozen=True)
class Schedule:
    """All that a scheduler does in its steps with this model. Shared by jobs, and nobody changes it.

    A job's state is `SLOTS` tensors of the latents' shape, float32: the latents first, zeros in the others
    before step 0. Step `i` makes it `weights[i] @ [state..., prediction, noise]`.
    """

    #: Timesteps of all steps, in order. Some schedulers take more steps than were asked for.
    timesteps: tuple[float, ...]
    #: What the first noise is multiplied with to be the first latents.
    noise_scale: float
    #: For each step: what the latents are multiplied with to be the UNet's input. Empty without weights.
    input_scale: tuple[float, ...]
    #: (steps, SLOTS, SLOTS + 2), float32, on the CPU. A slot that is not in use has a row and a column of
    #: zeros. None: this scheduler does more than add, with this model's config; `Samplers.own` is the way.
    weights: torch.Tensor | None
    #: For each step: whether it takes noise of the latents' shape from the job's generator. Where it does
    #: not, the noise has no weight. Empty without weights.
    draws: tuple[bool, ...]


@dataclass(frozen=True)
class Sampler:
    """One job's scheduler object at one step. `latents`: (1, channels, height, width), float32."""

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
    """Schedules and samplers from the model's own scheduler config. Safe to use from several threads."""

    def __init__(self, pipeline: Any) -> None:
        own = pipeline.scheduler
        # A latent consistency pipeline passes arguments that no other scheduler takes.
        self._lcm_only = isinstance(pipeline, diffusers.LatentConsistencyModelPipeline)
        self._prototypes = {Scheduler.DEFAULT: type(own).from_config(own.config)}
        for name, (kind, options) in CLASSES.items():
            # Some noise schedules are known to some classes alone: `own` refuses the others.
            with contextlib.suppress(ValueError, NotImplementedError, TypeError):
                self._prototypes[name] = getattr(diffusers, kind).from_config(own.config, **options)
        self._lock = threading.Lock()
        self._kept = functools.lru_cache(KEPT)(self._schedule)

    def schedule(self, name: Scheduler, steps: int) -> Schedule:
        """The schedule of `steps` steps: the same object for all who ask for it while it is kept.

        Raises `InvalidJobError` when the scheduler cannot do that many steps, or the model not that one.
        """
        # One at a time: the cache by itself would let two threads make the same schedule.
        with self._lock:
            return self._kept(name, steps)

    def own(self, name: Scheduler, steps: int, generator: torch.Generator) -> Sampler:
        """A sampler for `steps` steps that draws its noise from `generator` (on the CPU).

        For a schedule without weights. Raises as `schedule` does.
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

    def _schedule(self, name: Scheduler, steps: int) -> Schedule:
        sampler = self.own(name, steps, torch.Generator("cpu").manual_seed(0))
        schedule = _read_off(sampler)
        if schedule.weights is None:
            logger.info(
                'Scheduler "%s" with %d steps does more than add with this model: each job drives its own.',
                name,
                steps,
            )
        return schedule

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


# How a schedule is read off. Schedulers treat all pixels alike and apart, so one run over a strip of pixels
# asks all questions at once. For each tensor that goes into a step there is a pixel that is large in it and
# zero in all others: what comes out there, over what went in, is that tensor's weight. A few pixels are zero
# in all: there comes out the noise. These are written anew before each step. All other pixels are random and
# left alone, so they live through the whole of a real schedule: they must come out as the weights say.

#: Where the strip's pixels of each kind are. Half of the random ones are great, so that no clip escapes.
ASKING, SILENT, RANDOM = slice(0, SLOTS + 1), slice(SLOTS + 1, SLOTS + 5), slice(SLOTS + 5, SLOTS + 37)
GREAT = slice(SLOTS + 21, SLOTS + 37)
STRIP = (1, 1, 1, SLOTS + 37)
#: How large: a power of two, by which dividing is exact, and beside which noise is as good as nothing.
LARGE = 2.0**20
#: How far weights and scheduler may be apart, in parts of the largest term so far. Rounding to float32 makes
#: up to 4e-6 with the schedulers that are offered by name.
TOLERANCE = 1e-5


def _read_off(sampler: Sampler) -> Schedule:
    """The schedule of a fresh `sampler`, whose scheduler and generator are used up by this."""
    timesteps, noise_scale = tuple(map(float, sampler.timesteps.tolist())), sampler.noise_scale
    unknown = Schedule(timesteps, noise_scale, (), None, ())
    try:
        run = _run(sampler)
    except Exception:  # noqa: BLE001 - what this scheduler raises is for each job's own sampler to raise
        return unknown
    if run is None:
        return unknown
    inputs, outputs, seen = run
    silent = inputs[:, -1:, SILENT]
    # Least squares over the silent pixels; without noise, none.
    noise = (outputs[..., SILENT] * silent).sum(-1, True) / silent.square().sum(-1, True).clamp(min=1e-9)
    asked = (outputs[..., ASKING] - noise * inputs[:, -1:, ASKING]) / LARGE
    in_use = inputs[:, :-1, ASKING].diagonal(dim1=1, dim2=2) > 0
    weights = torch.cat([asked * in_use[:, None], noise], dim=2)
    scale = seen[:, 0] / LARGE
    if not _agrees(weights, inputs, outputs) or not _near(scale[:, None] * inputs[:, 0], seen, seen.abs()):
        return unknown
    draws = (inputs[:, -1] != 0).any(-1)
    return Schedule(timesteps, noise_scale, tuple(scale.tolist()), weights, tuple(draws.tolist()))


def _agrees(weights: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> bool:
    """Whether the weights alone, from the first latents on, lead to the latents of the run."""
    state, bound = inputs[0, :SLOTS], torch.zeros(STRIP[-1])
    latents, bounds = torch.empty_like(outputs[:, 0]), torch.empty_like(outputs[:, 0])
    for step in range(len(weights)):
        terms = torch.cat([state, inputs[step, SLOTS:]])
        bound = torch.stack([bound, state[0].abs(), weights[step, 0].abs() @ terms.abs()]).amax(0)
        state = weights[step] @ terms
        latents[step], bounds[step] = state[0], bound
    return _near(latents, outputs[:, 0], bounds)


def _near(values: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> bool:
    """Whether the random pixels are what is expected. What is not a number is not near."""
    misses = (values - expected).abs() - TOLERANCE * bound
    return bool((misses[:, RANDOM] <= 0).all())


def _run(sampler: Sampler) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """One run over the strip. None: the scheduler keeps more tensors than there are slots.

    Returns for each step what went in, (steps, SLOTS + 2, pixels), what came out, (steps, SLOTS, pixels),
    and the latents as the UNet would have seen them, (steps, pixels).
    """
    scheduler, generator, pixels = sampler._scheduler, sampler._generator, STRIP[-1]
    steps = len(sampler.timesteps)
    inputs, outputs = torch.zeros(steps, SLOTS + 2, pixels), torch.zeros(steps, SLOTS, pixels)
    seen = torch.zeros(steps, pixels)
    lives = torch.randn(steps + 1, *STRIP, generator=torch.Generator("cpu").manual_seed(1))
    lives[..., GREAT] *= 1000.0
    state = [lives[steps] * sampler.noise_scale]
    for step in range(steps):
        prediction = lives[step]
        for slot, tensor in [*enumerate(state), (SLOTS, prediction)]:
            tensor[..., : SILENT.stop] = 0.0
            tensor[..., slot] = LARGE
            inputs[step, slot] = tensor[0, 0, 0]
        seen[step] = sampler.model_input(state[0], step)[0, 0, 0]
        before = generator.get_state()
        latents = scheduler.step(
            prediction, sampler.timesteps[step], state[0], **sampler._options, return_dict=False
        )[0]
        if not torch.equal(before, generator.get_state()):
            inputs[step, -1] = torch.randn(STRIP, generator=_generator_at(before))[0, 0, 0]
        state = [latents, *(tensor for tensor in _kept_by(scheduler) if tensor is not latents)]
        if len(state) > SLOTS:
            return None
        for slot, tensor in enumerate(state):
            outputs[step, slot] = tensor[0, 0, 0]
    return inputs, outputs, seen


def _kept_by(scheduler: Any) -> list[torch.Tensor]:
    """What a scheduler keeps for its next steps: its tensors of four dimensions, like latents, each once."""
    found: dict[int, torch.Tensor] = {}
    for value in vars(scheduler).values():
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 4:
                found[id(tensor)] = tensor
    return list(found.values())


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
    return _generator_at(generator.get_state())


def _generator_at(state: torch.Tensor) -> torch.Generator:
    generator = torch.Generator("cpu")
    generator.set_state(state)
    return generator
