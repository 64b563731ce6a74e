"""Files of pictures: pixels, and the infotext where other tools read it."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from worker.contract.choices import ImageFormat
from worker.contract.metadata.job_from_image import read_infotext
from worker.engine.runner import Picture
from worker.jobs.image_file import CONTENT_TYPES, GENERATED, encode

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
PICTURE = Picture(PIXELS)
TEXT = 'a small cat, "🐈"\nNegative prompt: dog\nSteps: 20, Seed: 5'
USER_COMMENT, EXIF_IFD = 0x9286, 0x8769


@pytest.mark.parametrize("image_format", ImageFormat)
@settings(deadline=None, max_examples=25)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1))
def test_the_parameters_come_back_as_they_were(image_format: ImageFormat, text: str) -> None:
    assert read_infotext(encode(PICTURE, image_format, text)) == text


@pytest.mark.parametrize("image_format", [ImageFormat.PNG, ImageFormat.WEBP])
def test_png_and_webp_are_lossless(image_format: ImageFormat) -> None:
    with Image.open(io.BytesIO(encode(PICTURE, image_format, TEXT))) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), PIXELS)


def test_jpeg_is_close_and_keeps_its_colours() -> None:
    smooth = np.zeros((64, 64, 3), np.uint8)
    smooth[:, :32, 0] = 200
    smooth[:, 32:, 2] = np.arange(32)[None, :] * 6
    with Image.open(io.BytesIO(encode(Picture(smooth), ImageFormat.JPEG, TEXT))) as image:
        assert np.abs(np.asarray(image).astype(int) - smooth).max() < 30
        # Without chroma subsampling: one sampling factor for all three components.
        assert {layer[1:3] for layer in image.layer} == {(1, 1)}  # type: ignore[attr-defined]


@pytest.mark.parametrize("image_format", ImageFormat)
def test_a_file_is_of_the_format_that_its_type_says(image_format: ImageFormat) -> None:
    with Image.open(io.BytesIO(encode(PICTURE, image_format, TEXT))) as image:
        assert image.get_format_mimetype() == CONTENT_TYPES[image_format]
        assert image.size == (32, 24)


def test_a_png_has_the_text_chunk_of_automatic1111() -> None:
    with Image.open(io.BytesIO(encode(PICTURE, ImageFormat.PNG, TEXT))) as image:
        assert image.text["parameters"] == TEXT  # type: ignore[attr-defined]


def user_comment(exif: bytes) -> bytes:
    """Exif's UserComment, read byte by byte by the specification, as piexif does (CIPA DC-008)."""
    tiff = exif.removeprefix(b"Exif\x00\x00")
    order = {b"MM": ">", b"II": "<"}[tiff[:2]]

    def entries(offset: int) -> dict[int, tuple[int, int, int, int]]:
        (count,) = struct.unpack_from(f"{order}H", tiff, offset)
        rows = (
            (offset + 2 + 12 * i, *struct.unpack_from(f"{order}HHII", tiff, offset + 2 + 12 * i))
            for i in range(count)
        )
        return {row[1]: (row[0], row[2], row[3], row[4]) for row in rows}

    (first,) = struct.unpack_from(f"{order}I", tiff, 4)
    sub = entries(first)[EXIF_IFD][3]
    _, kind, length, at = entries(sub)[USER_COMMENT]
    assert kind == 7, "UserComment is of type UNDEFINED"
    return tiff[at : at + length]


@pytest.mark.parametrize("image_format", [ImageFormat.WEBP, ImageFormat.JPEG])
def test_webp_and_jpeg_have_the_user_comment_of_automatic1111(image_format: ImageFormat) -> None:
    """There it is written by `piexif.helper.UserComment.dump(text, "unicode")`: a mark, then UTF-16BE."""
    with Image.open(io.BytesIO(encode(PICTURE, image_format, TEXT))) as image:
        assert user_comment(image.info["exif"]) == b"UNICODE\x00" + TEXT.encode("utf-16-be")


def with_comment(comment: bytes) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = comment
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    ("comment", "text"),
    [
        (b"UNICODE\x00" + "a cat".encode("utf-16-be"), "a cat"),
        (b"ASCII\x00\x00\x00a cat", "a cat"),
        (b"a cat", "a cat"),
        (b"UNICODE\x00" + "a cat".encode("utf-16-be") + b"\x00", "a cat\ufffd"),
        (b"UNICODE\x00\xd8\x00", "\ufffd"),
    ],
    ids=["unicode", "ascii", "unmarked", "cut", "surrogate"],
)
def test_other_tools_comments_are_read_as_far_as_they_go(comment: bytes, text: str) -> None:
    assert read_infotext(with_comment(comment)) == text


