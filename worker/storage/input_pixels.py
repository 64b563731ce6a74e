"""From what a job names to begin with, to its pixels: read from the bucket, checked, unpacked and resized.

A job's image is resized to the job's size by Lanczos, both sides, as diffusers does, and so is its mask. With
`padding` a part of both is, and the files are kept for the whole picture. With the mask `alpha` the image is
resized before it is laid on white, and its colours are weighted by alpha, as Pillow does it for RGBA: so what
is opaque has none of the white, nor of what is behind transparent pixels.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, NamedTuple, Protocol

from PIL import Image, ImageChops

from worker.contract.errors import InputError
from worker.contract.input_image import (
    BadInputError,
    InputImage,
    mask_of_alpha,
    on_white,
    read_input,
    read_mask,
)
from worker.contract.input_reference import ALPHA, MAX_INPUT_BYTES, InputReference
from worker.contract.record import JobRecord
from worker.storage.masked_region import Region, cut, region_around

if TYPE_CHECKING:
    from worker.contract.choices import ImageFormat
    from worker.contract.job import Job

#: What is said of a picture whose transparency nobody asked for.
_ON_WHITE = "The image is transparent in places, and lies on white: mask=alpha draws there."
#: What is said of a picture that is in part its job's image.
PUT_BACK = (
    "The image's own pixels are put back where the mask is black: preserve_unmasked=no leaves that out."
)
#: Likewise, where its alpha channel is the mask.
PUT_BACK_BY_ALPHA = (
    "The image's own pixels lie on what was drawn, as its alpha says: preserve_unmasked=no leaves that out."
)
#: What is said besides, in a format that keeps none to the bit.
_LOSSY = " JPEG changes them a little: png and webp do not."


class Files(Protocol):
    """What is asked of a bucket: `worker.storage.bucket.Bucket`."""

    def read_input(self, sha256: str, tenant: str = "") -> bytes | None:
        """A file that jobs begin with; None: it is not there."""

    def record(self, job_id: str, tenant: str = "") -> bytes | None:
        """The record of a job that is done; likewise."""

    def picture(self, job_id: str, image_format: ImageFormat, tenant: str = "") -> bytes | None:
        """Its picture; likewise."""


class InputFiles(NamedTuple):
    """The files that a job begins with, as they are in the bucket."""

    image: bytes
    #: None: the job has no mask, or its image is the mask, too.
    mask: bytes | None


class WholeInputs(NamedTuple):
    """What is in the files of a job, as large as its image."""

    #: On white where it was transparent.
    image: InputImage
    #: Mode L, 255 where the image is drawn; None: everywhere.
    mask: Image.Image | None


class Part(NamedTuple):
    """The part of an image that a job with `padding` draws."""

    region: Region
    #: What the drawn part is put back into: as files, which take less memory while the job is rendered.
    files: InputFiles


class InputPixels(NamedTuple):
    """The pixels that a job begins with, row by row, at the job's size."""

    #: (width, height).
    size: tuple[int, int]
    #: Three bytes a pixel.
    rgb: bytes
    #: One byte a pixel, 255 where the image is drawn; None: everywhere.
    mask: bytes | None
    #: What the caller should know.
    warnings: tuple[str, ...] = ()
    #: Whether the mask leaves a part of the image as it is.
    keeps_a_part: bool = False
    #: What they show of the image; None: all.
    part: Part | None = None


def read_pixels(bucket: Files, job: Job) -> InputPixels:
    """The pixels that a job with an image begins with. Raises `InputError`, `StorageError`."""
    files = read_files(bucket, job)
    image, mask = unpacked(job, files)
    size = job.width or image.size[0], job.height or image.size[1]
    warnings = [_ON_WHITE] if image.cut_out is not None and job.mask != ALPHA else []
    if mask is None:
        return InputPixels(size, _resized(image.rgb, size).tobytes(), None, tuple(warnings))
    keeps_a_part = mask.getextrema()[0] != 255
    part, at_size = None, functools.partial(_resized, size=size)
    if job.padding is not None:
        region = region_around(mask, size, job.padding)
        if region is None:
            raise InputError("mask is white in too few pixels: make its white part larger.")
        part, at_size = Part(region, files), functools.partial(cut, region=region, size=size)
        warnings.append(_said_of(region, size, image.size))
    elif job.preserve_unmasked and keeps_a_part:
        said = PUT_BACK_BY_ALPHA if job.mask == ALPHA else PUT_BACK
        warnings.append(said + (_LOSSY if job.format == "jpeg" else ""))
    if job.mask == ALPHA and image.cut_out is not None:
        cut_out = at_size(image.cut_out)
        rgb, drawn = on_white(cut_out), ImageChops.invert(cut_out.getchannel("A"))
    else:
        rgb, drawn = at_size(image.rgb), at_size(mask)
    return InputPixels(size, rgb.tobytes(), drawn.tobytes(), tuple(warnings), keeps_a_part, part)


