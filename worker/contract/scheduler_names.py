"""Schedulers by every name that people write: a table of spellings, and one function that reads it.

Other programs say in two words what a job says in two fields: the sampler, and the schedule of its noise
levels. Which schedules each sampler is offered with is in `OFFERED`. What is not offered is refused by name:
no schedule is dropped.

Sources: AUTOMATIC1111 1.10 and Forge (modules/sd_samplers_kdiffusion.py, sd_samplers_timesteps.py,
sd_samplers_lcm.py, sd_schedulers.py), ComfyUI 0.3 (comfy/samplers.py), k-diffusion 0.1 (sampling.py),
diffusers 0.42 (schedulers/), InvokeAI 5 (backend/stable_diffusion/schedulers/schedulers.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from worker.contract.choices import NoiseSchedule, Scheduler
from worker.contract.errors import InvalidJobError
from worker.contract.explain import short
from worker.contract.spelling import distance

#: How each sampler is written. Case, blanks, dashes and underscores do not count; "++" is "pp"; a leading
#: "k_" or "sample_" (k-diffusion's) may stand before each, and ComfyUI's "_gpu" after it: there it says
#: where the noise is drawn.
SAMPLER_NAMES: Mapping[Scheduler, tuple[str, ...]] = MappingProxyType(
    {
        # Civitai's "Undefined" is a picture whose sampler it does not know.
        Scheduler.DEFAULT: ("default", "Undefined"),
        Scheduler.DDIM: ("ddim", "DDIMScheduler"),
        Scheduler.EULER: ("euler", "EulerDiscreteScheduler"),
        Scheduler.EULER_ANCESTRAL: ("euler_ancestral", "Euler a", "EulerAncestralDiscreteScheduler"),
        Scheduler.DPMPP_2M: ("DPM++ 2M", "dpmpp_2m", "DPMSolverMultistepScheduler"),
        # Latent diffusion's name, which AUTOMATIC1111 and early InvokeAI use.
        Scheduler.PNDM: ("pndm", "PLMS", "PNDMScheduler"),
        # ComfyUI's two differ by their B(h); diffusers' own is bh2.
        Scheduler.UNIPC: ("unipc", "uni_pc", "uni_pc_bh2", "UniPCMultistepScheduler"),
        Scheduler.LCM: ("lcm", "LCMScheduler"),
        Scheduler.HEUN: ("heun", "HeunDiscreteScheduler"),
        Scheduler.DPM2: ("dpm2", "dpm_2", "KDPM2DiscreteScheduler"),
        Scheduler.DPM2_ANCESTRAL: ("dpm2_ancestral", "DPM2 a", "KDPM2AncestralDiscreteScheduler"),
        Scheduler.LMS: ("lms", "LMSDiscreteScheduler"),
        Scheduler.DDPM: ("ddpm", "DDPMScheduler"),
        Scheduler.DEIS: ("deis", "DEISMultistepScheduler"),
        Scheduler.DPMPP_2S: ("DPM++ 2S", "dpmpp_2s", "DPMSolverSinglestepScheduler"),
        Scheduler.DPMPP_2S_ANCESTRAL: ("DPM++ 2S a", "dpmpp_2s_ancestral"),
        Scheduler.DPMPP_SDE: ("DPM++ SDE", "dpmpp_sde", "DPMSolverSDEScheduler"),
        Scheduler.DPMPP_2M_SDE: ("DPM++ 2M SDE", "dpmpp_2m_sde"),
        Scheduler.DPMPP_3M_SDE: ("DPM++ 3M SDE", "dpmpp_3m_sde"),
        Scheduler.TCD: ("tcd", "TCDScheduler"),
        Scheduler.SA_SOLVER: ("sa_solver", "sa", "SASolverScheduler"),
    }
)

#: How each schedule is written, by our own name where it is offered. The default is the sampler's own: what
#: k-diffusion calls uniform.
SCHEDULE_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        NoiseSchedule.DEFAULT: ("normal", "uniform", "default"),
        # AUTOMATIC1111 and Forge: what the sampler is made with there, which is `AUTOMATIC`.
        "automatic": ("automatic",),
        # "_k" is InvokeAI's, "_ka" AUTOMATIC1111's short form.
        NoiseSchedule.KARRAS: ("karras", "k", "ka"),
        NoiseSchedule.EXPONENTIAL: ("exponential",),
        NoiseSchedule.BETA: ("beta",),
        NoiseSchedule.SGM_UNIFORM: ("sgm_uniform",),
        NoiseSchedule.SIMPLE: ("simple",),
        NoiseSchedule.ALIGN_YOUR_STEPS: ("align_your_steps", "ays"),
        "polyexponential": ("polyexponential",),
        "ddim_uniform": ("ddim_uniform", "ddim"),
        "beta57": ("beta57",),
        "linear_quadratic": ("linear_quadratic",),
        "kl_optimal": ("kl_optimal",),
        "ays_32": ("AYS 32",),
        "align_your_steps_gits": ("Align Your Steps GITS",),
        "turbo": ("turbo",),
    }
)

_SIGMAS = (NoiseSchedule.KARRAS, NoiseSchedule.EXPONENTIAL, NoiseSchedule.BETA)
_TRAILING = (NoiseSchedule.SGM_UNIFORM,)
_TIMESTEPS = (NoiseSchedule.SIMPLE, NoiseSchedule.ALIGN_YOUR_STEPS)
#: The schedules that each sampler is offered with beside its own: those that its class of diffusers takes by
#: its signature. tests/worker/device/test_schedules.py compares them.
OFFERED: Mapping[Scheduler, tuple[NoiseSchedule, ...]] = MappingProxyType(
    {
        Scheduler.DEFAULT: (),
        Scheduler.DDIM: _TRAILING,
        Scheduler.EULER: (*_SIGMAS, *_TRAILING, *_TIMESTEPS),
        Scheduler.EULER_ANCESTRAL: _TRAILING,
        Scheduler.DPMPP_2M: (*_SIGMAS, *_TRAILING, *_TIMESTEPS),
        Scheduler.PNDM: _TRAILING,
        Scheduler.UNIPC: (*_SIGMAS, *_TRAILING),
        Scheduler.LCM: (),
        Scheduler.HEUN: (*_SIGMAS, *_TRAILING, *_TIMESTEPS),
        Scheduler.DPM2: (*_SIGMAS, *_TRAILING),
        Scheduler.DPM2_ANCESTRAL: (*_SIGMAS, *_TRAILING),
        Scheduler.LMS: (*_SIGMAS, *_TRAILING),
        Scheduler.DDPM: (*_TRAILING, *_TIMESTEPS),
        Scheduler.DEIS: (*_SIGMAS, *_TRAILING),
        Scheduler.DPMPP_2S: (*_SIGMAS, *_TIMESTEPS),
        Scheduler.DPMPP_2S_ANCESTRAL: (*_SIGMAS, *_TRAILING),
        Scheduler.DPMPP_SDE: (*_SIGMAS, *_TRAILING),
        Scheduler.DPMPP_2M_SDE: (*_SIGMAS, *_TRAILING, *_TIMESTEPS),
        Scheduler.DPMPP_3M_SDE: (*_SIGMAS, *_TRAILING, *_TIMESTEPS),
        Scheduler.TCD: (),
        Scheduler.SA_SOLVER: (*_SIGMAS, *_TRAILING),
    }
)
#: Pairs that have a name of their own, which is older than the field for schedules.
ONE_NAME: Mapping[tuple[Scheduler, str], Scheduler] = MappingProxyType(
    {(Scheduler.DPMPP_2M, NoiseSchedule.KARRAS): Scheduler.DPMPP_2M_KARRAS}
)
#: Schedules that are other names for the sampler's own: DDIM's timesteps at AUTOMATIC1111 and ComfyUI, and
#: what ComfyUI's examples set beside samplers that have timesteps of their own.
OWN: frozenset[tuple[Scheduler, str]] = frozenset(
    (
        (Scheduler.DDIM, "ddim_uniform"),
        (Scheduler.LCM, NoiseSchedule.SGM_UNIFORM),
        (Scheduler.TCD, NoiseSchedule.SGM_UNIFORM),
    )
)
#: What AUTOMATIC1111's "Automatic" is, where it is not the default (`scheduler` in its samplers' options).
AUTOMATIC: Mapping[Scheduler, NoiseSchedule] = {
    **dict.fromkeys(
        (
            *(Scheduler.DPMPP_2M, Scheduler.DPMPP_SDE, Scheduler.DPMPP_2S_ANCESTRAL),
            *(Scheduler.DPM2, Scheduler.DPM2_ANCESTRAL),
        ),
        NoiseSchedule.KARRAS,
    ),
    Scheduler.DPMPP_2M_SDE: NoiseSchedule.EXPONENTIAL,
    Scheduler.DPMPP_3M_SDE: NoiseSchedule.EXPONENTIAL,
}

#: diffusers' options of a scheduler: those that say a schedule, and those that may have one value only.
_SCHEDULE_OPTIONS = {
    "use_karras_sigmas": NoiseSchedule.KARRAS,
    "use_exponential_sigmas": NoiseSchedule.EXPONENTIAL,
    "use_beta_sigmas": NoiseSchedule.BETA,
}
_FIXED_OPTIONS = {
    (Scheduler.DPMPP_2M, "solver_type"): "midpoint",
    (Scheduler.UNIPC, "solver_order"): "2",
    (Scheduler.UNIPC, "solver_type"): "bh2",
}
#: diffusers has one class for these; two options tell them apart.
_MULTISTEP = {
    ("dpmsolver++", "2"): Scheduler.DPMPP_2M,
    ("sde-dpmsolver++", "2"): Scheduler.DPMPP_2M_SDE,
    ("sde-dpmsolver++", "3"): Scheduler.DPMPP_3M_SDE,
}
#: `Class(option=value, ...)`, or the same without brackets.
_WITH_OPTIONS = re.compile(r"(\w+Scheduler)\s*[(, ]\s*(\w+\s*=[^()]*)\)?\s*", re.IGNORECASE)
#: Samplers that are not offered and whose names are one letter from one that is.
_OTHERS = frozenset(("dpmpp3m", "dpm2m", "ipndm"))
#: Characters of a name, at least, that may be misspelt.
_SHORTEST_NEAR = 4
#: A name is no longer than this; more is no name, and is not looked at.
_LONGEST = 500


class Pair(NamedTuple):
    """What a sampler's name and a schedule's name mean together."""

    scheduler: Scheduler
    schedule: NoiseSchedule

    def fields(self) -> dict[str, Any]:
        """The job fields, without a default schedule."""
        fields: dict[str, Any] = {"scheduler": self.scheduler}
        return fields if self.schedule is NoiseSchedule.DEFAULT else fields | {"schedule": self.schedule}


def _plain(name: str) -> str:
    """A name without what does not count in it."""
    return re.sub(r"[\s_\-]", "", name.casefold().replace("++", "pp"))


_SAMPLERS = {_plain(name): sampler for sampler, names in SAMPLER_NAMES.items() for name in names}
_SCHEDULES = {_plain(name): schedule for schedule, names in SCHEDULE_NAMES.items() for name in names}


def pair_of(sampler: str | None, schedule: str | None = None) -> Pair:
    """The scheduler and the schedule that two names mean together, however they are written.

    `sampler` may have the schedule as its last word ("DPM++ 2M Karras"). Where `schedule` is not given, it is
    the sampler's own; where `sampler` is not given, a `schedule` that is a sampler's name is read as one.
    Raises `InvalidJobError` with one sentence for what is not known or not offered.
    """
    try:
        return read_pair(sampler or "", schedule or "")
    except ValueError as error:
        raise InvalidJobError(f"scheduler {error}.") from None


def read_pair(sampler: str, schedule: str) -> Pair:
    """As `pair_of`. Raises `ValueError` with a sentence's end that begins after the word "scheduler"."""
    if _plain(schedule[:_LONGEST]) == NoiseSchedule.DEFAULT:
        schedule = ""  # A job's field at its default says no more than one that is left out.
    if not sampler.strip():
        if not schedule.strip() or _SCHEDULES.get(_plain(schedule[:_LONGEST])) in ("default", "automatic"):
            return Pair(Scheduler.DEFAULT, NoiseSchedule.DEFAULT)
        sampler, schedule = schedule, ""
    base, own = _read_sampler(sampler)
    asked: str | None = own
    if schedule.strip():
        given = _SCHEDULES.get(_plain(schedule[:_LONGEST]), schedule)
        if own in (None, "automatic"):
            asked = given
        elif given not in (own, "automatic"):
            raise ValueError(f"is {short(sampler)} with the schedule {short(schedule)}: use one of the two")
    if asked == "automatic":
        asked = AUTOMATIC.get(base, NoiseSchedule.DEFAULT)
    if asked in (None, NoiseSchedule.DEFAULT) or (base, asked) in OWN:
        return Pair(base, NoiseSchedule.DEFAULT)
    if asked not in OFFERED[base]:
        raise ValueError(
            _not_offered(base, f"{short(sampler)} with the schedule {short(schedule or str(asked))}")
        )
    if (name := ONE_NAME.get((base, asked))) is not None:
        return Pair(name, NoiseSchedule.DEFAULT)
    return Pair(base, NoiseSchedule(asked))


