"""From what is known of a job to its frame on the sheet: texts, a link, and perhaps a thumbnail."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from producer.gallery.lines import Line
from producer.session import session
from worker.contract.errors import InvalidJobError, UnknownJobError
from worker.contract.job import Defaults, Job

#: Pixels of a thumbnail's longer side: sharp at the page's first tile size on a screen of 1.5x.
THUMBNAIL_PX = 256
#: WebP quality of a thumbnail, 0 to 100.
THUMBNAIL_QUALITY = 80

#: A frame as the page reads it. All values that people see are text: a browser's numbers end at 2^53.
Frame = dict[str, Any]

#: Fields of a job that determine its picture, and so its `parameters` text.
_PICTURE = [name for name in Job.model_fields if name not in ("priority", "metadata")]
#: What a resolved job has and a submitted one may leave open.
_RESOLVED = (*Defaults.model_fields, "prompt", "seed", "revision")
#: Fields of a job that are shown as they are.
_SHOWN = (
    "prompt",
    "negative_prompt",
    "seed",
    "steps",
    "guidance_scale",
    "scheduler",
    "model",
    "revision",
    "format",
)


class Pictures:
    """The pictures of a run, in their buckets. Thread-safe; counts what it could not find."""

    def __init__(self, expires_s: int, *, embed: bool) -> None:
        self._expires_s = expires_s
        self._embed = embed
        self._lock = threading.Lock()
        self._missing: Counter[str] = Counter()

    def url(self, uri: str) -> str:
        """A link to the picture. Raises `StorageError`."""
        return session().bucket_of(uri).url(uri, self._expires_s)

    def record(self, uri: str) -> Line:
        """The record beside the picture, flat; empty where there is none. Raises `StorageError`."""
        try:
            record = json.loads(session().bucket_of(uri).get(uri.rpartition(".")[0] + ".json"))
        except (UnknownJobError, ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            self._miss("record")
            return {}
        return flat(record)

    def thumbnail(self, uri: str) -> bytes | None:
        """The picture as a small WebP, where those are embedded; None where it cannot be read.

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
        """What was not found, in sentences."""
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


def frame_of(pictures: Pictures, line: Line) -> tuple[Frame, str | None]:
    """The frame of one line, and its thumbnail as base64.

    What the line leaves open of a picture is read from the record beside it. Raises `StorageError`.
    """
    line = flat(line)
    uri = line.get("uri")
    has_picture = isinstance(uri, str) and _is_picture(uri) and line.get("state", "done") == "done"
    if has_picture and any(line.get(name) in (None, "") for name in _RESOLVED):
        line = pictures.record(str(uri)) | line
    frame = _texts(line)
    small = None
    if has_picture:
        data = pictures.thumbnail(str(uri))
        small = base64.b64encode(data).decode() if data else None
        frame |= {"uri": uri, "url": pictures.url(str(uri))}
    frame["state"] = _text(line.get("state")) or ("done" if has_picture else "failed")
    return {name: value for name, value in frame.items() if value not in (None, "", {}, [])}, small


def flat(line: Line) -> Line:
    """A line with the fields of its job beside its own, and without what is not said."""
    inner = line.get("job")
    job = inner if isinstance(inner, dict) else {}
    # A record's `steps` is 0 until the job runs; the job's own is what counts.
    return {name: value for name, value in (line | job).items() if value not in (None, "") and name != "job"}


def _texts(line: Line) -> Frame:
    size = f"{line['width']}x{line['height']}" if "width" in line and "height" in line else ""
    warnings = line.get("warnings")
    return {
        "line": ":".join(_text(line[name]) for name in ("file", "line") if name in line),
        "at": line["at"] if isinstance(line.get("at"), float) else None,
        "id": _text(line.get("id")),
        **{name: _text(line.get(name)) for name in _SHOWN},
        "size": size,
        "grid": _texts_of(line.get("grid")),
        "metadata": _texts_of(line.get("metadata")),
        "timings": _seconds(line.get("timings")),
        "worker": _text(line.get("worker")),
        "nsfw": line.get("nsfw") is True or None,
        "error_type": _text(line.get("error_type")),
        "error": _text(line.get("error")),
        "warnings": [_text(each) for each in warnings] if isinstance(warnings, list) else None,
        "parameters": _parameters(line),
    }


def _parameters(line: Line) -> str:
    """The text that is in the picture itself; empty for a job that is not resolved."""
    from worker.contract.infotext import write

    if any(name not in line for name in _RESOLVED):
        return ""
    try:
        return write(Job.parse({name: line[name] for name in _PICTURE if name in line}))
    except InvalidJobError:
        return ""


def _is_picture(uri: str) -> bool:
    parts = urlsplit(uri)
    return parts.scheme == "s3" and bool(parts.netloc) and bool(parts.path.strip("/"))


def _text(value: object) -> str:
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


def _texts_of(value: object) -> dict[str, str]:
    return {str(name): _text(each) for name, each in value.items()} if isinstance(value, dict) else {}


def _seconds(value: object) -> dict[str, str]:
    timings = value if isinstance(value, dict) else {}
    return {str(name): f"{each:.3g}" for name, each in timings.items() if isinstance(each, int | float)}
