"""Masks as other APIs have them, made to ours: grey, and white where the image is drawn.

Sources: AUTOMATIC1111 1.10 (modules/processing.py: `create_binary_mask`; modules/masking.py: `fill`), and
OpenAI's reference of image edits.
"""

from __future__ import annotations

import io

from PIL import Image, ImageFilter, ImageOps

from worker.contract.errors import InvalidJobError
from worker.contract.input_image import BadInputError, InputImage, read_input

#: Radii of the blurs by which AUTOMATIC1111 fills the masked part, and how often each is laid over the last.
_FILLS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))


def _read(name: str, data: bytes) -> InputImage:
    try:
        return read_input(data)
    except BadInputError as error:
        raise InvalidJobError(f"{name} {error}.") from None


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def a1111_mask(data: bytes, *, inverted: bool, rounded: bool) -> bytes:
    """AUTOMATIC1111's mask as a grey PNG: where it has an alpha channel, what is opaque is drawn."""
    found = _read("mask", data)
    if found.alpha is not None:
        mask = found.alpha.point(lambda value: 255 if value > 128 else 0) if rounded else found.alpha
    else:
        mask = found.rgb.convert("L")
    return _png(ImageOps.invert(mask) if inverted else mask)


def filled(data: bytes, mask: bytes) -> bytes:
    """An image whose masked part is filled by the colours around it, as `inpainting_fill` 0 asks for."""
    image = _read("init_images", data).rgb
    drawn = Image.open(io.BytesIO(mask)).convert("L")
    if drawn.size != image.size:
        drawn = drawn.resize(image.size, Image.Resampling.LANCZOS)
    whole = Image.new("RGBA", image.size)
    kept = Image.new("RGBa", image.size)
    kept.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(drawn))
    for radius, times in _FILLS:
        blurred = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            whole.alpha_composite(blurred)
    return _png(whole.convert("RGB"))


def openai_mask(data: bytes) -> bytes:
    """OpenAI's mask as a grey PNG: what is transparent there is drawn."""
    found = _read("mask", data)
    if found.alpha is None:
        raise InvalidJobError(
            "mask has no transparent pixel, and OpenAI's masks are transparent where the image is drawn: "
            "make it so, or send it to /v1/jobs, where masks are white where the image is drawn."
        )
    return _png(ImageOps.invert(found.alpha))


def is_transparent(data: bytes) -> bool:
    """Whether an image is transparent in places."""
    return _read("image", data).alpha is not None
