"""Schedules and samplers against diffusers' schedulers, without any model."""

from __future__ import annotations

import functools
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from worker.contract.choices import FIRST_SCHEDULERS, Scheduler
from worker.contract.errors import InvalidJobError
from worker.device.family import Schedulers
from worker.device.schedulers.samplers import CLASSES, Samplers, class_of
from worker.device.schedulers.schedule import SLOTS, Sampler, Schedule

#: numpy's word about what diffusers' schedulers call 1,000 times.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
SHAPE = (1, 5, 4, 6)
NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def scheduler_of(kind: str, **config: Any) -> Any:
    """As a model has it: its config also says, for schedulers that clip by default, that it does not."""
    return getattr(diffusers, kind).from_config({**NOISE, "clip_sample": False, **config})


#: Configs as models have them.
CONFIGS: dict[str, Any] = {
    "sd1": scheduler_of("PNDMScheduler", skip_prk_steps=True, steps_offset=1),
    "sd2": scheduler_of("DDIMScheduler", prediction_type="v_prediction", steps_offset=1),
    "zero": scheduler_of(
        "DDIMScheduler",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "sdxl": scheduler_of("EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1),
    "sde": scheduler_of(
        "DPMSolverMultistepScheduler",
        algorithm_type="sde-dpmsolver++",
        use_karras_sigmas=True,
        solver_order=3,
    ),
    "lcm": scheduler_of("LCMScheduler"),
    "heun": scheduler_of("HeunDiscreteScheduler"),
    "turbo": scheduler_of("EulerAncestralDiscreteScheduler", timestep_spacing="trailing"),
    "clips": scheduler_of("DDIMScheduler", clip_sample=True),
    "thresholds": scheduler_of("DPMSolverMultistepScheduler", thresholding=True),
}
#: Flow matching. These have no `init_noise_sigma` and no `scale_model_input`, and only their own names fit.
FLOWS: dict[str, Any] = {
    "flow euler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow euler, shifted by size": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "flow euler, stochastic": diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "flow heun": diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "flow lcm": diffusers.FlowMatchLCMScheduler(shift=3.0),
}
FLOW_CLASSES: dict[Scheduler, Any] = {Scheduler.EULER: ("FlowMatchEulerDiscreteScheduler", {})}
#: What set_timesteps takes besides the number of steps.
OPTIONS: dict[str, dict[str, Any]] = {"flow euler, shifted by size": {"mu": 0.8}}
#: Those under which every scheduler is linear.
LINEAR = ("sd1", "sd2", "zero", "sdxl", "sde", "lcm", "turbo")


#: diffusers' classes that know zero terminal SNR.
ZERO_SNR = frozenset(
    kind
    for kind, _ in CLASSES.values()
    if "rescale_betas_zero_snr" in inspect.signature(class_of(kind).__init__).parameters
)


def names_for(config: str) -> list[Scheduler]:
    """The schedulers that support the config's noise: some do not, where it has zero terminal SNR."""
    return [
        name
        for name in Scheduler
        if config != "zero" or name is Scheduler.DEFAULT or CLASSES[name][0] in ZERO_SNR
    ]


def first_names_for(config: str) -> list[Scheduler]:
    """Those of the first version. tests/worker/device/test_noise_schedules.py has the others."""
    return [name for name in names_for(config) if name in FIRST_SCHEDULERS]


def a_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def schedulers_of(own: Any) -> Schedulers:
    return Schedulers(own, CLASSES, "a model of noise")


@functools.cache
def samplers_of(config: str) -> Samplers:
    if config in FLOWS:
        return Samplers(Schedulers(FLOWS[config], FLOW_CLASSES, "a flow-matching model"))
    return Samplers(schedulers_of(CONFIGS[config]))


def guess(step: int) -> torch.Tensor:
    """What a model might predict."""
    return torch.randn(SHAPE, generator=a_generator(1000 + step))


def ours(sampler: Sampler, noise: torch.Tensor) -> list[torch.Tensor]:
    """The latents after each step; every step is taken twice, the first time for nothing."""
    latents, path = noise * sampler.noise_scale, []
    for step in range(len(sampler.timesteps)):
        prediction = guess(step) + 0.1 * sampler.model_input(latents, step)
        sampler.advance(prediction * float("nan"), latents, step)
        latents, sampler = sampler.advance(prediction, latents, step)
        path.append(latents)
    return path


def by_weights(schedule: Schedule, noise: torch.Tensor) -> list[torch.Tensor]:
    """The latents after each step, by the schedule alone."""
    assert schedule.weights is not None
    state, generator, path = torch.zeros(SLOTS, *noise.shape), a_generator(), []
    state[0] = noise * schedule.noise_scale
    for step, weights in enumerate(schedule.weights):
        prediction = guess(step) + 0.1 * (schedule.input_scale[step] * state[0])
        drawn = torch.zeros(SHAPE)
        if schedule.draws[step]:
            drawn = torch.randn(SHAPE, generator=generator)
        state = torch.einsum("st,t...->s...", weights, torch.stack([*state, prediction, drawn]))
        path.append(state[0])
    return path


def diffusers_own(config: str, name: Scheduler, steps: int, noise: torch.Tensor) -> list[torch.Tensor]:
    """The same by diffusers' loop: pipeline_stable_diffusion_xl.py, step 9.

    `pipeline_stable_diffusion.py` is the same but for `set_begin_index`, without which it raises an
    IndexError where the first two timesteps are the same. Pipelines of flow matching scale nothing.
    """
    if config in FLOWS:
        return flow_loop(config, steps, noise)
    own = CONFIGS[config]
    kind, options = CLASSES.get(name, (type(own).__name__, {}))
    if kind == "DPMSolverSDEScheduler":
        # Its noise is the job's, whose generator here has the seed 0.
        options = {**options, "noise_sampler_seed": 0}
    scheduler = class_of(kind).from_config(own.config, **options)
    pipeline = SimpleNamespace(scheduler=scheduler)
    extra = diffusers.StableDiffusionPipeline.prepare_extra_step_kwargs(pipeline, a_generator(), 0.0)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    latents, path = noise * scheduler.init_noise_sigma, []
    for step, timestep in enumerate(scheduler.timesteps):
        prediction = guess(step) + 0.1 * scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
        path.append(latents)
    return path


def flow_loop(config: str, steps: int, latents: torch.Tensor) -> list[torch.Tensor]:
    """As in pipeline_flux.py, step 6."""
    scheduler = type(FLOWS[config]).from_config(FLOWS[config].config)
    scheduler.set_timesteps(steps, **OPTIONS.get(config, {}))
    scheduler.set_begin_index(0)
    generator, path = a_generator(), []
    for step, timestep in enumerate(scheduler.timesteps):
        prediction = guess(step) + 0.1 * latents
        latents = scheduler.step(prediction, timestep, latents, generator=generator, return_dict=False)[0]
        path.append(latents)
    return path


def refuses(config: str, name: Scheduler, steps: int) -> bool:
    """Whether the scheduler cannot do so few, or so many, steps."""
    kind = CLASSES.get(name, (type(CONFIGS[config]).__name__,))[0]
    if kind == "PNDMScheduler":
        return steps < 4 and config != "sd1"
    return kind in ("LCMScheduler", "TCDScheduler") and steps > 50


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 13, 20, 33, 50, 75])
@pytest.mark.parametrize(
    ("config", "name"), [(config, name) for config in LINEAR for name in first_names_for(config)]
)
def test_the_weights_do_what_diffusers_does(config: str, name: Scheduler, steps: int) -> None:
    samplers = samplers_of(config)
    if refuses(config, name, steps):
        with pytest.raises(InvalidJobError, match=f"steps is {steps},"):
            samplers.schedule(name, steps)
        return
    schedule = samplers.schedule(name, steps)
    noise = torch.randn(SHAPE, generator=a_generator(1))
    path, expected = by_weights(schedule, noise), diffusers_own(config, name, steps, noise)
    assert len(path) == len(expected) == len(schedule.timesteps) == len(schedule.input_scale)
    # Rounding is relative to the largest latents on the way: 4096 at zero terminal SNR, and 1 at the end.
    largest = noise.abs().max() * schedule.noise_scale
    for mine, own in zip(path, expected, strict=True):
        largest = torch.maximum(largest, own.abs().max())
        assert (mine - own).abs().max() <= 5e-6 * largest


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20, 50])
@pytest.mark.parametrize("config", FLOWS)
def test_the_weights_do_what_diffusers_does_for_flow_matching(config: str, steps: int) -> None:
    options, noise = OPTIONS.get(config), torch.randn(SHAPE, generator=a_generator(1))
    schedule = samplers_of(config).schedule(Scheduler.DEFAULT, steps, options)
    expected = flow_loop(config, steps, noise)
    assert schedule.noise_scale == 1.0
    assert schedule.input_scale == (1.0,) * len(expected)
    path = by_weights(schedule, noise)
    assert len(path) == len(expected) == len(schedule.timesteps)
    for mine, own in zip(path, expected, strict=True):
        assert (mine - own).abs().max() <= 5e-6 * max(1.0, own.abs().max())
    # A sampler takes the same steps, one job at a time, over latents of any number of axes.
    tokens = samplers_of(config).own(Scheduler.DEFAULT, steps, a_generator(), options)
    latents = noise.flatten(2)
    for step, own in enumerate(expected):
        prediction = (guess(step) + 0.1 * tokens.model_input(latents, step).view(SHAPE)).flatten(2)
        tokens.advance(prediction * float("nan"), latents, step)
        latents, tokens = tokens.advance(prediction, latents, step)
        assert torch.equal(latents, own.flatten(2))


