"""Ancestral schedulers by k-diffusion's rule, where diffusers has none: with `eta`, and DPM++ 2S.

A step of an ancestral sampler goes to a lower noise level than the next one, and adds noise up to that.
`eta` says how much of it is new: 1 is all that there can be, which is what diffusers' classes do, and 0 none.
Source: k-diffusion 0.1 (sampling.py: get_ancestral_step, sample_euler_ancestral, sample_dpm_2_ancestral,
sample_dpmpp_2s_ancestral), as AUTOMATIC1111 and ComfyUI have it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteScheduler

from worker.device.schedulers.schedule import copied_generator


def _up_and_down(
    sigma: torch.Tensor, following: torch.Tensor, eta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise level that a step adds, and the one that it goes down to before. Both 0: it ends at 0."""
    most = (following**2 * (sigma**2 - following**2) / sigma**2).clamp(min=0).sqrt()
    up = torch.minimum(following, eta * most.nan_to_num())
    return up, (following**2 - up**2).sqrt()


class EulerAncestral(EulerAncestralDiscreteScheduler):  # type: ignore[misc]
    """Euler's ancestral sampler with `eta`."""

    #: 0 to 1.
    eta = 1.0

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As diffusers', whose noise is drawn once more, for another share of it."""
        drawn = copied_generator(generator)
        _, picture = super().step(model_output, timestep, sample, generator, return_dict=False)
        sigma, following = self.sigmas[self.step_index - 1], self.sigmas[self.step_index]
        up, down = _up_and_down(sigma, following, self.eta)
        noise = torch.randn(sample.shape, generator=drawn).to(sample)
        return sample + (sample - picture) / sigma * (down - sigma) + noise * up, picture


class DPM2Ancestral(KDPM2AncestralDiscreteScheduler):  # type: ignore[misc]
    """DPM-Solver-2's ancestral sampler with `eta`."""

    #: 0 to 1.
    eta = 1.0

    def set_timesteps(self, num_inference_steps: int, *others: Any, **named: Any) -> None:
        """As diffusers', with the noise levels and the timesteps between that `eta` makes others."""
        super().set_timesteps(num_inference_steps, *others, **named)
        if self.eta == 1.0:
            return
        # diffusers keeps each but the first and the last twice: for both evaluations of a step.
        sigmas = torch.cat([self.sigmas[:1], self.sigmas[1:-1:2]])
        following = torch.cat([sigmas[1:], sigmas.new_zeros(1)])
        up, down = _up_and_down(sigmas, following, self.eta)
        between = sigmas.log().lerp(down.log(), 0.5).exp()
        between[-2:] = 0.0
        self.sigmas_up, self.sigmas_down, self.sigmas_interpol = (
            torch.cat([each[:1], each[1:].repeat_interleave(2), each[-1:]]) for each in (up, down, between)
        )
        log_sigmas = self.log_sigmas.cpu()
        for step, sigma in enumerate(between[:-2]):
            self.timesteps[1 + 2 * step] = float(self._sigma_to_t(sigma, log_sigmas))


class DPMPP2SAncestral(DPM2Ancestral):
    """DPM-Solver++(2S)'s ancestral sampler (Lu et al., 2022), which diffusers has not.

    Its first evaluation, its noise levels and its timesteps are those of DPM-Solver-2.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents after the evaluation, and the picture that it predicts."""
        if self.state_in_first_order:
            after: tuple[torch.Tensor, torch.Tensor] = super().step(
                model_output, timestep, sample, generator, return_dict=False
            )
            return after
        first, drawn = self.sample, copied_generator(generator)
        _, picture = super().step(model_output, timestep, sample, generator, return_dict=False)
        at = self.step_index - 2
        ratio = self.sigmas_down[at] / self.sigmas[at]
        noise = torch.randn(sample.shape, generator=drawn).to(sample)
        return ratio * first + (1 - ratio) * picture + noise * self.sigmas_up[at], picture


#: Those that take diffusers' place where `eta` is another than 1.
WITH_ETA: dict[str, type] = {
    "EulerAncestralDiscreteScheduler": EulerAncestral,
    "KDPM2AncestralDiscreteScheduler": DPM2Ancestral,
}
#: Those that diffusers has not, by their name in the table of classes.
OURS: dict[str, type] = {"DPMPP2SAncestral": DPMPP2SAncestral}
