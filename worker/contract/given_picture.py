"""From what a caller gives for `image` and `mask` to references, and to the files that are to be stored.

    a path, bytes, an open file, a Pillow image, a numpy array    a file, by its content
    s3://bucket/key                                               likewise, as it is there now
    a handle or result of a job, job:<id>, a job's id             the picture of that job
    sha256:<64 digits>:<width>x<height>                           a file that is stored already

All is checked here by `worker.contract.input_image`, and nothing is stored: the caller does that once the
whole job is known to be right.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from worker.contract.errors import InvalidJobError
from worker.contract.explain import short
from worker.contract.given_file import at_home, read_file
from worker.contract.input_image import BadInputError, mask_of_alpha, read_input, read_mask, too_many_bytes
from worker.contract.input_reference import ALPHA, MAX_INPUT_BYTES, REFERENCE, InputReference

_JOB: Final = re.compile(r"(?:job:)?([0-9a-f]{32})")
_ADDRESS: Final = re.compile(r"([a-z][a-z0-9+.-]*)://|data:", re.IGNORECASE)
#: Modes of Pillow that a PNG holds as they are.
_PNG_MODES: Final = frozenset(("1", "L", "LA", "P", "RGB", "RGBA", "I;16"))


@dataclass(frozen=True)
class File:
    """A file that is to be stored before its job is sent."""

    sha256: str
    data: bytes
    mime: str


@dataclass(frozen=True)
class Given:
    """A job's fields with references, and what is to be stored and renewed before it is sent."""

    fields: dict[str, Any]
    files: tuple[File, ...] = ()
    #: References of files that must be there.
    named: tuple[InputReference, ...] = ()


@dataclass(frozen=True)
class Reach:
    """What a caller's words may lead to: somebody else's words must not read the reader's own files."""

    #: The bytes at an s3:// address for the field of that name, up to one above an input's limit; None: such
    #: addresses are refused. Raises `InvalidJobError`, `StorageError`.
    fetch: Callable[[str, str], bytes] | None = None
    #: The reference to the picture of a job by its id, for the field of that name. Raises `InvalidJobError`.
    job: Callable[[str, str], InputReference] | None = None
    #: The folder that paths are below; None: paths are refused; empty: they may lead anywhere.
    folder: Path | None = None
    #: What to do instead of what is refused here: the end of a sentence.
    instead: str = "give its path, or its bytes"


def read_given(fields: Mapping[str, Any], reach: Reach) -> Given:
    """The fields with references in the place of what was given. Raises `InvalidJobError`, `StorageError`."""
    image, mask = fields.get("image"), fields.get("mask")
    if _is_empty(image) and _is_empty(mask):
        return Given(dict(fields))
    found = dict(fields)
    files: list[File] = []
    named: list[InputReference] = []
    is_alpha = isinstance(mask, str) and mask.strip().lower() == ALPHA
    for name, value in (("image", image), ("mask", mask)):
        if _is_empty(value) or (name == "mask" and is_alpha):
            continue
        reference = _reference(name, value, reach)
        if reference is None:
            data = _bytes(name, value, reach)
            reference, mime = _checked(name, data, needs_alpha=name == "image" and is_alpha)
            files.append(File(reference.id, data, mime))
        elif reference.kind == "sha256":
            named.append(reference)
        found[name] = reference.encode()
    if is_alpha:
        found["mask"] = ALPHA
    return Given(found, tuple(files), tuple(named))


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _checked(name: str, data: bytes, *, needs_alpha: bool) -> tuple[InputReference, str]:
    try:
        image = read_input(data)
    except BadInputError as error:
        raise InvalidJobError(f"{name} {error}.") from None
    try:
        if needs_alpha:
            mask_of_alpha(image)
        if name == "mask":
            read_mask(data)
    except BadInputError as error:
        raise InvalidJobError(f"mask {error}.") from None
    return InputReference("sha256", hashlib.sha256(data).hexdigest(), *image.size), image.mime


def _reference(name: str, value: Any, reach: Reach) -> InputReference | None:
    """The reference that a value is, or that of a job; None: it is a file in some form."""
    job_id = getattr(value, "id", None)
    if isinstance(job_id, str) and hasattr(value, "state"):  # A handle, or a result.
        return _of_job(name, job_id, reach)
    if not isinstance(value, str):
        return None
    text = value.strip()
    if re.fullmatch(REFERENCE, text) and text.startswith("sha256:"):
        try:
            return InputReference.parse(text)
        except ValueError as error:
            raise InvalidJobError(f"{name} {error}.") from None
    job = _JOB.fullmatch(text.rpartition(":")[0] if re.fullmatch(REFERENCE, text) else text)
    if job and (text.startswith("job:") or not (reach.folder and (reach.folder / text).exists())):
        return _of_job(name, job[1], reach)
    return None


def _of_job(name: str, job_id: str, reach: Reach) -> InputReference:
    if reach.job is None:
        raise InvalidJobError(f"{name} is the picture of a job, which is not offered here: give a picture.")
    return reach.job(job_id, name)


