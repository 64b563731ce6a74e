"""From what is known of a job to its row of the page's data: texts, a link, and perhaps a thumbnail."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from producer.gallery.fields import FIELDS, PageField, text_of, text_of_field
from producer.gallery.lines import Line
from producer.session import session
from worker.contract import infotext
from worker.contract.errors import InvalidJobError, UnknownJobError
from worker.contract.job import JOB_FIELDS, Job

#: Pixels of a thumbnail's longer side: sharp at the page's first tile size on a screen with 1.5 pixels per
#: CSS pixel.
THUMBNAIL_PX = 256
#: WebP quality of a thumbnail, 0 to 100.
THUMBNAIL_QUALITY = 80

#: A row as the page reads it. All values that people see are text: a browser's numbers end at 2^53.
Row = dict[str, Any]

#: Fields of a job that determine its picture, and so its infotext.
_PICTURE = [each.name for each in JOB_FIELDS.values() if each.is_hashed]
#: Fields that a submitted job may leave open and a resolved one has.
_RESOLVED = [each.name for each in JOB_FIELDS.values() if each.is_known_when_resolved]


class Pictures:
    """The pictures of a run, in their buckets. Thread-safe; counts what it did not find."""

    def __init__(self, expires_s: int, *, embed: bool) -> None:
        self._expires_s = expires_s
        self._embed = embed
        self._lock = threading.Lock()
        self._missing: Counter[str] = Counter()

    def url(self, uri: str) -> str:
        """A link to the picture. Raises `StorageError`."""
        return session().bucket_of(uri).url(uri, self._expires_s)

    def record(self, uri: str) -> Line:
        """The record beside the picture, flat; empty where it cannot be read. Raises `StorageError`."""
        try:
            record = json.loads(session().bucket_of(uri).get(uri.rpartition(".")[0] + ".json"))
        except (UnknownJobError, ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            self._miss("record")
            return {}
        return flat(record)

    def thumbnail(self, uri: str) -> bytes | None:
        """The picture as a small WebP; None where thumbnails are not embedded, or it cannot be read.

        Raises `StorageError`.
        """
        if not self._embed:
            return None
        try:
            return thumbnail(session().bucket_of(uri).get(uri))
        except (UnknownJobError, OSError, Image.DecompressionBombError):
            self._miss("picture")
            return None

    def notices(self) -> list[str]:
        """What could not be read, in sentences."""
        with self._lock:
            found = dict(self._missing)
        return [
            f"{count:,} {what if count == 1 else what + 's'} could not be read from the bucket."
            for what, count in found.items()
        ]

    def _miss(self, what: str) -> None:
        with self._lock:
            self._missing[what] += 1


def thumbnail(picture: bytes) -> bytes:
    """A picture's file as WebP of 256 pixels at most. Raises `OSError` for what is no picture."""
    with Image.open(io.BytesIO(picture)) as image:
        # JPEG only: decodes at the nearest size above, several times faster.
        image.draft("RGB", (THUMBNAIL_PX, THUMBNAIL_PX))
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=THUMBNAIL_QUALITY, method=2)
    return file.getvalue()


def row_of(pictures: Pictures, line: Line) -> tuple[Row, str | None]:
    """The row of one line, and its thumbnail as base64.

    What the line lacks of its picture's job is read from the record beside the picture. Raises
    `StorageError`.
    """
    line = flat(line)
    uri = line.get("uri")
    has_picture = isinstance(uri, str) and _is_picture(uri) and line.get("state", "done") == "done"
    job = _job_of(line)
    if has_picture and job is None and (record := pictures.record(str(uri))):
        line = record | line
        job = _resolved(line)
    row = _texts(line) | {"parameters": _parameters(job)}
    small = None
    if has_picture:
        data = pictures.thumbnail(str(uri))
        small = base64.b64encode(data).decode() if data else None
        row |= {"uri": uri, "url": pictures.url(str(uri))}
    row["state"] = text_of(line.get("state")) or ("done" if has_picture else "failed")
    return _filled(row), small


def row_of_record(record: Line) -> Row:
    """The row of a job's record, of any state, without a link to its picture."""
    line = flat(record)
    job = _resolved(line) if line.get("state") == "done" else None
    return _filled(_texts(line) | {"parameters": _parameters(job), "state": text_of(line.get("state"))})


def _filled(row: Row) -> Row:
    """The row without what is empty."""
    return {name: value for name, value in row.items() if value not in (None, "", {}, [])}


def _parameters(job: Job | None) -> str:
    """The text that is in the picture itself; empty where its job is not known whole."""
    return infotext.write(job) if job else ""


def _job_of(line: Line) -> Job | None:
    """The resolved job that a line describes whole; None where it does not.

    Where the line's id is another job's, the line lacks a field: the version that wrote it did not write all.
    """
    job = _resolved(line)
    return job if job and line.get("id", job.id) == job.id else None


def _resolved(line: Line) -> Job | None:
    if any(name not in line for name in _RESOLVED):
        return None
    try:
        return Job.parse({name: line[name] for name in _PICTURE if name in line}, is_new=False)
    except InvalidJobError:
        return None


def flat(line: Line) -> Line:
    """A line with the fields of its job beside its own, and without empty values."""
    inner = line.get("job")
    job = inner if isinstance(inner, dict) else {}
    # A record's `steps` is 0 until the job runs; the job's own is what counts.
    return {name: value for name, value in (line | job).items() if value not in (None, "") and name != "job"}


def _texts(line: Line) -> Row:
    warnings = line.get("warnings")
    return {
        "line": ":".join(text_of(line[name]) for name in ("file", "line") if name in line),
        "at": line["at"] if isinstance(line.get("at"), float) else None,
        "id": text_of(line.get("id")),
        **{field.name: _field_text(field, line) for field in FIELDS},
        "grid": _texts_of(line.get("grid")),
        "metadata": _texts_of(line.get("metadata")),
        "timings": _seconds(line.get("timings")),
        "worker": text_of(line.get("worker")),
        "nsfw": line.get("nsfw") is True or None,
        "error_type": text_of(line.get("error_type")),
        "error": text_of(line.get("error")),
        "warnings": [text_of(each) for each in warnings] if isinstance(warnings, list) else None,
    }


def _field_text(field: PageField, line: Line) -> str:
    """The field's value; empty where the line lacks a part of it, and at the field's default."""
    if any(name not in line for name in field.job_fields):
        return ""
    text = "x".join(text_of_field(name, line[name]) for name in field.job_fields)
    return "" if text == field.default else text


def _is_picture(uri: str) -> bool:
    parts = urlsplit(uri)
    return parts.scheme == "s3" and bool(parts.netloc) and bool(parts.path.strip("/"))


def _texts_of(value: object) -> dict[str, str]:
    return {str(name): text_of(each) for name, each in value.items()} if isinstance(value, dict) else {}


def _seconds(value: object) -> dict[str, str]:
    timings = value if isinstance(value, dict) else {}
    return {str(name): f"{each:.3g}" for name, each in timings.items() if isinstance(each, int | float)}
