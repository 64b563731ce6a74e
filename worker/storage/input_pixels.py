"""From what a job names to begin with, to its pixels: read from the bucket, checked, unpacked and resized.

A job's image is resized to the job's size by Lanczos, both sides, as diffusers does, and so is its mask; with
`padding` both stay as large as the image, of which the job draws a part. With the mask `alpha` the image is
resized before it is laid on white, and its colours are weighted by alpha, as Pillow does it for RGBA: so what
is opaque has none of the white, nor of what is behind transparent pixels.
"""

from __future__ import annotations

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
from worker.contract.input_reference import ALPHA, InputReference
from worker.contract.record import JobRecord

if TYPE_CHECKING:
    from worker.contract.choices import ImageFormat
    from worker.contract.job import Job

#: What is said of a picture whose transparency nobody asked for.
_ON_WHITE = "The image is transparent in places, and lies on white: mask=alpha draws there."


class Files(Protocol):
    """What is asked of a bucket: `worker.storage.bucket.Bucket`."""

    def read_input(self, sha256: str, tenant: str = "") -> bytes | None:
        """A file that jobs begin with; None: it is not there."""

    def record(self, job_id: str, tenant: str = "") -> bytes | None:
        """The record of a job that is done; likewise."""

    def picture(self, job_id: str, image_format: ImageFormat, tenant: str = "") -> bytes | None:
        """Its picture; likewise."""


class InputPixels(NamedTuple):
    """The pixels that a job begins with, row by row."""

    #: (width, height).
    size: tuple[int, int]
    #: Three bytes a pixel.
    rgb: bytes
    #: One byte a pixel, 255 where the image is drawn; None: everywhere.
    mask: bytes | None
    #: What the caller should know.
    warnings: tuple[str, ...] = ()


def read_pixels(bucket: Files, job: Job) -> InputPixels:
    """The pixels that a job with an image and a size begins with. Raises `InputError`, `StorageError`."""
    image = _read(bucket, "image", InputReference.parse(job.image), job.tenant)
    mask = _mask(bucket, job, image)
    size = image.size
    if job.padding is None:
        size = job.width or size[0], job.height or size[1]
    if job.mask == ALPHA and image.cut_out is not None:
        cut_out = _resized(image.cut_out, size)
        mask = ImageChops.invert(cut_out.getchannel("A"))
        return InputPixels(size, on_white(cut_out).tobytes(), mask.tobytes())
    return InputPixels(
        size,
        _resized(image.rgb, size).tobytes(),
        None if mask is None else _resized(mask, size).tobytes(),
        () if image.cut_out is None else (_ON_WHITE,),
    )


def _mask(bucket: Files, job: Job, image: InputImage) -> Image.Image | None:
    if not job.mask:
        return None
    try:
        if job.mask == ALPHA:
            return mask_of_alpha(image)
        reference = InputReference.parse(job.mask)
        mask = read_mask(_file(bucket, "mask", reference, job.tenant))
    except BadInputError as error:
        raise InputError(f"mask {error}.") from None
    _compare("mask", mask.size, reference)
    return mask


def _read(bucket: Files, name: str, reference: InputReference, tenant: str) -> InputImage:
    data = _file(bucket, name, reference, tenant)
    try:
        image = read_input(data)
    except BadInputError as error:
        raise InputError(f"{name} {error}.") from None
    _compare(name, image.size, reference)
    return image


def _compare(name: str, size: tuple[int, int], reference: InputReference) -> None:
    if size != (reference.width, reference.height):
        shown, said = (f"{width}x{height}" for width, height in (size, reference[2:]))
        raise InputError(f"{name} is {shown}, and the job says {said}: submit the picture again.")


def _file(bucket: Files, name: str, reference: InputReference, tenant: str) -> bytes:
    """The bytes that a reference means."""
    if reference.kind == "job":
        return _picture(bucket, name, reference.id, tenant)
    data = bucket.read_input(reference.id, tenant)
    if data is None:
        raise InputError(
            f"{name} is gone from the bucket ({reference.id[:12]}...): submit the job again with the picture."
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
