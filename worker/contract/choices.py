"""The values of the job fields that are chosen from a list, and AUTOMATIC1111's names for them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class Scheduler(StrEnum):
    """diffusers' noise schedulers that a job can ask for."""

    #: The one in the model's own `scheduler/scheduler_config.json`.
    DEFAULT = "default"
    DDIM = "ddim"
    EULER = "euler"
    EULER_ANCESTRAL = "euler_ancestral"
    DPMPP_2M = "dpmpp_2m"
    DPMPP_2M_KARRAS = "dpmpp_2m_karras"
    PNDM = "pndm"
    UNIPC = "unipc"
    LCM = "lcm"
    HEUN = "heun"
    DPM2 = "dpm2"
    DPM2_ANCESTRAL = "dpm2_ancestral"
    LMS = "lms"
    DDPM = "ddpm"
    DEIS = "deis"
    DPMPP_2S = "dpmpp_2s"
    DPMPP_2S_ANCESTRAL = "dpmpp_2s_ancestral"
    DPMPP_SDE = "dpmpp_sde"
    DPMPP_2M_SDE = "dpmpp_2m_sde"
    DPMPP_3M_SDE = "dpmpp_3m_sde"
    TCD = "tcd"
    SA_SOLVER = "sa_solver"


#: Those that messages of versions 1 and 2 know.
FIRST_SCHEDULERS = frozenset(list(Scheduler)[:9])
#: AUTOMATIC1111's names for them, and names in its manner for those that it has not.
SAMPLERS: Mapping[str, str] = MappingProxyType(
    {
        Scheduler.DDIM: "DDIM",
        Scheduler.EULER: "Euler",
        Scheduler.EULER_ANCESTRAL: "Euler a",
        Scheduler.DPMPP_2M: "DPM++ 2M",
        Scheduler.DPMPP_2M_KARRAS: "DPM++ 2M Karras",
        Scheduler.PNDM: "PLMS",
        Scheduler.UNIPC: "UniPC",
        Scheduler.LCM: "LCM",
        Scheduler.HEUN: "Heun",
        Scheduler.DPM2: "DPM2",
        Scheduler.DPM2_ANCESTRAL: "DPM2 a",
        Scheduler.LMS: "LMS",
        Scheduler.DDPM: "DDPM",
        Scheduler.DEIS: "DEIS",
        Scheduler.DPMPP_2S: "DPM++ 2S",
        Scheduler.DPMPP_2S_ANCESTRAL: "DPM++ 2S a",
        Scheduler.DPMPP_SDE: "DPM++ SDE",
        Scheduler.DPMPP_2M_SDE: "DPM++ 2M SDE",
        Scheduler.DPMPP_3M_SDE: "DPM++ 3M SDE",
        Scheduler.TCD: "TCD",
        Scheduler.SA_SOLVER: "SA Solver",
        Scheduler.DEFAULT: "Default",
    }
)


#: The schedulers that take an `eta`, with what it is where it is not given: diffusers' pipelines set 0, and
#: ancestral schedulers draw all the noise anew.
ETA: Mapping[Scheduler, float] = MappingProxyType(
    {
        Scheduler.DDIM: 0.0,
        Scheduler.TCD: 0.0,
        Scheduler.EULER_ANCESTRAL: 1.0,
        Scheduler.DPM2_ANCESTRAL: 1.0,
        Scheduler.DPMPP_2S_ANCESTRAL: 1.0,
    }
)


class NoiseSchedule(StrEnum):
    """How a scheduler spaces its noise levels."""

    #: The scheduler's own, by the model's config.
    DEFAULT = "default"
    #: Karras et al. (2022), equation 5.
    KARRAS = "karras"
    #: Evenly spaced logarithms.
    EXPONENTIAL = "exponential"
    #: Lee et al. (2024): quantiles of a beta distribution.
    BETA = "beta"
    #: Timesteps from the last one on, as Lin et al. (2024) recommend: diffusers' spacing "trailing".
    SGM_UNIFORM = "sgm_uniform"
    #: The model's own noise levels, every so many of them, as ComfyUI and AUTOMATIC1111 take them.
    SIMPLE = "simple"
    #: Sabour et al. (2024), as diffusers has them.
    ALIGN_YOUR_STEPS = "align_your_steps"


#: Steps of `align_your_steps`: as many as diffusers has noise levels for.
ALIGN_YOUR_STEPS = 10
#: AUTOMATIC1111's names for them.
SCHEDULES: Mapping[str, str] = MappingProxyType(
    {
        NoiseSchedule.DEFAULT: "Default",
        NoiseSchedule.KARRAS: "Karras",
        NoiseSchedule.EXPONENTIAL: "Exponential",
        NoiseSchedule.BETA: "Beta",
        NoiseSchedule.SGM_UNIFORM: "SGM Uniform",
        NoiseSchedule.SIMPLE: "Simple",
        NoiseSchedule.ALIGN_YOUR_STEPS: "Align Your Steps",
    }
)


class PromptSyntax(StrEnum):
    """The syntaxes that a prompt can be read in."""

    #: Words and nothing else, as diffusers reads it: cut after the text encoder's window.
    PLAIN = "plain"
    #: AUTOMATIC1111's: weights, BREAK, AND, text by step, any length (`worker.contract.a1111_syntax`).
    A1111 = "a1111"


class Upscaler(StrEnum):
    """What makes a picture larger before its second pass."""

    #: Its latents are resized, bilinearly: AUTOMATIC1111's "Latent".
    LATENT = "latent"
    #: It is decoded, its pixels are resized by Lanczos' filter, and encoded again.
    LANCZOS = "lanczos"


#: AUTOMATIC1111's names for them.
UPSCALERS: Mapping[str, str] = MappingProxyType({Upscaler.LATENT: "Latent", Upscaler.LANCZOS: "Lanczos"})


class ImageFormat(StrEnum):
    """The encodings a picture can be stored in."""

    #: Lossless. The default.
    PNG = "png"
    #: Lossless WebP.
    WEBP = "webp"
    #: Lossy, quality 95, without chroma subsampling.
    JPEG = "jpeg"
