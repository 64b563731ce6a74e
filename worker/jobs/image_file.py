"""From pixels to a file's bytes, with the job's infotext inside."""

from __future__ import annotations

import io

from PIL import Image, PngImagePlugin

from worker.contract.choices import ImageFormat
from worker.contract.infotext import exif
from worker.engine.runner import Picture

#: MIME types, by format.
CONTENT_TYPES = {ImageFormat.PNG: "image/png", ImageFormat.WEBP: "image/webp", ImageFormat.JPEG: "image/jpeg"}


def encode(picture: Picture, image_format: ImageFormat, text: str) -> bytes:
    """The picture as a file, with the infotext `text` where AUTOMATIC1111, Civitai and InvokeAI read it.

    PNG: the text chunk "parameters". WebP and JPEG: Exif's UserComment. PNG and WebP are lossless.
    """
    image = Image.fromarray(picture.pixels)
    file = io.BytesIO()
    match image_format:
        case ImageFormat.PNG:
            chunks = PngImagePlugin.PngInfo()
            chunks.add_text("parameters", text)
            image.save(file, "PNG", pnginfo=chunks, compress_level=4)
        case ImageFormat.WEBP:
            image.save(file, "WEBP", lossless=True, method=2, exif=exif(text))
        case ImageFormat.JPEG:
            image.save(file, "JPEG", quality=95, subsampling=0, exif=exif(text))
    return file.getvalue()
