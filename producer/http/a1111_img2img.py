"""What a request of AUTOMATIC1111's `img2img` means: that of `txt2img` (`a1111_request`), with an image.

Source: AUTOMATIC1111 1.10 (modules/api/models.py, modules/processing.py). Its defaults count where a name is
left out, but for the size: without one the pictures have the image's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from producer.http.a1111_request import (
    HARMLESS,
    Asked,
    Harmless,
    is_exactly_one,
    is_off,
    read_request,
    switch,
)
from producer.http.foreign_masks import a1111_mask, filled
from producer.http.pictures import of_base64
from producer.http.problems import RefusedError
from producer.prompts.values import NOT_GIVEN, value_in_call
from worker.contract.errors import InvalidJobError
from worker.contract.explain import short
from worker.contract.input_parameters import MASK_BLUR
from worker.contract.job import WRITTEN_FIELDS

#: Its strength where none is given.
_STRENGTH: Final = 0.75
#: What is read here.
_NAMES: Final = frozenset(
    (
        *(
            "init_images",
            "mask",
            "denoising_strength",
            "mask_blur",
            "mask_blur_x",
            "mask_blur_y",
            "mask_round",
        ),
        *("inpainting_fill", "inpaint_full_res", "inpaint_full_res_padding", "inpainting_mask_invert"),
        *("resize_mode", "latent_mask", "initial_noise_multiplier", "image_cfg_scale", "include_init_images"),
    )
)
_HARMLESS: Final[Harmless] = {
    **{name: rule for name, rule in HARMLESS.items() if name not in _NAMES},
    "enable_hr": (is_off, "hires fix is for txt2img: switch it off"),
    "resize_mode": (is_off, "cropping and filling are not offered: set it to 0, which resizes"),
    "latent_mask": (is_off, "it is not offered: send a mask"),
    "initial_noise_multiplier": (is_exactly_one, "it is not offered: set it to 1"),
}


def read_img2img(body: Any) -> Asked:
    """What a request asks for, with the bytes of its image and of its mask among the fields.

    Takes some time: call it in a thread. Raises as `read_request`.
    """
    if not isinstance(body, dict):
        raise InvalidJobError(f"The body is {short(body)}: it must be an object with a prompt.")
    rest = {name: value for name, value in body.items() if name not in _NAMES or name in _HARMLESS}
    asked = read_request(rest, _HARMLESS, _NAMES)
    images = body.get("init_images")
    if not isinstance(images, list) or len(images) != 1:
        count = f"{len(images)} pictures" if isinstance(images, list) else short(images)
        raise InvalidJobError(f"init_images is {count}: send a list of one picture in base64.")
    fields: dict[str, Any] = {
        "image": of_base64("init_images", images[0]),
        "strength": _number(body, "denoising_strength", "strength", _STRENGTH),
    }
    if body.get("mask"):
        fields |= _inpainting(body, fields["image"])
    return replace(asked, fields=asked.fields | fields)


def _inpainting(body: Mapping[str, Any], image: bytes) -> dict[str, Any]:
    mask = a1111_mask(
        of_base64("mask", body["mask"]),
        inverted=switch(body, "inpainting_mask_invert"),
        rounded=switch(body, "mask_round", default=True),
    )
    found: dict[str, Any] = {"mask": mask, "mask_blur": _blur(body)}
    if switch(body, "inpaint_full_res", default=True):
        found["padding"] = _number(body, "inpaint_full_res_padding", "padding", 0)
    match _number(body, "inpainting_fill", "steps", 0):
        case 0:
            found["image"] = filled(image, mask)
        case 1:
            pass
        case other:
            raise RefusedError(
                422,
                f"inpainting_fill is {short(other)}, which is not offered: use 1 (the image itself) or 0 ("
                "the colours around).",
            )
    return found


def _blur(body: Mapping[str, Any]) -> Any:
    if body.get("mask_blur") is not None:
        return _number(body, "mask_blur", "mask_blur", MASK_BLUR)
    sides = [_number(body, name, "mask_blur", MASK_BLUR) for name in ("mask_blur_x", "mask_blur_y")]
    if sides[0] != sides[1]:
        raise RefusedError(
            422, f"mask_blur_x and mask_blur_y are {sides}: a mask is blurred alike both ways."
        )
    return sides[0]


def _number(body: Mapping[str, Any], name: str, like: str, default: Any) -> Any:
    """A number, read as the job field `like`. What is none stays, and the job's own error names it."""
    value = value_in_call(WRITTEN_FIELDS[like], body.get(name))
    return default if value is NOT_GIVEN else value
