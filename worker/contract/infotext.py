"""The infotext of a picture: its job, as AUTOMATIC1111 writes it and many tools read it.

    a small cat
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 5, Size: 512x512, Model: ..., Model hash: ...

It is in the PNG's text chunk `parameters`, or in Exif's UserComment. Its keys are in the table of job fields.
The format cannot hold every prompt, such as one with a line that starts with "Steps: ". Where reading the
infotext would not give the same job, the prompts are added once more as JSON, which reading prefers.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import struct
from collections.abc import Mapping
from typing import Any

from PIL import ExifTags, Image

from worker.contract.errors import InvalidJobError
from worker.contract.job import JOB_FIELDS, Job
from worker.contract.job_fields import FieldEntry
from worker.contract.scheduler_names import scheduler_of

#: The keys in the order in which they are written, each with its fields: width and height are one key.
_KEYS: tuple[tuple[str, tuple[FieldEntry, ...]], ...] = tuple(
    (key, tuple(fields))
    for key, fields in itertools.groupby(
        sorted(
            (each for each in JOB_FIELDS.values() if each.is_hashed and not each.is_prompt),
            key=lambda each: each.infotext_order,
        ),
        key=lambda each: each.infotext,
    )
)
#: For each field with choices these by AUTOMATIC1111's names for them.
_CHOICES = {
    each.name: {name: choice for choice, name in each.a1111_values.items()} for each in JOB_FIELDS.values()
}

_NEGATIVE = "Negative prompt: "
_SAMPLER = "Sampler"
_TEXTS = "Texts"
#: Whose infotext it is: another tool's model and its hash mean nothing here.
_VERSION, _OURS = "Version", "smallcat"
#: One `name: value`; a value with a comma or colon is quoted as JSON (modules/infotext_utils.py there).
_PAIR = re.compile(r'\s*(\w[\w \-/]*): ("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')

#: What a value is quoted for.
_SPECIAL = re.compile(r'[,:\n"]')


def write(job: Job) -> str:
    """The infotext of a resolved job. `read` of it gives back all that determines the picture."""
    pairs = {key: value for key, entries in _KEYS if (value := _value(job, entries)) is not None}
    pairs[_VERSION] = _OURS
    text = _join(job, pairs)
    if _texts(text) != (job.prompt, job.negative_prompt):
        # Not as ASCII: six characters for each of a long prompt's would not fit into a JPEG's Exif.
        texts = json.dumps([job.prompt, job.negative_prompt], ensure_ascii=False)
        pairs[_TEXTS] = json.dumps(texts, ensure_ascii=False)
        text = _join(job, pairs)
    return text


def read(text: str) -> Job:
    """The job that an infotext describes. Other tools' infotexts are read as far as they go.

    Raises `InvalidJobError` where a value is outside a job's limits.
    """
    prompt, negative = _texts(text)
    pairs = _pairs(text.rpartition("\n")[2])
    is_ours = pairs.get(_VERSION) == _OURS
    fields: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative}
    for key, entries in _KEYS:
        if key in pairs and (is_ours or not entries[0].infotext_ours_only):
            fields |= _fields(key, entries, pairs)
    return Job.parse(fields)


def _value(job: Job, entries: tuple[FieldEntry, ...]) -> object:
    """The value of a key; None where it is not written: a later version's field at its default."""
    if len(entries) > 1:
        return "x".join(str(getattr(job, entry.name)) for entry in entries)
    [entry] = entries
    value = getattr(job, entry.name)
    if not entry.is_original and value == entry.default:
        return None
    return _quote(entry.a1111_values.get(value, value)) if entry.kind is str else value


def _fields(key: str, entries: tuple[FieldEntry, ...], pairs: Mapping[str, str]) -> dict[str, Any]:
    """The job fields that the value of a key means."""
    text, entry = pairs[key], entries[0]
    if len(entries) > 1:
        return _sizes(key, entries, text) if text else {}
    if entry.kind in (int, float):
        return {entry.name: _number(entry.kind, key, text)}
    if key == _SAMPLER:
        # Since AUTOMATIC1111's version 1.9 the schedule has a key of its own beside the sampler.
        return {entry.name: scheduler_of(text, pairs.get("Schedule type"))} if text else {}
    if choices := _CHOICES[entry.name]:
        return {entry.name: choices.get(text, text)} if text else {}
    return {entry.name: text}