def test_schedules_with_other_options_are_others() -> None:
    samplers = samplers_of("flow euler, shifted by size")
    one, other = (samplers.schedule(Scheduler.EULER, 4, {"mu": mu}) for mu in (0.5, 1.0))
    assert one.timesteps != other.timesteps
    assert samplers.schedule(Scheduler.EULER, 4, {"mu": 0.5}) is one


def test_a_scheduler_that_does_not_fit_the_model_is_refused_with_those_that_do() -> None:
    with pytest.raises(
        InvalidJobError,
        match=r'scheduler is "ddim", but this is a flow-matching model: use "default" or "euler"\.',
    ):
        samplers_of("flow euler").own(Scheduler.DDIM, 4, a_generator())


@pytest.mark.parametrize("config", CONFIGS)
@settings(max_examples=10, deadline=None)
@given(name=st.sampled_from(list(Scheduler)), steps=st.integers(4, 24))
@example(name=Scheduler.DPMPP_2M_KARRAS, steps=24)
def test_every_step_is_diffusers_own(config: str, name: Scheduler, steps: int) -> None:
    assume(name in names_for(config))
    noise = torch.randn(SHAPE, generator=a_generator(1))
    sampler = samplers_of(config).own(name, steps, a_generator())
    path, expected = ours(sampler, noise), diffusers_own(config, name, steps, noise)
    assert len(path) == len(expected)
    for mine, own in zip(path, expected, strict=True):
        assert torch.equal(mine, own)


