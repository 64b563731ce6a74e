"""AUTOMATIC1111's hires fix as a job's second pass, and back.

Its steps are those that are run, `upscale_steps` those of which `upscale_strength` takes its share.
Source: AUTOMATIC1111 1.10 (modules/processing.py: calculate_target_resolution;
modules/sd_samplers_common.py: setup_img2img_steps).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, MutableMapping
from typing import Any, Final

from worker.contract.choices import UPSCALERS
from worker.contract.errors import InvalidJobError
from worker.contract.job import Job
from worker.contract.second_pass import MAX_UPSCALE_STEPS, upscaled

#: Its keys in an infotext.
SCALE, RESIZE, STEPS, UPSCALER = "Hires upscale", "Hires resize", "Hires steps", "Hires upscaler"
STRENGTH: Final = "Denoising strength"
#: Our upscalers by AUTOMATIC1111's names.
BY_NAME: Final = {name: str(each) for each, name in UPSCALERS.items()}


def steps_of(run: int, strength: float) -> int:
    """The fewest `upscale_steps` of which `run` are run at this strength, above 0.

    Raises `InvalidJobError` where a job cannot have as many.
    """
    if run > strength * MAX_UPSCALE_STEPS:
        raise InvalidJobError(
            f"The second pass has {run} steps at a denoising strength of {strength:g}, which are a share of "
            f"more than {MAX_UPSCALE_STEPS} steps, the limit: ask for fewer, or for a greater strength."
        )
    steps = max(1, math.ceil(run / strength) - 1)
    while int(steps * strength) < run:
        steps += 1
    return steps


def scale_to(size: tuple[int, int], x: int, y: int) -> float | None:
    """How many times larger `size` becomes for a width `x` and a height `y` in pixels, either 0 for any.

    None where AUTOMATIC1111 would crop the picture.
    """
    width, height = size
    scale = x / width if not y or (x and width / height < x / y) else y / height
    asked = (x or upscaled(width, scale), y or upscaled(height, scale))
    is_whole = all(upscaled(side, scale) == to // 8 * 8 for side, to in zip(size, asked, strict=True))
    return scale if is_whole else None


def pairs_of(job: Job) -> dict[str, object]:
    """What AUTOMATIC1111 writes of the second pass of a resolved job, beside the keys of its fields."""
    if (second := job.second_pass) is None:
        return {}
    strength = {} if job.image else {STRENGTH: second.strength}
    return {**strength, STEPS: second.steps_run, UPSCALER: UPSCALERS[job.upscaler]}


def take(pairs: MutableMapping[str, str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Take the second pass out of an infotext's pairs: its fields, for a job of `fields`.

    Nothing is taken where it is one that no job can have: another upscaler, a picture that is cropped, a size
    or steps beyond the limits.
    """
    try:
        upscaler = BY_NAME[pairs[UPSCALER]]
        if not 0 < (strength := float(pairs[STRENGTH])) < math.inf:
            return {}
        strength = min(1.0, strength)
        run = int(pairs.get(STEPS) or fields["steps"])
        scale = float(pairs[SCALE]) if SCALE in pairs else _resized(pairs[RESIZE], fields)
        found = {"upscale": scale, "upscale_strength": strength, "upscaler": upscaler}
        found["upscale_steps"] = steps_of(run, strength)
        beside = ("width", "height", "steps", "schedule")
        plain = {name: value for name, value in fields.items() if name in beside}
        Job.parse({"prompt": "any", "seed": 0, **plain, **found})
    except (KeyError, ValueError, ArithmeticError, InvalidJobError):
        return {}
    for key in (SCALE, RESIZE, STEPS, UPSCALER, STRENGTH):
        pairs.pop(key, None)
    return found


def _resized(text: str, fields: Mapping[str, Any]) -> float | None:
    sides = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if sides is None:
        raise ValueError(text)
    return scale_to((fields["width"], fields["height"]), int(sides[1]), int(sides[2]))
