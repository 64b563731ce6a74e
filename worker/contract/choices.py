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


#: AUTOMATIC1111's names for them.
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
        Scheduler.DEFAULT: "Default",
    }
)


class PromptSyntax(StrEnum):
    """The syntaxes that a prompt can be read in."""

    #: Words and nothing else, as diffusers reads it: cut after the text encoder's window.
    PLAIN = "plain"
    #: AUTOMATIC1111's: weights, BREAK, AND, text by step, any length (`worker.contract.a1111_syntax`).
    A1111 = "a1111"


class ImageFormat(StrEnum):
    """The encodings a picture can be stored in."""

    #: Lossless. The default.
    PNG = "png"
    #: Lossless WebP.
    WEBP = "webp"
    #: Lossy, quality 95, without chroma subsampling.
    JPEG = "jpeg"
