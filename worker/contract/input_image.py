"""A picture that a job begins with: what its file may be, checked before it is unpacked, and how it is read.

Producers check by it what they upload, and workers read by it what they fetch: both unpack what strangers
made, within the same limits. PNG, JPEG and WebP are read, by their content and whatever they are called.

    turn            as Exif's Orientation says
    grey, palette   become RGB
    16 bits         become 8, by the upper ones
    CMYK            becomes RGB by Pillow's formula, without a profile
    profiles        are ignored, as diffusers and AUTOMATIC1111 ignore them
    transparency    is laid on white; it may be the mask (`mask_of_alpha`)
    animation       is refused: which frame is meant is not said
    damage          is refused, also where most of the picture is there
"""

from __future__ import annotations

import io
from typing import Final, NamedTuple

from PIL import ExifTags, Image, ImageChops, ImageFile, UnidentifiedImageError

from worker.contract.input_reference import (
    MAX_INPUT_BYTES,
    MAX_INPUT_PIXELS,
    MAX_INPUT_SIDE,
    too_many_pixels,
)

#: MIME types of what is read, by Pillow's names. An MPO is a JPEG with further pictures behind the first.
MIME_TYPES: Final = {"PNG": "image/png", "JPEG": "image/jpeg", "MPO": "image/jpeg", "WEBP": "image/webp"}
_FORMATS: Final = ("PNG", "JPEG", "WEBP")
#: How files of other kinds begin, or go on after four bytes, and what they are.
_OTHERS: Final = (
    (b"GIF8", 0, "a GIF"),
    (b"BM", 0, "a BMP"),
    (b"II*\0", 0, "a TIFF or a raw photo"),
    (b"MM\0*", 0, "a TIFF or a raw photo"),
    (b"8BPS", 0, "a Photoshop file"),
    (b"%PDF", 0, "a PDF"),
    (b"<svg", 0, "an SVG"),
    (b"<?xml", 0, "an SVG or other XML"),
    (b"\0\0\0\x0cJXL ", 0, "a JPEG XL"),
    (b"\xff\x0a", 0, "a JPEG XL"),
    (b"ftypavi", 4, "an AVIF"),
    (b"ftyphei", 4, "a HEIC"),
    (b"ftypmif1", 4, "a HEIC"),
    (b"ftyp", 4, "a video, or a HEIC"),
    (b"PK\x03\x04", 0, "a zip archive"),
    (b"<", 0, "a web page"),
)
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Passes of a progressive JPEG, at most; usual are 10. Each takes the time of a whole picture.
_MAX_SCANS: Final = 64
_SCAN: Final = b"\xff\xda"
#: From which value on a pixel of a mask is drawn: diffusers' 0.5.
HALF: Final = 128
#: Grey values of PNGs of 2 and 4 bits, at most, by Pillow's names for such pixels.
_FEW_GREYS: Final = {"L;2": 3, "L;4": 15}
#: Pillow's modes that are read: what PNG, JPEG and WebP can have.
_MODES: Final = frozenset(("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "I;16"))


class BadInputError(ValueError):
    """Raised for what is no picture to begin with: the end of a sentence that begins with its name."""


class InputImage(NamedTuple):
    """A picture as a job begins with it."""

    #: RGB, turned as it is seen, on white where it is transparent.
    rgb: Image.Image
    #: The same before it was laid on white, mode RGBA; None: all of it is opaque.
    cut_out: Image.Image | None
    #: The file's MIME type.
    mime: str

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.size

    @property
    def alpha(self) -> Image.Image | None:
        """Its alpha channel, mode L of the same size: 255 is opaque; None: all of it is."""
        return None if self.cut_out is None else self.cut_out.getchannel("A")


def read_input(data: bytes) -> InputImage:
    """The picture in a file's bytes. Raises `BadInputError`.

    Takes up to 0.7 s of a core and 500 MB of memory for a picture at the limits.
    """
    image = _opened(data)
    mime = MIME_TYPES[image.format or ""]
    try:
        pixels = next((tile.args for tile in image.tile), None)
        image.load()
        _correct_transparency(image, pixels)
        rgb, cut_out = _parts(_turned(image))
    except MemoryError:
        raise BadInputError(f"{too_many_pixels(*image.size)}, and memory is short") from None
    except BadInputError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever Pillow makes of what strangers made
        raise BadInputError(f"is damaged ({_words(error)}): save it again") from None
    return InputImage(rgb, cut_out, mime)


def read_mask(data: bytes) -> Image.Image:
    """The mask in a file's bytes: mode L, 255 where the image is drawn anew. Raises `BadInputError`."""
    found = read_input(data)
    if found.alpha is not None:
        raise BadInputError(
            "is transparent in places: make it white where the image is to be drawn, and black elsewhere"
        )
    mask = found.rgb.convert("L")
    if mask.getextrema() == (0, 0):
        raise BadInputError("is black everywhere, so that nothing would be drawn: make a part of it white")
    if _is_dark(mask):
        raise BadInputError(
            f"is nowhere as light as {HALF} of 255, so that nothing would be drawn: make a part of it white"
        )
    return mask


def mask_of_alpha(image: InputImage) -> Image.Image:
    """The mask that draws what is transparent in `image`. Raises `BadInputError` where nothing is, or all."""
    alpha = image.alpha
    if alpha is None:
        raise BadInputError(
            "is alpha, and no pixel of the image is transparent: give a mask, or save the cut-out as PNG or "
            "WebP with a transparent background, which a JPEG cannot have"
        )
    if alpha.getextrema() == (0, 0):
        raise BadInputError(
            "is alpha, and every pixel of the image is transparent, so that nothing would be kept: give a "
            "picture with something in it"
        )
    mask = ImageChops.invert(alpha)
    if _is_dark(mask):
        raise BadInputError(
            "is alpha, and no pixel of the image is transparent by half, so that nothing would be drawn: "
            "give a mask"
        )
    return mask


def _is_dark(mask: Image.Image) -> bool:
    """Whether no pixel of a mask is drawn."""
    return not any(mask.histogram()[HALF:])


def _opened(data: bytes) -> ImageFile.ImageFile:
    """The picture with its head alone read, which is within the limits."""
    if len(data) > MAX_INPUT_BYTES:
        raise BadInputError(too_many_bytes(len(data)))
    if not data:
        raise BadInputError("is empty: give a PNG, JPEG or WebP")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        limit = f"{MAX_INPUT_PIXELS // 1_000_000} megapixels"
        raise BadInputError(f"has far more pixels than the limit, {limit}: make it smaller") from None
    except UnidentifiedImageError:
        raise BadInputError(f"is {_kind(data)}: give a PNG, JPEG or WebP") from None
    except Exception as error:  # noqa: BLE001 - whatever Pillow makes of what strangers made
        raise BadInputError(f"is damaged ({_words(error)}): save it again") from None
    width, height = image.size
    if max(width, height) > MAX_INPUT_SIDE or width * height > MAX_INPUT_PIXELS:
        raise BadInputError(too_many_pixels(width, height))
    if image.format in ("JPEG", "MPO") and (scans := data.count(_SCAN)) > _MAX_SCANS:
        raise BadInputError(f"is a JPEG of {scans:,} passes, the limit is {_MAX_SCANS}: save it again")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise BadInputError(f"is animated ({frames} frames): save the frame that is meant")
    if image.mode not in _MODES:
        raise BadInputError(f"has pixels of the kind {image.mode}, which is not read: save it as RGB")
    return image


def too_many_bytes(size: int) -> str:
    """What is wrong with a file of so many bytes: the end of a sentence."""
    return f"is {size / 1e6:.1f} MB, the limit is {MAX_INPUT_BYTES // 1_000_000} MB: make it smaller"


def _kind(data: bytes) -> str:
    start = data[:64].lstrip() if data[:1].isspace() else data[:64]
    for mark, at, kind in _OTHERS:
        if start[at : at + len(mark)] == mark:
            return kind
    return "no picture that is read"


def _words(error: Exception) -> str:
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return "".join(letter if letter.isprintable() else "?" for letter in text[:100])


def _turned(image: Image.Image) -> Image.Image:
    """The picture as it is seen. One whose Exif cannot be read is as its pixels are, as in other programs."""
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 - as above
        return image
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


def _correct_transparency(image: Image.Image, pixels: object) -> None:
    """Make the transparent grey of a PNG one of the picture's, 0 to 255: Pillow has it as the file has.

    `pixels`: what Pillow calls the file's pixels.
    """
    if "transparency" not in image.info:
        return
    if pixels in ("I;16B", "RGB;16B"):
        raise BadInputError("has 16 bits and a transparent colour: save it with 8 bits, or an alpha channel")
    if isinstance(pixels, str) and (most := _FEW_GREYS.get(pixels)):
        image.info["transparency"] = (image.info["transparency"] & most) * (255 // most)


def _parts(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """RGB on white, and RGBA where something is transparent."""
    if image.mode == "I;16":
        # Pillow's own conversion cuts what is above 255 instead. The pixels are of little endian.
        image = Image.frombytes("L", image.size, image.tobytes()[1::2])
    elif image.has_transparency_data:
        whole = image.convert("RGBA")
        if whole.getchannel("A").getextrema() != (255, 255):
            return on_white(whole), whole
        return whole.convert("RGB"), None
    return image.convert("RGB"), None


def on_white(cut_out: Image.Image) -> Image.Image:
    """What is transparent in places, RGBA, on white: RGB. Opaque pixels keep their colours."""
    return Image.alpha_composite(Image.new("RGBA", cut_out.size, "white"), cut_out).convert("RGB")
