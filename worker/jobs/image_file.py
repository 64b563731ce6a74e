"""From pixels to a file's bytes, with the job's infotext inside, and the mark that a machine made it."""

from __future__ import annotations

import io
import zlib

from PIL import Image, PngImagePlugin

from worker.contract.choices import ImageFormat
from worker.contract.infotext import exif
from worker.engine.runner import Picture

#: MIME types, by format.
CONTENT_TYPES = {ImageFormat.PNG: "image/png", ImageFormat.WEBP: "image/webp", ImageFormat.JPEG: "image/jpeg"}

#: IPTC's term for media that a trained model made: http://cv.iptc.org/newscodes/digitalsourcetype.
GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
#: Its term for media of which a part is such, and a part of something else.
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
#: The XMP packet that says one of them (ISO 16684-1; IPTC Photo Metadata Standard 2021.1, "Digital Source
#: Type").
_XMP = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
   <Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


def encode(
    picture: Picture,
    image_format: ImageFormat,
    text: str,
    *,
    mark_as_generated: bool = True,
    is_composite: bool = False,
) -> bytes:
    """The picture as a file, with the infotext `text` where AUTOMATIC1111, Civitai and InvokeAI read it.

    PNG: the text chunk "parameters". WebP and JPEG: Exif's UserComment. PNG and WebP are lossless.
    With `mark_as_generated` an XMP packet says that a trained model made the picture, or, with
    `is_composite`, a part of it: in PNG the text chunk
    "XML:com.adobe.xmp", in WebP the chunk "XMP ", in JPEG a second APP1. The pixels are the same without.
    """
    image = Image.fromarray(picture.pixels)
    file = io.BytesIO()
    packet = _XMP.replace("{source}", COMPOSITE if is_composite else GENERATED)
    xmp = packet.encode() if mark_as_generated else b""
    match image_format:
        case ImageFormat.PNG:
            chunks = PngImagePlugin.PngInfo()
            chunks.add_text("parameters", text)
            if xmp:
                chunks.add_itxt("XML:com.adobe.xmp", packet)
            # As small as level 4 for pictures of a VAE, in less than half of its time.
            image.save(file, "PNG", pnginfo=chunks, compress_level=1, compress_type=zlib.Z_RLE)
        case ImageFormat.WEBP:
            image.save(file, "WEBP", lossless=True, method=2, exif=exif(text), xmp=xmp)
        case ImageFormat.JPEG:
            image.save(file, "JPEG", quality=95, subsampling=0, exif=exif(text), xmp=xmp)
    return file.getvalue()
