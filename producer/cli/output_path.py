"""`--output`: a folder for pictures, or the file of one picture where the name ends as a picture's does."""

from __future__ import annotations

import re
from pathlib import Path

from producer.client.job_result import JobResult
from worker.contract.errors import CallerError

#: Endings of a picture's file, and the format that each of them means.
_FORMATS = {".png": "png", ".webp": "webp", ".jpeg": "jpeg", ".jpg": "jpeg"}


def format_of(output: Path | None) -> str | None:
    """The format that `output` asks for by its name; None where it is a folder."""
    if output is None or output.is_dir():
        return None
    return _FORMATS.get(output.suffix.lower())


def check(output: Path | None, image_format: str | None, jobs: int = 1) -> None:
    """Raise `CallerError` where `output` is a file for several jobs, or one of another format.

    A name that ends as a file's does, and is no folder, is a file; "v1.5" and "2026.11.28" are folders.
    """
    if (named := format_of(output)) is None:
        if output is not None and re.search("[a-z]", output.suffix, re.IGNORECASE) and not output.is_dir():
            raise CallerError(
                f"--output {output} ends in {output.suffix}, in which no picture is saved: use one of "
                f"{', '.join(_FORMATS)}, or make the folder first."
            )
        return
    if jobs > 1:
        raise CallerError(f"--output {output} is one file for {jobs} pictures: name a folder.")
    if image_format is not None and named != image_format:
        raise CallerError(f"--output {output} is a name for {named}, the picture is {image_format}.")


def save(result: JobResult, output: Path) -> Path:
    """Save the picture. Returns its path. Raises `CallerError`, `StorageError`."""
    check(output, result.job.format)
    path = output if format_of(output) else output / f"{result.id}.{result.job.format}"
    data = result.data()
    draft = path.with_name(f".{result.id}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(data)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise CallerError(
            f"The picture of job {result.id} cannot be written to {path}: {error.strerror or error}. "
            f"It stays in the bucket: smallcat fetch {result.id} --output ANOTHER"
        ) from None
    return path