def _sizes(key: str, entries: tuple[FieldEntry, ...], text: str) -> dict[str, Any]:
    if not (sides := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)):
        raise InvalidJobError(f"The infotext has {key}: {text[:40]!r}, which is no size like 512x512.")
    return {entry.name: int(side) for entry, side in zip(entries, sides.groups(), strict=True)}


def _number(kind: type, key: str, text: str) -> int | float:
    try:
        number: int | float = kind(text)
    except ValueError:
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise InvalidJobError(f"The infotext has {key}: {shown!r}, which is no number.") from None
    return number


def _join(job: Job, pairs: Mapping[str, object]) -> str:
    lines = [job.prompt]
    if job.negative_prompt:
        lines.append(_NEGATIVE + job.negative_prompt)
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in pairs.items())])


def _texts(text: str) -> tuple[str, str]:
    """Prompt and negative prompt of an infotext."""
    body, _, last = text.rpartition("\n")
    if not last.startswith("Steps: "):
        body, last = text, ""
    if texts := _pairs(last).get(_TEXTS):
        try:
            prompt, negative = json.loads(texts)
        except (ValueError, TypeError, RecursionError):
            raise InvalidJobError(f"The infotext has {_TEXTS} that are no pair of texts.") from None
        return prompt, negative
    prompt, mark, negative = ("\n" + body).partition("\n" + _NEGATIVE)
    return prompt[1:], negative if mark else ""


def _pairs(line: str) -> dict[str, str]:
    return {name: _unquote(value) for name, value in _PAIR.findall(line)}


def _unquote(value: str) -> str:
    """What `_quote` quoted; as it stands where another tool's quotes are no JSON."""
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _quote(value: str) -> str:
    return json.dumps(value) if _SPECIAL.search(value) or value != value.strip() else value


#: Exif's marks for the encoding of a UserComment (CIPA DC-008, 4.6.6); Unicode is UTF-16 in file byte order.
_UNICODE, _ASCII = b"UNICODE\0", b"ASCII\0\0\0"


def job_from_image(data: bytes) -> Job:
    """The job that the infotext of a picture describes: submitting it gives the same picture.

    `data` is a PNG, WebP or JPEG file with an infotext. Raises `InvalidJobError` without one.
    """
    try:
        text = read_infotext(data)
    except (OSError, ValueError, SyntaxError) as error:  # What Pillow raises for what it cannot read.
        raise InvalidJobError(f"That is no picture that can be read: {error}.") from None
    if text is None:
        raise InvalidJobError("The picture holds no infotext: it was not made by smallcat, or was edited.")
    return read(text)


def read_infotext(data: bytes) -> str | None:
    """The infotext inside a PNG, WebP or JPEG; None where there is none."""
    with Image.open(io.BytesIO(data)) as image:
        if (text := image.info.get("parameters")) is not None:
            return str(text)
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not isinstance(comment, bytes):
        return None
    if comment.startswith(_UNICODE):
        return comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")
    return comment.removeprefix(_ASCII).decode("utf-8", "replace")


def exif(infotext: str) -> bytes:
    """An Exif block that holds a UserComment with the infotext, and nothing else.

    Written by hand: Pillow gives the comment the type BYTE, which piexif, and so AUTOMATIC1111, cannot read.
    Big-endian throughout, as those readers expect; IFD0 at 8, Exif's own IFD at 26, the comment at 44.
    """
    comment = _UNICODE + infotext.encode("utf-16-be")
    header = struct.pack(">2sHI", b"MM", 42, 8)
    pointer = struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, 4, 1, 26, 0)
    entry = struct.pack(">HHHIII", 1, ExifTags.Base.UserComment, 7, len(comment), 44, 0)
    return b"Exif\0\0" + header + pointer + entry + comment
