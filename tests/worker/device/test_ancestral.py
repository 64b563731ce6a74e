"""Ancestral schedulers against k-diffusion's rules (0.1.1, sampling.py), written down here apart."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from tests.worker.device.noise_schedules import IN_DIFFUSERS
from tests.worker.device.test_noise_schedules import SEED, by_weights
from tests.worker.device.test_samplers import CONFIGS, SHAPE, a_generator, guess, schedulers_of
from worker.contract.choices import NoiseSchedule, Scheduler
from worker.contract.scheduler_names import OFFERED
from worker.device.schedulers.samplers import Samplers

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def get_ancestral_step(sigma_from: float, sigma_to: float, eta: float) -> tuple[float, float]:
    up = min(sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
    return (sigma_to**2 - up**2) ** 0.5, up


def euler(x: torch.Tensor, denoise: Denoise, sigma: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return x + (x - denoise(x, sigma)) / sigma * (down - sigma)


def dpm_2(x: torch.Tensor, denoise: Denoise, sigma: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    if down == 0:
        return euler(x, denoise, sigma, down)
    middle = sigma.log().lerp(down.log(), 0.5).exp()
    between = euler(x, denoise, sigma, middle)
    return x + (between - denoise(between, middle)) / middle * (down - sigma)


def dpmpp_2s(x: torch.Tensor, denoise: Denoise, sigma: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    if down == 0:
        return euler(x, denoise, sigma, down)
    t, t_next = -sigma.log(), -down.log()
    h = t_next - t
    s = t + 0.5 * h
    between = (-s).exp() / (-t).exp() * x - (-h * 0.5).expm1() * denoise(x, sigma)
    return (-t_next).exp() / (-t).exp() * x - (-h).expm1() * denoise(between, (-s).exp())


STEPS = {
    Scheduler.EULER_ANCESTRAL: euler,
    Scheduler.DPM2_ANCESTRAL: dpm_2,
    Scheduler.DPMPP_2S_ANCESTRAL: dpmpp_2s,
}


@functools.cache
def made(config: str, kind: str, schedule: NoiseSchedule) -> Any:
    return getattr(diffusers, kind).from_config(CONFIGS[config].config, **IN_DIFFUSERS[schedule])


def by_k_diffusion(
    config: str, name: Scheduler, schedule: NoiseSchedule, steps: int, eta: float
) -> torch.Tensor:
    """The last latents. The noise levels are those of diffusers' class."""
    is_euler = name is Scheduler.EULER_ANCESTRAL
    kind = "EulerAncestralDiscreteScheduler" if is_euler else "KDPM2AncestralDiscreteScheduler"
    own = CONFIGS[config].config
    scheduler = made(config, kind, schedule)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    if not is_euler:  # Each but the first and the last is there twice, and the last once more.
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1:2]])
    evaluations = iter(range(1000))
    is_v = own.get("prediction_type") == "v_prediction"

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen = x / (sigma**2 + 1).sqrt()
        prediction = guess(next(evaluations)) + 0.1 * seen
        if is_v:
            return x / (sigma**2 + 1) - prediction * sigma / (sigma**2 + 1).sqrt()
        return x - sigma * prediction

    generator = a_generator(SEED)
    x = torch.randn(SHAPE, generator=a_generator(1)).double() * float(scheduler.init_noise_sigma)
    for sigma, following in itertools.pairwise(sigmas):
        down, up = get_ancestral_step(float(sigma), float(following), eta)
        x = STEPS[name](x, denoise, sigma, torch.tensor(down).double())
        if following > 0:
            x = x + torch.randn(SHAPE, generator=generator) * up
    return x


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("config", "eta"), [("sd2", 0.0), ("sd1", 0.67), ("sd1", 1.0)])
def test_eta_is_k_diffusions(name: Scheduler, config: str, eta: float) -> None:
    samplers = Samplers(schedulers_of(CONFIGS[config]))
    for steps in (1, 2, 8):
        mine = by_weights(samplers.schedule(name, steps, eta=None if eta == 1 else eta))
        expected = by_k_diffusion(config, name, NoiseSchedule.DEFAULT, steps, eta)
        largest = max(float(each.abs().max()) for each in mine)
        # Rounding to float32, where a step divides by a last noise level of 0.03 after a leap.
        assert (mine[-1] - expected).abs().max() <= (1e-4 if steps < 4 else 2e-5) * largest


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(each, marks=() if each is NoiseSchedule.KARRAS else pytest.mark.slow)
        for each in OFFERED[Scheduler.DPMPP_2S_ANCESTRAL]
    ],
)
def test_dpmpp_2s_ancestral_is_k_diffusions_with_every_schedule(schedule: NoiseSchedule) -> None:
    samplers = Samplers(schedulers_of(CONFIGS["sdxl"]))
    mine = by_weights(samplers.schedule(Scheduler.DPMPP_2S_ANCESTRAL, 7, noise=schedule))
    expected = by_k_diffusion("sdxl", Scheduler.DPMPP_2S_ANCESTRAL, schedule, 7, 1.0)
    largest = max(float(each.abs().max()) for each in mine)
    assert (mine[-1] - expected).abs().max() <= 2e-5 * largest


@pytest.mark.parametrize("name", [Scheduler.EULER_ANCESTRAL, Scheduler.DPMPP_2S_ANCESTRAL])
def test_a_step_may_be_taken_again(name: Scheduler) -> None:
    """As a job's own sampler, where its scheduler has no weights: the same latents as by weights."""
    samplers = Samplers(schedulers_of(CONFIGS["sd1"]))
    sampler = samplers.own(name, 4, a_generator(SEED), eta=0.5)
    latents = torch.randn(SHAPE, generator=a_generator(1)) * sampler.noise_scale
    for step in range(len(sampler.timesteps)):
        prediction = guess(step) + 0.1 * sampler.model_input(latents, step)
        sampler.advance(prediction * float("nan"), latents, step)
        latents, sampler = sampler.advance(prediction, latents, step)
    expected = by_weights(samplers.schedule(name, 4, eta=0.5))[-1]
    assert torch.allclose(latents, expected, rtol=1e-4, atol=1e-3)