def _not_offered(base: Scheduler, pair: str) -> str:
    if base is Scheduler.DEFAULT:
        return f"is {pair}: name the scheduler too, such as {Scheduler.DPMPP_2M}"
    offered = ", ".join((NoiseSchedule.DEFAULT, *OFFERED[base]))
    others = ", ".join(each for each in OFFERED if NoiseSchedule.KARRAS in OFFERED[each])
    more = "" if NoiseSchedule.KARRAS in OFFERED[base] else f"; more schedules go with {others}"
    return f"is {pair}, which is not offered: with {base} use {offered}{more}"


def _read_sampler(text: str) -> tuple[Scheduler, str | None]:
    """The sampler, and the schedule that its name says; None where it says none."""
    name = text.strip()
    if len(name) <= _LONGEST:
        if with_options := _WITH_OPTIONS.fullmatch(name):
            base = _known(with_options[1])
            if base is not None:
                return _read_options(base, with_options[2])
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


def _spellings(plain: str) -> tuple[str, ...]:
    plain = plain.removesuffix("gpu")
    return plain, plain.removeprefix("k"), plain.removeprefix("sample")


def _known(name: str) -> Scheduler | None:
    return next((_SAMPLERS[each] for each in _spellings(_plain(name)) if each in _SAMPLERS), None)


