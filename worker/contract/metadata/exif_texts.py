"""The texts of an Exif block and of an XMP packet, where tools put a picture's parameters.

Exif is CIPA DC-008, in TIFF 6.0; XMP is ISO 16684-1. Only the tags that tools use are read, each once.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from xml.etree import ElementTree

from worker.contract.errors import InvalidJobError

#: The tags that are read, by the names under which their texts are known.
TAGS = {
    0x9286: "UserComment",
    0x010E: "ImageDescription",
    0x010F: "Make",
    0x0110: "Model",
    0x9C9C: "XPComment",
    0x927C: "MakerNote",
}
#: The tag that points to Exif's own directory.
_EXIF = 0x8769
#: Bytes of a value, by its type, as far as texts have it.
_SIZES = {1: 1, 2: 1, 7: 1, 4: 4}
#: Entries of a directory that are looked at.
_MOST_ENTRIES = 1_000
#: Marks that a decoded text has when its bytes were in the right order.
_MARKS = ("Steps: ", '"prompt', '"class_type"', "sui_image_params")


def exif_texts(block: bytes) -> dict[str, str]:
    """The texts of an Exif block by their tags' names. A block that is broken has none."""
    tiff = block.removeprefix(b"Exif\0\0")
    order = {b"MM": ">", b"II": "<"}.get(tiff[:2])
    if order is None:
        return {}
    found: dict[str, str] = {}
    try:
        (first,) = struct.unpack_from(f"{order}I", tiff, 4)
        directories = [first]
        for _ in range(2):
            if not directories:
                break
            for tag, value, number in _entries(tiff, order, directories.pop()):
                if tag == _EXIF and not directories:
                    directories.append(number)
                elif tag in TAGS and TAGS[tag] not in found:
                    found[TAGS[tag]] = decoded(value, tag, order)
    except struct.error:  # Cut short: what came before it counts.
        pass
    return {name: text for name, text in found.items() if text}


def _entries(tiff: bytes, order: str, at: int) -> Iterator[tuple[int, bytes, int]]:
    """Tag, value and the value as a number, for each entry that is read."""
    (count,) = struct.unpack_from(f"{order}H", tiff, at)
    seen: set[int] = set()
    for index in range(min(count, _MOST_ENTRIES)):
        entry = at + 2 + 12 * index
        tag, kind, length, number = struct.unpack_from(f"{order}HHII", tiff, entry)
        if (tag != _EXIF and tag not in TAGS) or tag in seen or kind not in _SIZES:
            continue
        seen.add(tag)
        size = length * _SIZES[kind]
        start = entry + 8 if size <= 4 else number
        yield tag, tiff[start : start + size], number


def decoded(value: bytes, tag: int = 0x9286, order: str = ">") -> str:
    """A tag's text. A UserComment begins with a mark of its encoding, which not every tool keeps to."""
    if tag == 0x9C9C:
        return value.decode("utf-16-le", "replace").rstrip("\0")
    mark, rest = value[:8], value[8:]
    if mark == b"UNICODE\0":
        return _utf16(rest, order)
    if mark == b"JIS\0\0\0\0\0":
        return rest.decode("iso2022_jp", "replace").rstrip("\0")
    if mark in (b"ASCII\0\0\0", b"\0" * 8):
        value = rest
    return _utf8(value)


def _utf8(value: bytes) -> str:
    try:
        return value.decode("utf-8").rstrip("\0")
    except UnicodeDecodeError:
        return value.decode("latin-1").rstrip("\0")


def _utf16(value: bytes, order: str) -> str:
    """UTF-16 of either order, or UTF-8 under its mark: what reads as a text of a tool."""
    names = ["utf-16-be", "utf-16-le"] if order == ">" else ["utf-16-le", "utf-16-be"]
    texts = [value.decode(name, "replace") for name in names]
    with contextlib.suppress(UnicodeDecodeError):
        texts.append(value.decode("utf-8"))
    marked = [text for text in texts if any(mark in text for mark in _MARKS)]
    # Without a mark nobody reads it. AUTOMATIC1111 and smallcat write big-endian, whatever the file's order.
    text = (marked or [value.decode("utf-16-be", "replace")])[0].rstrip("\0")
    # A byte order mark, unless smallcat wrote it: then it is the prompt's first character.
    return text.removeprefix("\ufeff") if marked and "Version: smallcat" not in text else text


def xmp_texts(packet: str) -> Iterator[str]:
    """The texts of an XMP packet. Raises `InvalidJobError` for one that declares entities."""
    if "<!DOCTYPE" in packet or "<!ENTITY" in packet:
        raise InvalidJobError("The picture's XMP declares entities, which no XMP needs: it is not read.")
    try:
        root = ElementTree.fromstring(packet.strip("\0 \t\r\n\ufeff"))  # noqa: S314 - no entities
    except (ElementTree.ParseError, ValueError):
        return
    for element in root.iter():
        for text in (element.text, *element.attrib.values()):
            if text and len(text) > 20:
                yield text
