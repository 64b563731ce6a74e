"""What a noise schedule asks of diffusers' schedulers: options of their config, and of `set_timesteps`.

The options are those of the table "Noise schedules and schedule types" in diffusers' documentation
(api/schedulers/overview). A class offers a schedule if its signature has them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers.schedulers import AysSchedules

from worker.contract.choices import NoiseSchedule

#: The options of which at most one is on.
_SIGMAS = {
    NoiseSchedule.KARRAS: "use_karras_sigmas",
    NoiseSchedule.EXPONENTIAL: "use_exponential_sigmas",
    NoiseSchedule.BETA: "use_beta_sigmas",
}
_OTHER_SIGMAS = ("use_lu_lambdas",)
#: Where the timesteps lie. A class that has no such option spaces these schedules as it says here.
_SPACING = {
    NoiseSchedule.EXPONENTIAL: "linspace",
    NoiseSchedule.BETA: "linspace",
    NoiseSchedule.SGM_UNIFORM: "trailing",
    NoiseSchedule.SIMPLE: "trailing",
}
#: Schedules that are given by their timesteps.
_BY_TIMESTEPS = (NoiseSchedule.SIMPLE, NoiseSchedule.ALIGN_YOUR_STEPS)


def is_offered(kind: type, schedule: NoiseSchedule) -> bool:
    """Whether diffusers' scheduler class takes what the schedule asks for."""
    takes = _parameters(kind.__init__)  # type: ignore[misc]
    if schedule in _SIGMAS:
        return _SIGMAS[schedule] in takes
    if schedule in _BY_TIMESTEPS:
        return "timesteps" in _parameters(kind.set_timesteps)  # type: ignore[attr-defined]
    return schedule is NoiseSchedule.DEFAULT or "timestep_spacing" in takes


def config_of(kind: type, schedule: NoiseSchedule) -> dict[str, Any]:
    """What the config of that class has in it for the schedule, whatever the model's config says."""
    if schedule is NoiseSchedule.DEFAULT:
        return {}
    options: dict[str, Any] = {option: each is schedule for each, option in _SIGMAS.items()}
    options |= dict.fromkeys(_OTHER_SIGMAS, False)
    if schedule in _SPACING:
        options["timestep_spacing"] = _SPACING[schedule]
    takes = _parameters(kind.__init__)  # type: ignore[misc]
    return {name: value for name, value in options.items() if name in takes}


def timesteps_of(scheduler: Any, schedule: NoiseSchedule, steps: int, tables: str) -> dict[str, Any]:
    """The arguments of `set_timesteps`. `tables`: how those of Align Your Steps begin for the model."""
    if schedule is NoiseSchedule.SIMPLE:
        return {"timesteps": simple_timesteps(steps, scheduler.config.num_train_timesteps)}
    if schedule is not NoiseSchedule.ALIGN_YOUR_STEPS:
        return {"num_inference_steps": steps}
    if "sigmas" in _parameters(scheduler.set_timesteps):
        return {"sigmas": AysSchedules[f"{tables}Sigmas"]}
    return {"timesteps": AysSchedules[f"{tables}Timesteps"]}


def simple_timesteps(steps: int, trained: int) -> list[int]:
    """Every so many of the model's timesteps, from the last one on: `simple_scheduler` of ComfyUI 0.3
    (comfy/samplers.py) and of AUTOMATIC1111 1.10 (modules/sd_schedulers.py)."""
    return [trained - 1 - int(step * trained / steps) for step in range(steps)]


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters
