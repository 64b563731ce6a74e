"""Schedulers by every name that people write: a table of spellings, and one function that reads it.

Other programs say in two words what one of our names says: the sampler, and the schedule of its noise levels.
Each schedule that a sampler is offered with is a `Scheduler` of its own. What is not offered is refused by
name: no schedule is dropped.

Sources: AUTOMATIC1111 1.10 and Forge (modules/sd_samplers_kdiffusion.py, sd_samplers_timesteps.py,
sd_samplers_lcm.py, sd_schedulers.py), ComfyUI 0.3 (comfy/samplers.py), k-diffusion 0.1 (sampling.py),
diffusers 0.42 (schedulers/), InvokeAI 5 (backend/stable_diffusion/schedulers/schedulers.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from worker.contract.choices import Scheduler
from worker.contract.errors import InvalidJobError
from worker.contract.explain import short
from worker.contract.spelling import distance

#: How each sampler is written. Case, blanks, dashes and underscores do not count; "++" is "pp"; a leading
#: "k_" or "sample_" (k-diffusion's) may stand before each.
SAMPLER_NAMES: Mapping[Scheduler, tuple[str, ...]] = MappingProxyType(
    {
        Scheduler.DEFAULT: ("default",),
        Scheduler.DDIM: ("ddim", "DDIMScheduler"),
        Scheduler.EULER: ("euler", "EulerDiscreteScheduler"),
        Scheduler.EULER_ANCESTRAL: ("euler_ancestral", "Euler a", "EulerAncestralDiscreteScheduler"),
        Scheduler.DPMPP_2M: ("DPM++ 2M", "dpmpp_2m", "DPMSolverMultistepScheduler"),
        # Latent diffusion's name, which AUTOMATIC1111 and early InvokeAI use.
        Scheduler.PNDM: ("pndm", "PLMS", "PNDMScheduler"),
        # ComfyUI's two differ by their B(h); diffusers' own is bh2.
        Scheduler.UNIPC: ("unipc", "uni_pc", "uni_pc_bh2", "UniPCMultistepScheduler"),
        Scheduler.LCM: ("lcm", "LCMScheduler"),
    }
)

#: How each schedule is written. The empty one is the sampler's own: what k-diffusion calls uniform.
SCHEDULE_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "": ("normal", "uniform", "default"),
        # AUTOMATIC1111 and Forge: what the sampler is made with there, which is `_AUTOMATIC`.
        "automatic": ("automatic",),
        # "_k" is InvokeAI's, "_ka" AUTOMATIC1111's short form.
        "karras": ("karras", "k", "ka"),
        "exponential": ("exponential",),
        "polyexponential": ("polyexponential",),
        "sgm_uniform": ("sgm_uniform",),
        "simple": ("simple",),
        "ddim_uniform": ("ddim_uniform", "ddim"),
        "beta": ("beta", "beta57"),
        "linear_quadratic": ("linear_quadratic",),
        "kl_optimal": ("kl_optimal",),
        "align_your_steps": ("align_your_steps", "ays", "AYS 32", "Align Your Steps GITS"),
        "turbo": ("turbo",),
    }
)

#: The schedules that are offered beside each sampler's own, and the scheduler that each makes of it.
OFFERED: Mapping[tuple[Scheduler, str], Scheduler] = MappingProxyType(
    {
        (Scheduler.DPMPP_2M, "karras"): Scheduler.DPMPP_2M_KARRAS,
        # The names of their own timesteps: DDIM's at AUTOMATIC1111 and ComfyUI, LCM's in ComfyUI's example.
        (Scheduler.DDIM, "ddim_uniform"): Scheduler.DDIM,
        (Scheduler.LCM, "sgm_uniform"): Scheduler.LCM,
    }
)
#: What AUTOMATIC1111's "Automatic" is, where it is not the empty schedule (`scheduler` in its options there).
_AUTOMATIC = {Scheduler.DPMPP_2M: "karras"}

#: diffusers' options of a scheduler: those that say a schedule, and those that may have one value only.
_SCHEDULE_OPTIONS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}
_FIXED_OPTIONS = {
    (Scheduler.DPMPP_2M, "algorithm_type"): "dpmsolver++",
    (Scheduler.DPMPP_2M, "solver_order"): "2",
    (Scheduler.DPMPP_2M, "solver_type"): "midpoint",
    (Scheduler.UNIPC, "solver_order"): "2",
    (Scheduler.UNIPC, "solver_type"): "bh2",
}
#: `Class(option=value, ...)`, or the same without brackets.
_WITH_OPTIONS = re.compile(r"(\w+Scheduler)\s*[(, ]\s*(\w+\s*=[^()]*)\)?\s*", re.IGNORECASE)
#: Samplers that are not offered and whose names are one letter from one that is.
_OTHERS = frozenset(("ddpm", "dpmpp2s", "dpmpp3m", "dpm2m", "ipndm", "lms"))
#: Characters of a name, at least, that may be misspelt.
_SHORTEST_NEAR = 4
#: A name is no longer than this; more is no name, and is not looked at.
_LONGEST = 500


def _plain(name: str) -> str:
    """A name without what does not count in it."""
    return re.sub(r"[\s_\-]", "", name.casefold().replace("++", "pp"))


_SAMPLERS = {_plain(name): sampler for sampler, names in SAMPLER_NAMES.items() for name in names}
_SCHEDULES = {_plain(name): schedule for schedule, names in SCHEDULE_NAMES.items() for name in names}


def scheduler_of(sampler: str | None, schedule: str | None = None) -> Scheduler:
    """The scheduler that a sampler's name and a schedule's name mean together, however they are written.

    `sampler` may have the schedule as its last word ("DPM++ 2M Karras"). Where `schedule` is not given, it is
    the sampler's own; where `sampler` is not given, a `schedule` that is a sampler's name is read as one.
    Raises `InvalidJobError` with one sentence for what is not known or not offered.
    """
    try:
        found = _scheduler(sampler or "", schedule or "")
    except ValueError as error:
        raise InvalidJobError(f"scheduler {error}.") from None
    return found


def spelled_as_scheduler(value: object) -> object:
    """For the field's own check: the scheduler that a text means. Raises `ValueError` as `scheduler_of`."""
    if not isinstance(value, str) or isinstance(value, Scheduler):
        return value
    return _scheduler(value, "")


