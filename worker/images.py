"""From pixels to a file's bytes, with the job's parameters inside."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import ExifTags, Image, PngImagePlugin

from worker.job import ImageFormat

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: MIME types, by format.
CONTENT_TYPES = {ImageFormat.PNG: "image/png", ImageFormat.WEBP: "image/webp", ImageFormat.JPEG: "image/jpeg"}

#: Exif's marks for the encoding of a UserComment (CIPA DC-008, 4.6.6); Unicode is UTF-16 in file byte order.
_UNICODE, _ASCII = b"UNICODE\0", b"ASCII\0\0\0"


@dataclass(frozen=True)
class Picture:
    """A decoded picture, off the device."""

    #: (height, width, 3) uint8 RGB.
    pixels: NDArray[np.uint8]
    #: The safety checker's verdict; None: the model has none, or it is off.
    nsfw: bool | None = None


def encode(picture: Picture, image_format: ImageFormat, parameters: str) -> bytes:
    """The picture as a file, with `parameters` where AUTOMATIC1111, Civitai and InvokeAI look for them.

    PNG: the text chunk "parameters". WebP and JPEG: Exif's UserComment. PNG and WebP are lossless.
    """
    image = Image.fromarray(picture.pixels)
    file = io.BytesIO()
    match image_format:
        case ImageFormat.PNG:
            text = PngImagePlugin.PngInfo()
            text.add_text("parameters", parameters)
            image.save(file, "PNG", pnginfo=text, compress_level=4)
        case ImageFormat.WEBP:
            image.save(file, "WEBP", lossless=True, method=2, exif=_exif(parameters))
        case ImageFormat.JPEG:
            image.save(file, "JPEG", quality=95, subsampling=0, exif=_exif(parameters))
    return file.getvalue()


def read_parameters(data: bytes) -> str | None:
    """The parameters text inside a PNG, WebP or JPEG; None where there is none."""
    with Image.open(io.BytesIO(data)) as image:
        if (text := image.info.get("parameters")) is not None:
            return str(text)
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not isinstance(comment, bytes):
        return None
    if comment.startswith(_UNICODE):
        return comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")
    return comment.removeprefix(_ASCII).decode("utf-8", "replace")


def _exif(parameters: str) -> bytes:
    """An Exif block that holds a UserComment and nothing else.

    Written by hand: Pillow gives the comment the type BYTE, which piexif, and so AUTOMATIC1111, cannot read.
    Big-endian throughout, as those readers expect; IFD0 at 8, Exif's own IFD at 26, the comment at 44.
    """
    comment = _UNICODE + parameters.encode("utf-16-be")
    header = struct.pack(">2sHI", b"MM", 42, 8)
    pointer = struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, 4, 1, 26, 0)
    entry = struct.pack(">HHHIII", 1, ExifTags.Base.UserComment, 7, len(comment), 44, 0)
    return b"Exif\0\0" + header + pointer + entry + comment
