"""Samplers against diffusers' schedulers, without any model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from worker.errors import InvalidJobError
from worker.job import Scheduler
from worker.samplers import CLASSES, Sampler, Samplers

SHAPE = (1, 5, 4, 6)
NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
#: Configs as models have them.
CONFIGS: dict[str, Any] = {
    "sd1": diffusers.PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1),
    "sd2": diffusers.DDIMScheduler(
        **NOISE, prediction_type="v_prediction", clip_sample=False, steps_offset=1
    ),
    "zero": diffusers.DDIMScheduler(
        **NOISE, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "sdxl": diffusers.EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1),
    "sde": diffusers.DPMSolverMultistepScheduler(
        **NOISE, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True, solver_order=3
    ),
    "lcm": diffusers.LCMScheduler(**NOISE),
    "heun": diffusers.HeunDiscreteScheduler(**NOISE),
    "turbo": diffusers.EulerAncestralDiscreteScheduler(**NOISE, timestep_spacing="trailing"),
}


def a_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def samplers_of(config: str) -> Samplers:
    return Samplers(SimpleNamespace(scheduler=CONFIGS[config]))


def guess(step: int) -> torch.Tensor:
    """What a UNet might say."""
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


def diffusers_own(config: str, name: Scheduler, steps: int, noise: torch.Tensor) -> list[torch.Tensor]:
    """The same by diffusers' loop: pipeline_stable_diffusion_xl.py, step 9.

    `pipeline_stable_diffusion.py` is the same but for `set_begin_index`, without which it raises an
    IndexError where the first two timesteps are the same.
    """
    own = CONFIGS[config]
    kind, options = CLASSES.get(name, (type(own).__name__, {}))
    scheduler = getattr(diffusers, kind).from_config(own.config, **options)
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


@pytest.mark.parametrize("config", CONFIGS)
@settings(max_examples=10, deadline=None)
@given(name=st.sampled_from(list(Scheduler)), steps=st.integers(4, 24))
@example(name=Scheduler.DPMPP_2M_KARRAS, steps=24)
def test_every_step_is_diffusers_own(config: str, name: Scheduler, steps: int) -> None:
    noise = torch.randn(SHAPE, generator=a_generator(1))
    sampler = samplers_of(config).make(name, steps, a_generator())
    path, expected = ours(sampler, noise), diffusers_own(config, name, steps, noise)
    assert len(path) == len(expected)
    for mine, own in zip(path, expected, strict=True):
        assert torch.equal(mine, own)


@pytest.mark.parametrize("name", list(Scheduler))
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(name: Scheduler, steps: int) -> None:
    noise = torch.randn(SHAPE, generator=a_generator(1))
    path = ours(samplers_of("sd1").make(name, steps, a_generator()), noise)
    expected = diffusers_own("sd1", name, steps, noise)
    assert all(map(torch.equal, path, expected))
    assert len(path) == len(expected)


def test_dpmpp_2m_is_what_its_name_says_whatever_the_models_config() -> None:
    for name, karras in ((Scheduler.DPMPP_2M, False), (Scheduler.DPMPP_2M_KARRAS, True)):
        config = samplers_of("sde").make(name, 5, a_generator())._scheduler.config
        assert config.algorithm_type == "dpmsolver++"
        assert config.solver_order == 2
        assert config.use_karras_sigmas is karras
    own = samplers_of("sde").make(Scheduler.DEFAULT, 5, a_generator())._scheduler.config
    assert (own.algorithm_type, own.solver_order) == ("sde-dpmsolver++", 3)


@pytest.mark.parametrize("config", ["sd2", "zero"])
def test_what_the_model_predicts_is_kept(config: str) -> None:
    for name in Scheduler:
        scheduler = samplers_of(config).make(name, 5, a_generator())._scheduler
        assert scheduler.config.prediction_type == "v_prediction"
        if config == "zero" and hasattr(scheduler.config, "rescale_betas_zero_snr"):
            assert scheduler.config.rescale_betas_zero_snr
            assert scheduler.config.timestep_spacing == "trailing"


def test_samplers_share_no_state() -> None:
    samplers = samplers_of("sd1")
    first = samplers.make(Scheduler.UNIPC, 8, a_generator())
    noise = torch.randn(SHAPE, generator=a_generator(1))
    alone = ours(first, noise)
    ours(samplers.make(Scheduler.UNIPC, 20, a_generator()), noise)
    assert all(map(torch.equal, ours(first, noise), alone))


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
        samplers_of(config).make(name, steps, a_generator())


def test_what_diffusers_refuses_is_the_callers_error() -> None:
    own = diffusers.DDIMScheduler(**NOISE, num_train_timesteps=40)
    with pytest.raises(
        InvalidJobError, match=r'steps is 41, which scheduler "default" refuses with this model'
    ):
        Samplers(SimpleNamespace(scheduler=own)).make(Scheduler.DEFAULT, 41, a_generator())


def test_a_noise_schedule_that_a_class_does_not_know() -> None:
    samplers = Samplers(SimpleNamespace(scheduler=diffusers.DDPMScheduler(beta_schedule="sigmoid")))
    samplers.make(Scheduler.DEFAULT, 5, a_generator())
    with pytest.raises(InvalidJobError, match='scheduler is "ddim", which does not know this model'):
        samplers.make(Scheduler.DDIM, 5, a_generator())
