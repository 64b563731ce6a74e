"""From pixels to a file's bytes, with the job's parameters inside."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image, PngImagePlugin

from worker.contract.infotext import exif
from worker.contract.job import ImageFormat
from worker.engine.runner import Picture

if TYPE_CHECKING:
    pass

#: MIME types, by format.
CONTENT_TYPES = {ImageFormat.PNG: "image/png", ImageFormat.WEBP: "image/webp", ImageFormat.JPEG: "image/jpeg"}


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
            image.save(file, "WEBP", lossless=True, method=2, exif=exif(parameters))
        case ImageFormat.JPEG:
            image.save(file, "JPEG", quality=95, subsampling=0, exif=exif(parameters))
    return file.getvalue()
