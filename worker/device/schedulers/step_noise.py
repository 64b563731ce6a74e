"""The noise that a job's steps add."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from worker.device.schedulers.schedule import Brownian, Schedule

# The ends of a path are rounded, and so may lie within the first or the last interval by a millionth.
warnings.filterwarnings("ignore", message="Should have t[ab]", module="torchsde")


class StepNoise:
    """The noise of one job's steps, float32 on the CPU."""

    def __init__(self, schedule: Schedule, generator: torch.Generator, shape: Sequence[int]) -> None:
        """Of tensors of `shape`. `generator` has the job's seed, after the draws so far.

        A Brownian path is computed here, for all steps: 4 to 15 ms a step, which the steps of other jobs
        would wait for.
        """
        self._draws, self._generator, self._shape = schedule.draws, generator, (1, *shape)
        self._path: list[torch.Tensor | None] = []
        if schedule.brownian is not None:
            self._path = _path(schedule.brownian, generator.initial_seed(), self._shape)

    def of(self, step: int) -> torch.Tensor | None:
        """The noise of step `step`; None: it adds none. Asked for once a step, in the order of the steps."""
        if not self._draws or not self._draws[step]:
            return None
        if self._path:
            noise, self._path[step] = self._path[step], None
            return noise
        return torch.randn(self._shape, generator=self._generator)[0]


def _path(brownian: Brownian, seed: int, shape: tuple[int, ...]) -> list[torch.Tensor | None]:
    """The noise of each step, as diffusers' DPMSolverSDEScheduler has it for `noise_sampler_seed=seed`."""
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    path = BrownianTreeNoiseSampler(torch.zeros(shape), *brownian.ends, seed)
    return [None if each is None else path(*each)[0] for each in brownian.intervals]