@pytest.mark.parametrize("name", [*sorted(FIRST_SCHEDULERS), Scheduler.HEUN, Scheduler.DPMPP_SDE])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(name: Scheduler, steps: int) -> None:
    noise = torch.randn(SHAPE, generator=a_generator(1))
    path = ours(samplers_of("sd1").own(name, steps, a_generator()), noise)
    expected = diffusers_own("sd1", name, steps, noise)
    assert all(map(torch.equal, path, expected))
    assert len(path) == len(expected)


def test_dpmpp_2m_is_what_its_name_says_whatever_the_models_config() -> None:
    for name, karras in ((Scheduler.DPMPP_2M, False), (Scheduler.DPMPP_2M_KARRAS, True)):
        config = samplers_of("sde").own(name, 5, a_generator()).scheduler.config
        assert config.algorithm_type == "dpmsolver++"
        assert config.solver_order == 2
        assert config.use_karras_sigmas is karras
    own = samplers_of("sde").own(Scheduler.DEFAULT, 5, a_generator()).scheduler.config
    assert (own.algorithm_type, own.solver_order) == ("sde-dpmsolver++", 3)


@pytest.mark.parametrize("config", ["sd2", "zero"])
def test_what_the_model_predicts_is_kept(config: str) -> None:
    for name in names_for(config):
        scheduler = samplers_of(config).own(name, 5, a_generator()).scheduler
        assert scheduler.config.prediction_type == "v_prediction"
        if config == "zero":
            assert scheduler.config.rescale_betas_zero_snr
            assert scheduler.config.timestep_spacing == "trailing"