def _scheduler(sampler: str, schedule: str) -> Scheduler:
    """The scheduler. Raises `ValueError` with a sentence's end that begins after the word "scheduler"."""
    if not sampler.strip():
        if not schedule.strip() or _SCHEDULES.get(_plain(schedule[:_LONGEST])) in ("", "automatic"):
            return Scheduler.DEFAULT
        sampler, schedule = schedule, ""
    base, own = _read_sampler(sampler)
    asked = "" if own is None else own
    if schedule.strip():
        given = _SCHEDULES.get(_plain(schedule[:_LONGEST]), schedule)
        if own in (None, "automatic"):
            asked = given
        elif given not in (own, "automatic"):
            raise ValueError(f"is {short(sampler)} with the schedule {short(schedule)}: use one of the two")
    if asked == "automatic":
        asked = _AUTOMATIC.get(base, "")
    if not asked:
        return base
    if (base, asked) not in OFFERED:
        offered = ["normal", *(each for start, each in OFFERED if start is base)]
        raise ValueError(
            f"is {short(sampler)} with the schedule {short(schedule.strip() or asked)}, which is not offered:"
            f" use {' or '.join(offered)} with it, or another of {', '.join(Scheduler)}"
        )
    return OFFERED[base, asked]


def _read_sampler(text: str) -> tuple[Scheduler, str | None]:
    """The sampler, and the schedule that its name says; None where it says none."""
    name = text.strip()
    if len(name) <= _LONGEST:
        if with_options := _WITH_OPTIONS.fullmatch(name):
            base = _known(with_options[1])
            if base is not None:
                return base, _read_options(base, with_options[2])
        if (base := _known(name)) is not None:
            return base, None
        words = re.split(r"[\s_\-]+", name)
        for count in (1, 2, 3, 4):
            schedule = _SCHEDULES.get(_plain("".join(words[-count:])))
            base = _known("".join(words[:-count]))
            if schedule is not None and base is not None:
                return base, schedule
        if _plain(name) in _SCHEDULES:
            raise ValueError(
                f"is {short(text)}, which is a schedule: name the sampler too, such as DPM++ 2M Karras"
            )
    near = _near(_plain(name)) if len(name) <= _LONGEST else None
    hint = f'did you mean "{near}"? Use' if near else "use"
    raise ValueError(f"is {short(text)}: {hint} one of {', '.join(Scheduler)}")


def _known(name: str) -> Scheduler | None:
    plain = _plain(name)
    names = (plain, plain.removeprefix("k"), plain.removeprefix("sample"))
    return next((_SAMPLERS[each] for each in names if each in _SAMPLERS), None)


def _near(plain: str) -> Scheduler | None:
    """The sampler whose name is one letter away; None for what is another sampler's name."""
    spellings = {plain, plain.removeprefix("k"), plain.removeprefix("sample")}
    if spellings & _OTHERS or len(plain) < _SHORTEST_NEAR:
        return None
    return next((each for name, each in _SAMPLERS.items() if distance(plain, name) == 1), None)


def _read_options(base: Scheduler, text: str) -> str | None:
    """The schedule that diffusers' options of a scheduler say. Others are refused where they change it."""
    schedule = None
    for option in text.split(","):
        name, _, value = (part.strip().strip("\"'") for part in option.partition("="))
        if not name:
            continue
        if name in _SCHEDULE_OPTIONS and value.casefold() in ("true", "false", "1", "0"):
            schedule = _SCHEDULE_OPTIONS[name] if value.casefold() in ("true", "1") else schedule or ""
        elif _FIXED_OPTIONS.get((base, name)) != value:
            raise ValueError(f"has the option {short(f'{name}={value}')}, which is not offered: leave it out")
    return schedule