def _bytes(name: str, value: Any, reach: Reach) -> bytes:
    """The bytes of a picture in any form but a reference."""
    if isinstance(value, bytes | bytearray | memoryview):
        return _limited(name, bytes(value))
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str) and text.startswith("s3://"):
            if reach.fetch is None:
                raise InvalidJobError(f"{name} is an s3:// address, which is not read here: {reach.instead}.")
            return _limited(name, reach.fetch(text, name))
        if isinstance(text, str):
            _check_words(name, text.strip(), reach)
        return _of_path(name, Path(os.fsdecode(text)), reach)
    if callable(read := getattr(value, "read", None)):
        data = read(MAX_INPUT_BYTES + 1)
        if not isinstance(data, bytes):
            raise InvalidJobError(f"{name} is a file of text: open it with mode 'rb'.")
        return _limited(name, data)
    return _limited(name, _png(name, value))


def _check_words(name: str, text: str, reach: Reach) -> None:
    """Refuse what is neither a reference nor meant as a path."""
    shown = f"{name} is {short(text)}"
    if address := _ADDRESS.match(text):
        if (address[1] or "").lower() in ("http", "https"):
            raise InvalidJobError(
                f"{shown}. Web addresses are not read: download the picture first, and give that."
            )
        raise InvalidJobError(f"{shown}. Such addresses are not read here: {reach.instead}.")
    if text.startswith("job:"):
        raise InvalidJobError(f"{shown}: after job: give the job's id, 32 digits of 0-9 and a-f.")
    if text.startswith("sha256:"):
        raise InvalidJobError(
            f"{shown}: after sha256: give 64 digits of 0-9 and a-f and the size, such as :640x480, as a "
            "record has them."
        )


def _of_path(name: str, path: Path, reach: Reach) -> bytes:
    is_near_alpha = name == "mask" and bool(difflib.get_close_matches(str(path).lower(), [ALPHA]))
    did_you_mean = f"mask is {short(str(path))}, which is no file: did you mean {ALPHA}?"
    if reach.folder is None:
        if is_near_alpha:
            raise InvalidJobError(did_you_mean)
        raise InvalidJobError(f"{name} is {short(str(path))}, and paths are not read here: {reach.instead}.")
    whole = at_home(path)
    if reach.folder != Path():
        whole = (reach.folder / path).resolve()
        if not whole.is_relative_to(reach.folder.resolve()):
            raise InvalidJobError(
                f"{name} is {short(str(path))}, which is outside the folder of the prompt file: put it there."
            )
    if not path.is_absolute() and _is_missing(whole):
        if is_near_alpha:
            raise InvalidJobError(did_you_mean)
        # Of a prompt file all pictures are in its folder.
        remedy = "give its whole path" if reach.folder == Path() else "put it there, or correct its name"
        raise InvalidJobError(
            f"{name} is {short(str(path))}: there is no such file. It was looked for in "
            f"{whole.absolute().parent}: {remedy}."
        )
    return _limited(name, *read_file(name, path, whole, MAX_INPUT_BYTES))


def _is_missing(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return True
    except OSError:
        return False
    return False


def _limited(name: str, data: bytes, size: int = 0) -> bytes:
    if (size := size or len(data)) > MAX_INPUT_BYTES:
        raise InvalidJobError(f"{name} {too_many_bytes(size)}.")
    return data


def _png(name: str, value: Any) -> bytes:
    """A Pillow image, or an array of (height, width) or (height, width, 3 or 4), as a PNG."""
    if not isinstance(value, Image.Image):
        value = _of_array(name, value)
    if not all(value.size):
        width, height = value.size
        raise InvalidJobError(f"{name} is {width}x{height}, which is no pixel: give at least 1x1.")
    if value.mode not in _PNG_MODES:
        raise InvalidJobError(f"{name} has the mode {value.mode}: convert it to RGB or RGBA.")
    file = io.BytesIO()
    value.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _of_array(name: str, value: Any) -> Image.Image:
    """The image of an array, without numpy: by what the array itself can do."""
    if not hasattr(value, "__array_interface__"):
        raise InvalidJobError(
            f"{name} is {short(value)}: give a path, bytes, a Pillow image, a numpy array, an s3:// address "
            "or the handle of a job."
        )
    kind = str(value.dtype)
    if kind == "bool":
        value, kind = value.astype("uint8") * 255, "uint8"
    if kind != "uint8" or value.ndim not in (2, 3) or (value.ndim == 3 and value.shape[2] not in (1, 3, 4)):
        raise InvalidJobError(
            f"{name} is an array of {kind} and the shape {tuple(value.shape)}: give uint8, 0 to 255, of "
            "(height, width) or (height, width, 3 or 4)."
        )
    try:
        return Image.fromarray(value[:, :, 0] if value.ndim == 3 and value.shape[2] == 1 else value)
    except (ValueError, TypeError, SystemError) as error:
        raise InvalidJobError(f"{name} is no array that is a picture: {error}.") from None
