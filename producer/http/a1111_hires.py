"""What a request of AUTOMATIC1111's `txt2img` with hires fix means: the fields of a job's second pass.

Source: AUTOMATIC1111 1.10 (modules/processing.py). What it takes for the second pass alone, such as another
prompt, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from producer.http.problems import RefusedError
from producer.prompts.values import NOT_GIVEN, value_in_call
from worker.contract.errors import InvalidJobError
from worker.contract.explain import short
from worker.contract.job import WRITTEN_FIELDS
from worker.contract.metadata.hires import BY_NAME, scale_to, steps_of

#: Its strength and its scale where none are given.
_STRENGTH: Final = 0.75
_SCALE: Final = 2.0
#: What may be said of the second pass where it is as of the first, or nothing: by name, the first pass's.
_AS_BEFORE: Final = {
    "hr_checkpoint_name": "",
    "hr_sampler_name": "sampler_name",
    "hr_scheduler": "scheduler",
    "hr_prompt": "prompt",
    "hr_negative_prompt": "negative_prompt",
    "firstpass_image": "",
    "firstphase_width": "",
    "firstphase_height": "",
}
_SAME: Final = ("Use same checkpoint", "Use same sampler", "Use same scheduler")


def second_pass_of(body: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the second pass of a job of `fields`.

    Raises `InvalidJobError`, and `RefusedError` for what is not offered.
    """
    for name, first in _AS_BEFORE.items():
        value = body.get(name)
        if value not in (None, "", 0, *_SAME) and (not first or value != body.get(first)):
            raise RefusedError(
                422, f"{name} is {short(value)}, and a second pass is as the first one here: leave it out."
            )
    name = body.get("hr_upscaler") or "Latent"
    if not isinstance(name, str) or name not in BY_NAME:
        raise RefusedError(
            422, f"hr_upscaler is {short(name)}, which is not offered: use {' or '.join(BY_NAME)}."
        )
    strength = _number(body, "denoising_strength", "upscale_strength", _STRENGTH)
    run = _number(body, "hr_second_pass_steps", "upscale_steps", 0) or fields.get("steps")
    if not isinstance(run, int):
        raise InvalidJobError("enable_hr needs the steps that it has in its second pass: give steps.")
    if (scale := _scale(body, fields)) == 1:
        raise RefusedError(422, "hr_scale is 1, and a second pass makes the picture larger: set it above 1.")
    found = {"upscale": scale, "upscale_strength": strength, "upscaler": BY_NAME[name]}
    # A strength that is none, or too large, has its own error.
    is_strength = isinstance(strength, int | float) and 0 < strength <= 1 and run > 0
    return found | {"upscale_steps": steps_of(run, strength) if is_strength else run}


def _scale(body: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    x, y = (_number(body, name, "upscale_steps", 0) for name in ("hr_resize_x", "hr_resize_y"))
    if not (x or y):
        return _number(body, "hr_scale", "upscale", _SCALE)
    size = fields.get("width"), fields.get("height")
    if not all(isinstance(each, int) and each >= 0 for each in (x, y)) or not all(
        isinstance(each, int) and each > 0 for each in size
    ):
        raise InvalidJobError(
            f"hr_resize_x and hr_resize_y are {short(x)} and {short(y)}: they must be pixels, beside width "
            "and height."
        )
    if (scale := scale_to(size, x, y)) is None:  # type: ignore[arg-type]
        raise RefusedError(
            422,
            f"hr_resize_x and hr_resize_y are {x} and {y}, which are not of the proportions of width and "
            "height, and cropping is not offered: set one of them to 0.",
        )
    return scale


def _number(body: Mapping[str, Any], name: str, like: str, default: Any) -> Any:
    """A number, read as the job field `like`. What is none stays, and the job's own error names it."""
    value = value_in_call(WRITTEN_FIELDS[like], body.get(name))
    return default if value is NOT_GIVEN else value