def _near(plain: str) -> Scheduler | None:
    """The sampler whose name is one letter away; None for what is another sampler's name."""
    if {*_spellings(plain)} & _OTHERS or len(plain) < _SHORTEST_NEAR:
        return None
    return next((each for name, each in _SAMPLERS.items() if distance(plain, name) == 1), None)


def _read_options(base: Scheduler, text: str) -> tuple[Scheduler, str | None]:
    """The sampler and the schedule that diffusers' options say. Others are refused where they change it."""
    schedule: str | None = None
    kind, order = "dpmsolver++", "2"
    for option in text.split(","):
        name, _, value = (part.strip().strip("\"'") for part in option.partition("="))
        if not name:
            continue
        is_multistep = base is Scheduler.DPMPP_2M
        if name in _SCHEDULE_OPTIONS and value.casefold() in ("true", "false", "1", "0"):
            is_on = value.casefold() in ("true", "1")
            schedule = _SCHEDULE_OPTIONS[name] if is_on else schedule or NoiseSchedule.DEFAULT
        elif name == "timestep_spacing" and value == "trailing":
            schedule = NoiseSchedule.SGM_UNIFORM
        elif is_multistep and name == "algorithm_type" and value in ("dpmsolver++", "sde-dpmsolver++"):
            kind = value
        elif is_multistep and name == "solver_order" and value in ("2", "3"):
            order = value
        elif _FIXED_OPTIONS.get((base, name)) != value:
            raise ValueError(f"has the option {short(f'{name}={value}')}, which is not offered: leave it out")
    if base is not Scheduler.DPMPP_2M:
        return base, schedule
    if (kind, order) not in _MULTISTEP:
        raise ValueError(f"has the option 'solver_order={order}', which is not offered: leave it out")
    return _MULTISTEP[kind, order], schedule