def test_a_scheduler_that_knows_no_zero_terminal_snr_is_refused_for_it() -> None:
    """diffusers would leave that part of the config out, and draw from other noise."""
    with pytest.raises(InvalidJobError, match=r'"pndm", which does not support this model\'s noise schedule'):
        samplers_of("zero").own(Scheduler.PNDM, 8, a_generator())


def test_samplers_share_no_state() -> None:
    samplers = samplers_of("sd1")
    first = samplers.own(Scheduler.UNIPC, 8, a_generator())
    noise = torch.randn(SHAPE, generator=a_generator(1))
    alone = ours(first, noise)
    ours(samplers.own(Scheduler.UNIPC, 20, a_generator()), noise)
    assert all(map(torch.equal, ours(first, noise), alone))


def test_what_a_schedule_says_besides() -> None:
    samplers = samplers_of("sdxl")
    for name in Scheduler:
        schedule, sampler = samplers.schedule(name, 20), samplers.own(name, 20, a_generator())
        assert list(schedule.timesteps) == sampler.timesteps.tolist()
        assert schedule.noise_scale == sampler.noise_scale
    assert not any(samplers.schedule(Scheduler.DDIM, 4).draws)
    assert samplers.schedule(Scheduler.EULER_ANCESTRAL, 4).draws == (True, True, True, True)
    assert samplers.schedule(Scheduler.LCM, 4).draws == (True, True, True, False)


def test_slots_are_as_many_as_needed_and_those_not_in_use_are_zero() -> None:
    weights = samplers_of("sdxl").schedule(Scheduler.EULER, 8).weights
    assert weights is not None
    assert weights[:, 1:].count_nonzero() == 0
    assert weights[:, :, 1:SLOTS].count_nonzero() == 0
    used = set()
    for config in LINEAR:
        for name in names_for(config) if config == "sd1" else first_names_for(config):
            weights = samplers_of(config).schedule(name, 20).weights
            assert weights is not None
            used.add(int(weights.abs().amax((0, 2)).count_nonzero()))
    assert max(used) == SLOTS


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("DDIMScheduler", {"clip_sample": True}),
        # A clip that a random trajectory hardly ever reaches.
        ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 30, "prediction_type": "v_prediction"}),
        ("LCMScheduler", {"clip_sample": True}),
        ("DDIMScheduler", {"thresholding": True}),
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
        ("UniPCMultistepScheduler", {"thresholding": True, "sample_max_value": 20}),
        # More tensors than there are slots.
        ("UniPCMultistepScheduler", {"solver_order": SLOTS}),
        # Not a number from the first step on: the noise cannot be told from a picture without signal.
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        # Raises at its first step.
        ("EulerDiscreteScheduler", {"prediction_type": "tea leaves"}),
    ],
)
def test_what_is_not_linear_has_no_weights(kind: str, config: dict[str, Any]) -> None:
    samplers = Samplers(schedulers_of(scheduler_of(kind, **config)))
    schedule = samplers.schedule(Scheduler.DEFAULT, 9)
    assert (schedule.weights, schedule.input_scale, schedule.draws) == (None, (), ())
    assert list(schedule.timesteps) == samplers.own(Scheduler.DEFAULT, 9, a_generator()).timesteps.tolist()