def _said_of(region: Region, size: tuple[int, int], whole: tuple[int, int]) -> str:
    """What is said of a picture of which a region was drawn."""
    left, top, right, bottom = region
    drawn, own = (f"{width}x{height}" for width, height in (size, whole))
    is_larger = region.size[0] > size[0] and region.size[1] > size[1]
    back = "enlarged and put back: a larger width and height make it sharper" if is_larger else "put back"
    return (
        f"The part of the image from {left},{top} to {right},{bottom} px was drawn at {drawn} and {back}. "
        f"The picture has the image's size, {own}."
    )


def read_files(bucket: Files, job: Job) -> InputFiles:
    """The files that a job with an image begins with. Raises `InputError`, `StorageError`."""
    image = _file(bucket, "image", InputReference.parse(job.image), job.tenant)
    if job.mask in ("", ALPHA):
        return InputFiles(image, None)
    return InputFiles(image, _file(bucket, "mask", InputReference.parse(job.mask), job.tenant))


def unpacked(job: Job, files: InputFiles) -> WholeInputs:
    """What is in a job's files. Raises `InputError`."""
    name = "image"
    try:
        image = read_input(files.image)
        _compare(name, image.size, job.image)
        name = "mask"
        if job.mask == ALPHA:
            return WholeInputs(image, mask_of_alpha(image))
        if files.mask is None:
            return WholeInputs(image, None)
        mask = read_mask(files.mask)
        _compare(name, mask.size, job.mask)
    except BadInputError as error:
        raise InputError(f"{name} {error}.") from None
    # What a job without `padding` begins with is resized once.
    return WholeInputs(image, mask if job.padding is None else _resized(mask, image.size))


def _compare(name: str, size: tuple[int, int], said: str) -> None:
    reference = InputReference.parse(said)
    if size != (reference.width, reference.height):
        shown, named = (f"{width}x{height}" for width, height in (size, reference[2:]))
        raise InputError(f"{name} is {shown}, and the job says {named}: submit the picture again.")


def _file(bucket: Files, name: str, reference: InputReference, tenant: str) -> bytes:
    """The bytes that a reference means."""
    if reference.kind == "job":
        return _picture(bucket, name, reference.id, tenant)
    data = bucket.read_input(reference.id, tenant)
    if data is None:
        raise InputError(
            f"{name} is gone from the bucket ({reference.id[:12]}...): submit the job again with the picture."
        )
    if len(data) > MAX_INPUT_BYTES:
        raise InputError(
            f"{name} is larger in the bucket ({reference.id[:12]}...) than the limit, "
            f"{MAX_INPUT_BYTES // 1_000_000} MB: submit the job again with the picture."
        )
    if hashlib.sha256(data).hexdigest() != reference.id:
        raise InputError(
            f"{name} was changed in the bucket ({reference.id[:12]}...): submit the job again with the "
            "picture."
        )
    return data


def _picture(bucket: Files, name: str, job_id: str, tenant: str) -> bytes:
    """The picture of another job, which is done."""
    gone = f"{name} is the picture of job {job_id}, which is not in the bucket: submit that job again, then "
    gone += "this one."
    stored = bucket.record(job_id, tenant)
    if stored is None:
        raise InputError(gone)
    try:
        record = JobRecord.model_validate_json(stored)
    except ValueError:
        raise InputError(gone) from None
    data = bucket.picture(job_id, record.job.format, tenant)
    if data is None:
        raise InputError(gone)
    return data


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
