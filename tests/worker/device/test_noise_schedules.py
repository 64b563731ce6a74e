"""Every scheduler with every schedule that it is offered with, against diffusers' own, without any model.

The steps are linear maps (`worker.device.schedulers.probe`); here they are applied to what a model might
predict, beside diffusers' `step`. diffusers 0.42.1, scipy 1.17.1, torchsde 0.2.6.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import AysSchedules

from tests.worker.device.noise_schedules import IN_DIFFUSERS
from tests.worker.device.test_samplers import (
    CONFIGS,
    SHAPE,
    a_generator,
    guess,
    names_for,
    refuses,
    schedulers_of,
)
from worker.contract.choices import NoiseSchedule, Scheduler
from worker.contract.errors import InvalidJobError
from worker.contract.scheduler_names import OFFERED
from worker.device.family import Schedulers
from worker.device.schedulers.noise_schedules import is_offered
from worker.device.schedulers.samplers import CLASSES, Samplers, class_of
from worker.device.schedulers.schedule import SLOTS, Schedule
from worker.device.schedulers.step_noise import StepNoise

#: numpy's word about what diffusers calls 1,000 times a schedule.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
SEED = 7
PAIRS = [
    (name, schedule)
    for name, schedules in OFFERED.items()
    # The last one is not diffusers': tests/worker/device/test_ancestral.py.
    if name not in (Scheduler.DEFAULT, Scheduler.DPMPP_2S_ANCESTRAL)
    for schedule in (NoiseSchedule.DEFAULT, *schedules)
]
LONG = (Scheduler.DPM2, Scheduler.DPM2_ANCESTRAL, Scheduler.DPMPP_SDE)
SIGMAS = (NoiseSchedule.KARRAS, NoiseSchedule.EXPONENTIAL, NoiseSchedule.BETA)
CONFIG_OF_SCHEDULES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def simple_scheduler(trained: int, steps: int) -> list[int]:
    """`simple_scheduler` of ComfyUI 0.3 and AUTOMATIC1111 1.10, by the places of noise levels in their list.

    There: `ss = len(sigmas) / steps`, and for each step x `sigmas[-(1 + int(x * ss))]`.
    """
    places = list(range(trained))
    return [places[-(1 + int(x * (trained / steps)))] for x in range(steps)]


@functools.cache
def as_the_table_has_it(config: str, name: Scheduler, schedule: NoiseSchedule) -> Any:
    """diffusers' scheduler with the model's config and the options of `IN_DIFFUSERS`."""
    kind, options = CLASSES[name]
    cls = getattr(diffusers, kind)
    given = dict(CONFIGS[config].config)
    if schedule is not NoiseSchedule.DEFAULT:
        given = {each: value for each, value in given.items() if each not in CONFIG_OF_SCHEDULES}
        options = {**options, "use_karras_sigmas": False} if "use_karras_sigmas" in options else options
    options = {**options, **IN_DIFFUSERS[schedule]}
    if kind == "DPMSolverSDEScheduler":
        options["noise_sampler_seed"] = SEED
    takes = inspect.signature(cls.__init__).parameters
    return cls.from_config(given, **{each: value for each, value in options.items() if each in takes})


def by_diffusers(config: str, name: Scheduler, schedule: NoiseSchedule, steps: int) -> list[torch.Tensor]:
    """The latents after each step of diffusers' loop, pipeline_stable_diffusion_xl.py, step 9."""
    scheduler = copy.deepcopy(as_the_table_has_it(config, name, schedule))
    if schedule is NoiseSchedule.SIMPLE:
        scheduler.set_timesteps(timesteps=simple_scheduler(1000, steps))
    elif schedule is NoiseSchedule.ALIGN_YOUR_STEPS:
        is_euler = name is Scheduler.EULER
        table = AysSchedules["StableDiffusionSigmas" if is_euler else "StableDiffusionTimesteps"]
        scheduler.set_timesteps(**{"sigmas" if is_euler else "timesteps": table})
    else:
        scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    extra = {"eta": 0.0, "generator": a_generator(SEED)}
    extra = {each: extra[each] for each in extra if each in inspect.signature(scheduler.step).parameters}
    path = [torch.randn(SHAPE, generator=a_generator(1)) * scheduler.init_noise_sigma]
    for step, timestep in enumerate(scheduler.timesteps):
        prediction = guess(step) + 0.1 * scheduler.scale_model_input(path[-1], timestep)
        path.append(scheduler.step(prediction, timestep, path[-1], **extra, return_dict=False)[0])
    return path


def by_weights(schedule: Schedule) -> list[torch.Tensor]:
    """The same by a schedule's weights."""
    assert schedule.weights is not None
    state, noise = torch.zeros(SLOTS, *SHAPE), StepNoise(schedule, a_generator(SEED), SHAPE[1:])
    state[0] = torch.randn(SHAPE, generator=a_generator(1)) * schedule.noise_scale
    path = [state[0]]
    for step, weights in enumerate(schedule.weights):
        prediction = guess(step) + 0.1 * (schedule.input_scale[step] * state[0])
        drawn = noise.of(step)
        drawn = torch.zeros(SHAPE) if drawn is None else drawn[None]
        state = torch.einsum("st,t...->s...", weights, torch.stack([*state, prediction, drawn]))
        path.append(state[0])
    return path


def by_sampler(config: str, name: Scheduler, schedule: NoiseSchedule, steps: int) -> list[torch.Tensor]:
    """The same by a job's own sampler, which it has where a schedule has no weights."""
    sampler = samplers_of(config).own(name, steps, a_generator(SEED), noise=schedule)
    path = [torch.randn(SHAPE, generator=a_generator(1)) * sampler.noise_scale]
    for step in range(len(sampler.timesteps)):
        prediction = guess(step) + 0.1 * sampler.model_input(path[-1], step)
        latents, sampler = sampler.advance(prediction, path[-1], step)
        path.append(latents)
    return path


