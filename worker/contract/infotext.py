"""The `parameters` text of a picture, as AUTOMATIC1111 writes it and many tools read it.

    a small cat
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 5, Size: 512x512, Model: ..., Model hash: ...

The format cannot hold every prompt (one with a line that starts with "Steps: ", say). Where reading the
text back would not give the same job, the texts are added once more as JSON, which reading prefers.
"""

from __future__ import annotations

import io
import json
import re
import struct
from typing import Any

from PIL import ExifTags, Image

from worker.contract.errors import InvalidJobError
from worker.contract.job import Job, Scheduler

#: AUTOMATIC1111's names for diffusers' schedulers.
SAMPLERS = {
    Scheduler.DDIM: "DDIM",
    Scheduler.EULER: "Euler",
    Scheduler.EULER_ANCESTRAL: "Euler a",
    Scheduler.DPMPP_2M: "DPM++ 2M",
    Scheduler.DPMPP_2M_KARRAS: "DPM++ 2M Karras",
    Scheduler.PNDM: "PLMS",
    Scheduler.UNIPC: "UniPC",
    Scheduler.LCM: "LCM",
    Scheduler.DEFAULT: "Default",
}
_SCHEDULERS = {name: scheduler for scheduler, name in SAMPLERS.items()}

_NEGATIVE = "Negative prompt: "
_TEXTS = "Texts"
#: One `name: value`; a value with a comma or colon is quoted as JSON (modules/infotext_utils.py there).
_PAIR = re.compile(r'\s*(\w[\w \-/]*): ("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def write(job: Job) -> str:
    """The text for a resolved job. `read` of it gives back all that determines the picture."""
    pairs: dict[str, object] = {
        "Steps": job.steps,
        "Sampler": SAMPLERS[job.scheduler],
        "CFG scale": job.guidance_scale,
        # Where guidance is used throughout, as other tools have it, nothing is said of it.
        **({"Guidance start": job.guidance_start} if job.guidance_start > 0 else {}),
        **({"Guidance stop": job.guidance_stop} if job.guidance_stop < 1 else {}),
        "Seed": job.seed,
        "Size": f"{job.width}x{job.height}",
        "Model": _quote(job.model),
        "Model hash": _quote(job.revision),
        "Format": job.format,
        "Version": "smallcat",
    }
    text = _join(job, pairs)
    if _texts(text) != (job.prompt, job.negative_prompt):
        # Not as ASCII: six characters for each of a long prompt's would not fit into a JPEG's Exif.
        texts = json.dumps([job.prompt, job.negative_prompt], ensure_ascii=False)
        pairs[_TEXTS] = json.dumps(texts, ensure_ascii=False)
        text = _join(job, pairs)
    return text


def read(text: str) -> Job:
    """The job that a picture's `parameters` text describes. Other tools' texts are read as far as they go.

    Raises `InvalidJobError` where a value is outside a job's limits.
    """
    prompt, negative = _texts(text)
    pairs = _pairs(text.rpartition("\n")[2])
    fields: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative}
    if size := pairs.get("Size"):
        if not (sides := re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)):
            raise InvalidJobError(
                f"The parameters text has Size: {size[:40]!r}, which is no size like 512x512."
            )
        fields["width"], fields["height"] = int(sides[1]), int(sides[2])
    for name, field, kind in (
        ("Steps", "steps", int),
        ("CFG scale", "guidance_scale", float),
        ("Guidance start", "guidance_start", float),
        ("Guidance stop", "guidance_stop", float),
        ("Seed", "seed", int),
    ):
        if name in pairs:
            fields[field] = _number(kind, name, pairs[name])
    for name, field in (("Model", "model"), ("Model hash", "revision"), ("Format", "format")):
        if name in pairs:
            fields[field] = pairs[name]
    if sampler := pairs.get("Sampler"):
        # Since its version 1.9 the schedule is apart from the sampler.
        karras = f"{sampler} Karras" if pairs.get("Schedule type") == "Karras" else sampler
        fields["scheduler"] = _SCHEDULERS.get(karras, karras)
    if pairs.get("Version") != "smallcat":
        # Another tool's hash and model file name mean nothing here.
        fields.pop("revision", None)
        fields.pop("model", None)
    return Job.parse(fields)


def _number(kind: type[int] | type[float], name: str, text: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise InvalidJobError(f"The parameters text has {name}: {shown!r}, which is no number.") from None


def _join(job: Job, pairs: dict[str, object]) -> str:
    lines = [job.prompt]
    if job.negative_prompt:
        lines.append(_NEGATIVE + job.negative_prompt)
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in pairs.items())])


def _texts(text: str) -> tuple[str, str]:
    """Prompt and negative prompt of a parameters text."""
    body, _, last = text.rpartition("\n")
    if not last.startswith("Steps: "):
        body, last = text, ""
    if texts := _pairs(last).get(_TEXTS):
        try:
            prompt, negative = json.loads(texts)
        except (ValueError, TypeError, RecursionError):
            raise InvalidJobError(f"The parameters text has {_TEXTS} that are no pair of texts.") from None
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
    return json.dumps(value) if re.search(r'[,:\n"]', value) or value != value.strip() else value


#: Exif's marks for the encoding of a UserComment (CIPA DC-008, 4.6.6); Unicode is UTF-16 in file byte order.
_UNICODE, _ASCII = b"UNICODE\0", b"ASCII\0\0\0"


def job_from_image(data: bytes) -> Job:
    """The job that the infotext of a picture describes: submitting it gives the same picture.

    `data` is a PNG, WebP or JPEG file with a `parameters` text. Raises `InvalidJobError` without one.
    """
    try:
        text = read_parameters(data)
    except (OSError, ValueError, SyntaxError) as error:  # What Pillow raises for what it cannot read.
        raise InvalidJobError(f"That is no picture that can be read: {error}.") from None
    if text is None:
        raise InvalidJobError(
            "The picture holds no parameters text: it was not made by smallcat, or was edited."
        )
    return read(text)


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


def exif(parameters: str) -> bytes:
    """An Exif block that holds a UserComment and nothing else.

    Written by hand: Pillow gives the comment the type BYTE, which piexif, and so AUTOMATIC1111, cannot read.
    Big-endian throughout, as those readers expect; IFD0 at 8, Exif's own IFD at 26, the comment at 44.
    """
    comment = _UNICODE + parameters.encode("utf-16-be")
    header = struct.pack(">2sHI", b"MM", 42, 8)
    pointer = struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, 4, 1, 26, 0)
    entry = struct.pack(">HHHIII", 1, ExifTags.Base.UserComment, 7, len(comment), 44, 0)
    return b"Exif\0\0" + header + pointer + entry + comment