@pytest.mark.parametrize("config", ["clips", "thresholds"])
def test_without_weights_the_jobs_own_sampler_is_exact(config: str) -> None:
    samplers, noise = samplers_of(config), torch.randn(SHAPE, generator=a_generator(1))
    assert samplers.schedule(Scheduler.DEFAULT, 9).weights is None
    path = ours(samplers.own(Scheduler.DEFAULT, 9, a_generator()), noise)
    expected = diffusers_own(config, Scheduler.DEFAULT, 9, noise)
    assert all(map(torch.equal, path, expected))
    # It does clip: a linear scheduler takes noise of twice the size to other latents.
    assert any(latents.abs().max() <= 1.0 for latents in path)


def test_a_schedule_is_made_once_for_all_threads() -> None:
    samplers, together = Samplers(schedulers_of(CONFIGS["sd1"])), threading.Barrier(8)

    def ask(number: int) -> tuple[int, Schedule]:
        together.wait(timeout=30)
        return number % 2, samplers.schedule(Scheduler.UNIPC, 20 + number % 2)

    with ThreadPoolExecutor(8) as pool:
        asked = list(pool.map(ask, range(8)))
    assert len({id(schedule) for _, schedule in asked}) == 2
    assert all(len(schedule.timesteps) == 20 + which for which, schedule in asked)
    assert samplers._cached.cache_info().misses == 2


def test_a_schedule_is_the_same_whatever_was_asked_for_before() -> None:
    samplers = samplers_of("sde")
    first = samplers.schedule(Scheduler.DEFAULT, 12).weights
    samplers.schedule(Scheduler.DEFAULT, 30)
    ours(samplers.own(Scheduler.DEFAULT, 12, a_generator()), torch.ones(SHAPE))
    samplers._cached.cache_clear()
    again = samplers.schedule(Scheduler.DEFAULT, 12).weights
    assert first is not None
    assert again is not None
    assert first is not again
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("config", "name", "steps", "sentence"),
    [
        ("sd1", Scheduler.LCM, 51, 'steps is 51, the limit of scheduler "lcm" with this model is 50'),
        ("lcm", Scheduler.DEFAULT, 60, 'the limit of scheduler "default" with this model is 50'),
        ("sdxl", Scheduler.PNDM, 3, "begins with 4 Runge-Kutta steps: use 4 or more"),
    ],
)
def test_refused_in_one_sentence(config: str, name: Scheduler, steps: int, sentence: str) -> None:
    with pytest.raises(InvalidJobError, match=sentence):
        samplers_of(config).own(name, steps, a_generator())
    with pytest.raises(InvalidJobError, match=sentence):
        samplers_of(config).schedule(name, steps)


def test_what_diffusers_refuses_is_the_callers_error() -> None:
    own = diffusers.DDIMScheduler(**NOISE, num_train_timesteps=40)
    with pytest.raises(
        InvalidJobError, match=r'steps is 41, which scheduler "default" refuses with this model'
    ):
        Samplers(schedulers_of(own)).own(Scheduler.DEFAULT, 41, a_generator())


def test_a_noise_schedule_that_a_class_does_not_know() -> None:
    samplers = Samplers(schedulers_of(diffusers.DDPMScheduler(beta_schedule="sigmoid")))
    samplers.own(Scheduler.DEFAULT, 5, a_generator())
    with pytest.raises(InvalidJobError, match='scheduler is "ddim", which does not support this model'):
        samplers.own(Scheduler.DDIM, 5, a_generator())