@pytest.mark.parametrize("name", ["PNG", "WEBP", "JPEG", "GIF"])
def test_a_picture_without_parameters_has_none(name: str) -> None:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, name)
    assert read_infotext(file.getvalue()) is None


def parts(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks or segments before the pixels, by their specification: name and content."""
    at = {b"\x89P": 8, b"RI": 12, b"\xff\xd8": 2}[data[:2]]
    while at + 4 <= len(data):
        if data[:2] == b"\x89P":  # PNG (ISO 15948): length, name, content, CRC
            (length,), name = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
            content, at = data[at + 8 : at + 8 + length], at + 12 + length
            assert struct.unpack(">I", data[at - 4 : at])[0] == zlib.crc32(name + content)
        elif data[:2] == b"RI":  # WebP (RFC 9649): name, length, content, padding
            name, (length,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
            content, at = data[at + 8 : at + 8 + length], at + 8 + length + length % 2
        else:  # JPEG (ISO 10918): marker, length with itself, content
            name, (length,) = data[at : at + 2], struct.unpack_from(">H", data, at + 2)
            content, at = data[at + 4 : at + 2 + length], at + 2 + length
            if name == b"\xff\xda":
                return
        yield name, content


#: Where XMP is by its own specification (ISO 16684-1 for the packet, Adobe's XMP part 3 for the places).
XMP_PLACES = {
    ImageFormat.PNG: (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0"),
    ImageFormat.WEBP: (b"XMP ", b""),
    ImageFormat.JPEG: (b"\xff\xe1", b"http://ns.adobe.com/xap/1.0/\0"),
}
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"


def packets(data: bytes, image_format: ImageFormat) -> list[bytes]:
    place, prefix = XMP_PLACES[image_format]
    return [each[len(prefix) :] for name, each in parts(data) if name == place and each.startswith(prefix)]


@pytest.mark.parametrize("image_format", ImageFormat)
def test_a_file_says_that_a_trained_model_made_it(image_format: ImageFormat) -> None:
    data = encode(PICTURE, image_format, TEXT)
    [packet] = packets(data, image_format)
    assert packet.startswith(b"<?xpacket begin=")
    root = ElementTree.fromstring(packet)  # noqa: S314 - our own
    [description] = root.iter(f"{RDF}Description")
    assert [(each.tag, each.text) for each in description] == [(f"{IPTC}DigitalSourceType", GENERATED)]
    assert read_infotext(data) == TEXT
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # Pillow has a PNG's later chunks after that.
        found = image.info["xmp"]
        assert found == packet


@pytest.mark.parametrize("image_format", ImageFormat)
def test_the_mark_changes_no_pixel_and_little_else(image_format: ImageFormat) -> None:
    marked = encode(PICTURE, image_format, TEXT)
    plain = encode(PICTURE, image_format, TEXT, mark_as_generated=False)
    assert packets(plain, image_format) == []
    assert b"trainedAlgorithmicMedia" not in plain
    assert len(plain) < len(marked) < len(plain) + 700
    with Image.open(io.BytesIO(marked)) as one, Image.open(io.BytesIO(plain)) as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.services
@pytest.mark.parametrize("image_format", ImageFormat)
def test_exiftool_reads_the_mark_and_the_infotext(image_format: ImageFormat, tmp_path: Path) -> None:
    """exiftool 12.57 shows the term's own name in words, and its URI with -n."""
    if shutil.which("exiftool") is None:
        needed = os.environ.get("CI") == "true" and not os.environ.get("WITHOUT_EXIFTOOL")
        (pytest.fail if needed else pytest.skip)(
            "exiftool is not installed: apt-get install libimage-exiftool-perl"
        )
    path = tmp_path / f"cat.{image_format}"
    path.write_bytes(encode(PICTURE, image_format, TEXT))
    shown = subprocess.run(["exiftool", "-n", "-j", "-G", path], check=True, capture_output=True).stdout
    [found] = json.loads(shown)
    assert found["XMP:DigitalSourceType"] == GENERATED
    texts = [value for name, value in found.items() if name in ("PNG:Parameters", "EXIF:UserComment")]
    assert texts == [TEXT]
    assert "ExifTool:Warning" not in found
