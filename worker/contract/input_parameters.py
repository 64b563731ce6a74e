"""The parameters of jobs that begin with a picture: image to image, inpainting. With their checks.

Such a job has an `image`; one that draws only a part of it has a `mask` as well. A job without an image has
all of them at their defaults, or it is refused: what would have no effect is no silent mistake.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final

from annotated_types import Gt
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from worker.contract.choices import ImageFormat
from worker.contract.explain import short
from worker.contract.input_reference import ALPHA, REFERENCE, InputReference
from worker.contract.job_fields import JobField
from worker.contract.job_parameters import MAX_SIZE, MIN_SIZE, SIZE_STEP, JobParameters
from worker.contract.stored_jobs import NarrowedTo, of_new_jobs

#: The version of messages that has these fields.
INPUTS_SINCE: Final = 4
#: `strength` where it is not given: diffusers' for image to image, and for inpainting.
STRENGTH, STRENGTH_WITH_MASK = 0.8, 1.0
#: Pixels of AUTOMATIC1111's sliders, at most; and its blur where none is given.
MAX_MASK_BLUR, MASK_BLUR = 64, 4
MAX_PADDING = 256
#: By which share the proportions of a mask may differ from the image's.
_MASK_TOLERANCE: Final = 0.02
#: Pixels of a WebP's sides, at most.
_MAX_WEBP: Final = 16_383


def size_for(
    of: tuple[int, int], width: int | None = None, height: int | None = None
) -> tuple[int, int] | None:
    """The size of a job that begins with a picture of the size `of`, (width, height) in pixels.

    The picture's own; larger ones are made smaller, and smaller ones larger, to a job's limits with their
    proportions kept; then each side is rounded down to a multiple of 8, as diffusers does. With one side
    given the other follows from the proportions. None where no size has these proportions.
    """
    if width is not None and height is not None:
        return width, height
    if width is not None:
        scale = width / of[0]
    elif height is not None:
        scale = height / of[1]
    else:
        scale = min(1.0, MAX_SIZE / max(of))
        scale = max(scale, MIN_SIZE / min(of))
    # A little above, because 0.1 * 640 may be a little less than 64.
    sides = [int(side * scale + 1e-6) // SIZE_STEP * SIZE_STEP for side in of]
    found = width or sides[0], height or sides[1]
    return found if min(found) >= MIN_SIZE and max(found) <= MAX_SIZE else None


class _NoSize(str):
    """An image of which no size follows."""


def _with_own_size(values: Any) -> Any:
    """A job's fields with what follows from its image: its size, and its strength, where none is given.

    With `padding` no size does: it is that of a part of the image, and not given the model's own.
    """
    image = values.get("image") if isinstance(values, dict) else None
    if not isinstance(image, str):
        return values
    try:
        reference = InputReference.parse(image)
    except ValueError:
        return values  # The field's own check says so.
    given = values.get("width"), values.get("height")
    is_left_open = None in given and values.get("padding") is None
    if is_left_open and all(side is None or (type(side) is int and side > 0) for side in given):
        size = size_for((reference.width, reference.height), *given)
        own = {"image": _NoSize(image)} if size is None else {"width": size[0], "height": size[1]}
        values = values | own
    if values.get("strength") is None:
        values = values | {"strength": STRENGTH_WITH_MASK if values.get("mask") else STRENGTH}
    return values


def _image(value: str) -> str:
    """Refuse what is no reference."""
    if value:
        InputReference.parse(value)
    return value


def _has_a_size(value: object) -> object:
    """Refuse proportions that no job has."""
    if isinstance(value, _NoSize):
        reference = InputReference.parse(value)
        raise ValueError(
            f"is {reference.width}x{reference.height}, and no size of {MIN_SIZE} to {MAX_SIZE:,} px has "
            "these proportions: give width and height"
        )
    return value


def _not_given(value: object) -> object:
    return "" if value is None else value


def _mask(value: str, info: ValidationInfo) -> str:
    """Refuse what is no mask of the image."""
    if not value or "image" not in info.data:
        return value  # An image that is wrong by itself has its own error.
    image = info.data["image"]
    if not image:
        raise ValueError("is for an image: give one, or leave the mask out")
    about = InputReference.parse(image)
    if value == ALPHA:
        if about.kind == "job":
            raise ValueError("is alpha, and pictures of jobs have no alpha channel: give a picture")
        return value
    mask = InputReference.parse(value)
    distortion = mask.width * about.height / (mask.height * about.width)
    if abs(distortion - 1) > _MASK_TOLERANCE:
        raise ValueError(
            f"is {mask.width}x{mask.height} and the image {about.width}x{about.height}: give a mask of the "
            "image's proportions (an image is turned as its Exif says)"
        )
    return value


def leaves_steps(strength: float, steps: int) -> bool:
    """Whether a job of so many steps has one left: diffusers runs `int(steps * strength)` of them."""
    return int(steps * strength) >= 1


def least_strength(steps: int) -> str:
    """The least strength that leaves a job of so many steps one, rounded up to two digits."""
    digits = 2 - math.ceil(math.log10(1 / steps) + 1e-9)
    return f"{math.ceil(10**digits / steps) / 10**digits:g}"


def _strength(value: float | None, info: ValidationInfo) -> float | None:
    """Refuse a strength without an image, or that leaves no step."""
    if "image" not in info.data or value is None:
        return value
    if not info.data["image"]:
        raise ValueError(f"is {value:g}, and there is no image to begin with: give one, or leave it out")
    steps = info.data.get("steps")
    if steps is not None and not leaves_steps(value, steps):
        raise ValueError(
            f"is {value:g}, which leaves none of {steps} steps: use at least {least_strength(steps)}, or "
            "more steps"
        )
    return value


def _for_a_mask(default: object) -> AfterValidator:
    """Refuse another value than the default where there is no mask."""

    def check(value: object, info: ValidationInfo) -> object:
        if value != default and info.data.get("mask") == "":
            raise ValueError(f"is {short(value)}, and is for a mask: give one, or leave it out")
        return value

    return AfterValidator(check)


def _has_an_edge(value: int, info: ValidationInfo) -> int:
    """Refuse a blur of an edge that is the image's own."""
    if value not in (0, MASK_BLUR) and info.data.get("mask") == ALPHA:
        raise ValueError(
            f"is {value}, and the edge of the mask alpha is the image's own: leave it out, blur the image's "
            "alpha channel, or give a mask"
        )
    return value