@functools.cache
def samplers_of(config: str) -> Samplers:
    return Samplers(Schedulers(CONFIGS[config], CLASSES, "a model", "StableDiffusion"))


def is_near(config: str, name: Scheduler, schedule: NoiseSchedule, steps: int) -> None:
    made = samplers_of(config).schedule(name, steps, noise=schedule)
    if made.weights is not None:
        mine = by_weights(made)
    else:
        # The coefficients of LMS are large there, and rounding may be too much for weights.
        assert (name, schedule, steps) == (Scheduler.LMS, NoiseSchedule.EXPONENTIAL, 150)
        mine = by_sampler(config, name, schedule, steps)
    expected = by_diffusers(config, name, schedule, steps)
    assert len(mine) == len(expected)
    largest = torch.zeros(())
    for own, theirs in zip(mine, expected, strict=True):
        # Rounding is relative to the largest latents on the way.
        largest = torch.maximum(largest, theirs.abs().max())
        assert (own - theirs).abs().max() <= 2e-5 * largest


def steps_of(schedule: NoiseSchedule, steps: int) -> int:
    return 10 if schedule is NoiseSchedule.ALIGN_YOUR_STEPS else steps


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        # diffusers takes 0.2 s to make one of these: one schedule stands for the others.
        pytest.param(*pair, marks=pytest.mark.slow if pair[0] in LONG and pair[1] in SIGMAS[1:] else ())
        for pair in PAIRS
    ],
)
def test_every_pair_does_what_diffusers_does(name: Scheduler, schedule: NoiseSchedule) -> None:
    is_near("sd1", name, schedule, steps_of(schedule, 4))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("config", ["sd1", "sd2", "zero", "sdxl", "sde", "turbo"])
@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_every_pair_does_what_diffusers_does_with_every_config(
    config: str, name: Scheduler, schedule: NoiseSchedule
) -> None:
    if name not in names_for(config):
        return
    for steps in {steps_of(schedule, steps) for steps in (1, 2, 3, 7, 20, 33, 50, 150)}:
        if not refuses(config, name, steps):
            is_near(config, name, schedule, steps)


def test_what_is_offered_is_what_the_classes_take_by_their_signatures() -> None:
    """But for LCM and TCD, which have timesteps of their own from their training."""
    for name, schedules in OFFERED.items():
        if name in (Scheduler.DEFAULT, Scheduler.LCM, Scheduler.TCD):
            assert schedules == ()
            continue
        kind = class_of(CLASSES[name][0])
        taken = {each for each in NoiseSchedule if is_offered(kind, each)} - {NoiseSchedule.DEFAULT}
        assert set(schedules) == taken, name


def test_two_jobs_of_one_seed_have_one_brownian_path_and_others_have_others() -> None:
    samplers = Samplers(schedulers_of(CONFIGS["sd1"]))
    schedule = samplers.schedule(Scheduler.DPMPP_SDE, 3)
    one, same, other = (StepNoise(schedule, a_generator(seed), SHAPE[1:]) for seed in (1, 1, 2))
    for step in range(len(schedule.timesteps)):
        noises = [each.of(step) for each in (one, same, other)]
        if not schedule.draws[step]:
            assert noises == [None] * 3
            continue
        first, second, third = (each for each in noises if each is not None)
        assert torch.equal(first, second)
        assert not torch.equal(first, third)


@pytest.mark.parametrize(
    ("name", "schedule", "steps", "sentence"),
    [
        ("euler_ancestral", "karras", 20, 'schedule is "karras", which scheduler "euler_ancestral" does not'),
        ("default", "karras", 20, 'schedule is "karras", which scheduler "default" does not have with this'),
        ("euler", "align_your_steps", 20, 'steps is 20, but schedule "align_your_steps" has 10: use 10'),
        ("tcd", "default", 51, 'steps is 51, the limit of scheduler "tcd" with this model is 50'),
    ],
)
def test_refused_in_one_sentence(name: str, schedule: str, steps: int, sentence: str) -> None:
    samplers = samplers_of("sd1")
    for make in (samplers.schedule, lambda *given, noise: samplers.own(*given, a_generator(), noise=noise)):
        with pytest.raises(InvalidJobError, match=sentence):
            make(Scheduler(name), steps, noise=NoiseSchedule(schedule))


def test_a_model_without_a_table_of_align_your_steps_has_none() -> None:
    samplers = Samplers(schedulers_of(CONFIGS["sd1"]))
    with pytest.raises(InvalidJobError, match='"align_your_steps", which scheduler "euler" does not have'):
        samplers.schedule(Scheduler.EULER, 10, noise=NoiseSchedule.ALIGN_YOUR_STEPS)


def test_a_schedule_holds_whatever_schedule_the_models_config_has() -> None:
    own = diffusers.DPMSolverMultistepScheduler.from_config(CONFIGS["sd1"].config, use_beta_sigmas=True)
    samplers = Samplers(schedulers_of(own))
    for first, second in itertools.pairwise(("karras", "exponential", "beta")):
        made = [
            samplers.own(Scheduler.UNIPC, 5, a_generator(), noise=NoiseSchedule(each)).scheduler.config
            for each in (first, second)
        ]
        for each, config in zip((first, second), made, strict=True):
            on = [option for option in CONFIG_OF_SCHEDULES if config.get(option)]
            assert on == [f"use_{each}_sigmas"]
