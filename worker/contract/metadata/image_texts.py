"""The texts inside a PNG, JPEG or WebP, found without unpacking the pixels.

PNG (ISO 15948): the chunks tEXt, zTXt, iTXt and eXIf, before or after the pixels. JPEG (ISO 10918): APP1 with
Exif or XMP, and comments. WebP (RFC 9649): the chunks EXIF and XMP. Other formats: what Pillow finds.
Time and memory are linear in the file: what is packed is unpacked up to a limit and no further.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from worker.contract.errors import InvalidJobError
from worker.contract.metadata.exif_texts import exif_texts, xmp_texts

#: Characters of a text, at most; and the bytes to which all texts of a picture unpack, at most.
MAX_TEXT = 4 * 2**20
MAX_UNPACKED = 4 * MAX_TEXT
#: Chunks or segments that are looked at, at most.
_MOST_PARTS = 100_000

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_XMP = "XML:com.adobe.xmp"
#: Where tools put their texts in a PNG.
KEYWORDS = frozenset(
    (
        *("parameters", "prompt", "invokeai_metadata", "sd-metadata", "Dream", "Comment", "Description"),
        *("UserComment", "generation_data", _XMP),
    )
)
#: What only names the tool, or holds nothing that is read.
_NAMED = frozenset(("workflow", "invokeai_workflow", "invokeai_graph", "Software", "fooocus_scheme"))


@dataclass(frozen=True)
class Text:
    """A text that a picture holds."""

    #: The PNG's keyword, Exif's tag, "XMP" or "comment".
    name: str
    text: str
    #: Whether the text is in Latin-1 by its format: there some tools write UTF-8.
    is_latin: bool = False


def texts_of(data: bytes) -> list[Text]:
    """The texts of a picture, in the order of the file.

    Raises `InvalidJobError` for what is no picture, and for a text over the limit.
    """
    if data.startswith(_PNG):
        parts = _png(data)
    elif data.startswith(_JPEG):
        parts = _jpeg(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        parts = _webp(data)
    else:
        parts = _other(data)
    return list(parts)


def _no_picture(why: str) -> InvalidJobError:
    return InvalidJobError(f"That is no picture that can be read: {why}.")


def _limited(name: str, text: str) -> str:
    if len(text) > MAX_TEXT:
        raise InvalidJobError(
            f'The picture\'s text "{name[:40]}" is over {MAX_TEXT:,} characters, the limit: it is not read.'
        )
    return text


def _exif(block: bytes) -> Iterator[Text]:
    for name, text in exif_texts(block).items():
        yield Text(name, _limited(name, text))


def _xmp(packet: bytes) -> Iterator[Text]:
    for text in xmp_texts(_limited("XMP", packet.decode("utf-8", "replace"))):
        yield Text("XMP", text)


def _png(data: bytes) -> Iterator[Text]:
    if data[12:16] != b"IHDR":
        raise _no_picture("a PNG without its first chunk")
    budget = MAX_UNPACKED
    for name, content in _chunks(data, 8, ">", length_first=True):
        if name == b"eXIf":
            yield from _exif(content)
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, text = _png_text(name, content[: 2 * MAX_UNPACKED], budget)
            if keyword == _XMP:
                budget -= len(text)
                yield from _xmp(text.encode("utf-8", "replace"))
            elif keyword in KEYWORDS | _NAMED:
                budget -= len(text)
                yield Text(keyword, _limited(keyword, text), is_latin=name != b"iTXt")


def _png_text(kind: bytes, content: bytes, budget: int) -> tuple[str, str]:
    """Keyword and text of a text chunk; nothing is unpacked for a keyword that is not read."""
    name, _, rest = content[:80].partition(b"\0")
    keyword, rest = name.decode("latin-1"), content[len(name) + 1 :]
    if keyword not in KEYWORDS:
        return keyword, ""
    if kind == b"tEXt":
        return keyword, rest.decode("latin-1")
    if kind == b"zTXt":
        return keyword, _unpacked(keyword, rest[1:], budget).decode("latin-1")
    is_packed, rest = rest[:1] == b"\1", rest[2:]
    for _ in ("language", "translated keyword"):
        rest = rest.partition(b"\0")[2]
    return keyword, (_unpacked(keyword, rest, budget) if is_packed else rest).decode("utf-8", "replace")


def _unpacked(name: str, packed: bytes, budget: int) -> bytes:
    most = min(MAX_TEXT, max(budget, 0))
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(packed, most + 1)
    except zlib.error:
        raise InvalidJobError(f'The picture\'s text "{name}" is damaged: it cannot be unpacked.') from None
    if len(text) > most:
        raise InvalidJobError(
            f'The picture\'s text "{name}" unpacks to more than {most:,} bytes, the limit: it is not read.'
        )
    return text


def _chunks(data: bytes, at: int, order: str, *, length_first: bool) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each chunk of a PNG or RIFF file, up to where it ends or is cut."""
    view = memoryview(data)
    for _ in range(_MOST_PARTS):
        if at + 8 > len(data):
            return
        one, other = data[at : at + 4], data[at + 4 : at + 8]
        name, (length,) = (
            (other, struct.unpack(f"{order}I", one))
            if length_first
            else (
                one,
                struct.unpack(f"{order}I", other),
            )
        )
        is_read = name in (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"EXIF", b"XMP ")
        yield name, bytes(view[at + 8 : at + 8 + length]) if is_read else b""
        at += 12 + length if length_first else 8 + length + length % 2


def _webp(data: bytes) -> Iterator[Text]:
    for name, content in _chunks(data, 12, "<", length_first=False):
        if name == b"EXIF":
            yield from _exif(content)
        elif name == b"XMP ":
            yield from _xmp(content)


def _jpeg(data: bytes) -> Iterator[Text]:
    at = 2
    for _ in range(_MOST_PARTS):
        if at + 4 > len(data) or data[at] != 0xFF:
            raise _no_picture("a JPEG that is cut or damaged")
        marker = data[at + 1]
        if marker == 0xFF:  # Filling.
            at += 1
            continue
        if marker in (0xDA, 0xD9):  # The pixels begin; the end.
            return
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # Markers without content.
            at += 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        content = data[at + 4 : at + 2 + length]
        if marker == 0xE1 and content.startswith(b"Exif\0\0"):
            yield from _exif(content)
        elif marker == 0xE1 and content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            yield from _xmp(content.partition(b"\0")[2])
        elif marker == 0xFE:
            yield Text("comment", content.decode("utf-8", "replace").rstrip("\0"))
        at += 2 + length


def _other(data: bytes) -> Iterator[Text]:
    """What Pillow finds in a picture of another format."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            info = image.info
    except Exception as error:  # noqa: BLE001 - Pillow's readers raise what they like.
        # Pillow shows the object that it was given.
        raise _no_picture(str(error).partition(" <_io")[0][:200]) from None
    if isinstance(block := info.get("exif"), bytes):
        yield from _exif(block)
    if isinstance(packet := info.get("xmp"), bytes):
        yield from _xmp(packet)
    if isinstance(comment := info.get("comment"), bytes):
        yield Text("comment", _limited("comment", comment.decode("utf-8", "replace")))