def _has_an_edge_to_blur(value: bool, info: ValidationInfo) -> bool:
    """Refuse a blur where nothing is put back."""
    blur = info.data.get("mask_blur", MASK_BLUR)
    if not value and blur not in (0, MASK_BLUR):
        raise ValueError(
            f"is {short(value)} and mask_blur {blur}, which is for the edge where the image's own pixels are "
            "put back: leave one of them out"
        )
    return value


def _fits_format(value: int | None, info: ValidationInfo) -> int | None:
    """Refuse a picture of the image's size that its format does not hold."""
    image, image_format = info.data.get("image"), info.data.get("format")
    if value is None or not image or image_format is not ImageFormat.WEBP:
        return value
    about = InputReference.parse(image)
    if max(about.width, about.height) > _MAX_WEBP:
        raise ValueError(
            f"is {value}, so that the picture is as large as the image, {about.width}x{about.height}, and "
            f"webp holds up to {_MAX_WEBP:,} px a side: use the format png"
        )
    return value


class InputParameters(JobParameters):
    """The parameters of one picture and of its submission, with those of the picture before it. Frozen."""

    #: The picture that the job begins with: a path, an s3:// address, or `job:` and the id of a job whose
    #: picture it is. Without a size the job has the picture's own, within its limits and rounded down to
    #: multiples of 8.
    image: Annotated[
        str,
        Field(strict=True, json_schema_extra={"pattern": f"^({REFERENCE})?$"}),
        BeforeValidator(_not_given),
        BeforeValidator(_has_a_size),
        AfterValidator(_image),
        JobField(
            since=INPUTS_SINCE,
            infotext="Init image",
            infotext_ours_only=True,
            diffusers="image",
            headings=("init_image", "input_image", "source_image"),
        ),
    ] = ""
    #: The part of the image that is drawn: a picture, named likewise, that is white there and black
    #: elsewhere, or `alpha`: where the image is transparent. Empty: all of it.
    mask: Annotated[
        str,
        Field(strict=True, json_schema_extra={"pattern": f"^({REFERENCE}|{ALPHA})?$"}),
        BeforeValidator(_not_given),
        AfterValidator(_mask),
        JobField(
            since=INPUTS_SINCE, infotext_ours_only=True, diffusers="mask_image", headings=("inpaint_mask",)
        ),
    ] = ""
    #: How much of the image is drawn anew, above 0 and up to 1: `int(steps * strength)` steps are run. Not
    #: given: 0.8, or 1 with a mask. AUTOMATIC1111 calls it denoising strength.
    strength: Annotated[
        float | None,
        Field(ge=0, le=1, strict=True, allow_inf_nan=False),
        NarrowedTo(Gt(0)),
        AfterValidator(_strength),
        JobField(
            since=INPUTS_SINCE,
            infotext="Denoising strength",
            infotext_ours_only=True,
            diffusers="strength",
            headings=("denoising_strength", "denoise"),
            is_left_open=True,
        ),
    ] = None
    #: Pixels of the picture by which the mask's edge is blurred (a Gaussian's sigma), 0 to 64; not that of
    #: the mask `alpha`, whose edge is the image's own.
    mask_blur: Annotated[
        int,
        Field(ge=0, le=MAX_MASK_BLUR, strict=True),
        _for_a_mask(MASK_BLUR),
        of_new_jobs(_has_an_edge),
        JobField(since=INPUTS_SINCE, infotext_ours_only=True),
    ] = MASK_BLUR
    #: Draw only the masked part, at the job's whole size, with so many pixels of the image around it, 0 to
    #: 256. The picture is the whole image, as large as it is. Not given: the whole image is drawn.
    #: AUTOMATIC1111 calls it "only masked".
    padding: Annotated[
        int | None,
        Field(ge=0, le=MAX_PADDING, strict=True),
        _for_a_mask(None),
        of_new_jobs(_fits_format),
        JobField(
            since=INPUTS_SINCE,
            infotext="Masked area padding",
            infotext_ours_only=True,
            diffusers="padding_mask_crop",
            headings=("masked_area_padding", "inpaint_full_res_padding"),
            is_left_open=True,
        ),
    ] = None
    #: Whether the image's own pixels are put back where the mask is black. Without it all have gone through
    #: the VAE, as in diffusers; with `padding` the mask's edge is not blurred, as in diffusers.
    preserve_unmasked: Annotated[
        bool,
        Field(strict=True),
        _for_a_mask(True),
        of_new_jobs(_has_an_edge_to_blur),
        JobField(since=INPUTS_SINCE, infotext_ours_only=True),
    ] = True

    @model_validator(mode="before")
    @classmethod
    def _own_size(cls, values: Any) -> Any:
        return _with_own_size(values)
