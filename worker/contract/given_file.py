"""A file that a caller names by its path, read: with one sentence for each reason why it cannot be."""

from __future__ import annotations

import os
from pathlib import Path

from worker.contract.errors import InvalidJobError
from worker.contract.explain import short, why_no_file


def at_home(path: Path) -> Path:
    """The path with the home folder in the place of `~`. One of a user that there is not stays as it is."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def read_file(name: str, given: Path, path: Path, most_bytes: int | None = None) -> tuple[bytes, int]:
    """The bytes of the regular file at `path`, and how many it has; of one above `most_bytes` no bytes.

    `name` is the field, and `given` the path as it was given. Raises `InvalidJobError`.
    """
    shown = f"{name} is {short(str(given))}"
    try:
        if not path.is_file():
            raise InvalidJobError(f"{shown}: {why_no_file(path)}.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if most_bytes is None:
                data = file.read()
            else:
                data = b"" if size > most_bytes else file.read(most_bytes + 1)
            return data, max(size, len(data))
    except (OSError, ValueError) as error:
        why = f"{error.strerror}: check who may read it" if isinstance(error, OSError) else error
        raise InvalidJobError(f"{shown}, which cannot be read: {why}.") from None
