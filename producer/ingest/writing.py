"""Errors of the file system while a run writes its files, as one sentence that names the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from worker.contract.errors import PromptFileError


@contextlib.contextmanager
def writing(path: Path, what: str = "") -> Iterator[None]:
    """Turn an `OSError` into a `PromptFileError` that says what cannot be written and where."""
    try:
        yield
    except OSError as error:
        subject = f"{what} cannot be written to {path}" if what else f"{path} cannot be written"
        raise PromptFileError(
            f"{subject}: {error.strerror or error}. Mend that and run it again: it goes on where it was."
        ) from None
