"""The content of a file that jobs name, under one hash: its weights, and the config that some have beside.

Nobody trusts their authors: all is bounded before it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.contract.errors import InvalidJobError, RenderError


@dataclass(frozen=True)
class Content:
    """What was read of a file, at one time."""

    weights: bytes
    #: The text of the config beside it; None: there is none.
    config: str | None


def no_config(path: Path) -> str | None:
    """The config beside a file of a kind that has none."""
    return None


def sha256_of(path: Path, config_of: Callable[[Path], str | None] = no_config) -> str:
    """The SHA-256 of a file's content. `config_of`: the text of the config beside it.

    Raises `OSError`, and what `config_of` raises.
    """
    with path.open("rb") as file:
        return _sha256(hashlib.file_digest(file, "sha256").hexdigest(), config_of(path))


def read(
    path: Path,
    what: str,
    sha256: str,
    *,
    most: int,
    config_of: Callable[[Path], str | None] = no_config,
) -> Content:
    """The content that has this hash. Whoever uses it reads nothing more of the file.

    `what`: how an error calls the file. `most`: bytes. `config_of`: as in `sha256_of`.
    Raises `RenderError` where it is gone or another one, `InvalidJobError` where it cannot be used.
    """
    try:
        if problem := size_problem(path, most):
            raise ValueError(problem)
        content = Content(path.read_bytes(), config_of(path))
    except OSError as error:
        raise RenderError(f"{what} cannot be read: {error}.") from error
    except ValueError as error:
        raise InvalidJobError(f"{what} cannot be used: {error}.") from error
    if _sha256(hashlib.sha256(content.weights).hexdigest(), content.config) != sha256:
        raise RenderError(f"{what} was replaced while a job asked for it.")
    return content


def size_problem(path: Path, most: int) -> str:
    """Why a file of more than `most` bytes cannot be used; empty for one that is no larger."""
    size = path.stat().st_size
    return f"it has {size:,} bytes, the limit is {most:,}" if size > most else ""


def _sha256(weights: str, config: str | None) -> str:
    """That of the weights alone where there is no config."""
    return weights if config is None else hashlib.sha256(json.dumps([weights, config]).encode()).hexdigest()


def text_beside(path: Path, name: str, most: int) -> str | None:
    """The text of the file called `name` beside `path`; None where there is none, or `name` is empty.

    Raises `OSError`, and `ValueError` for one of more than `most` bytes, or in another encoding than UTF-8.
    """
    if not name or not (place := path.with_name(name)).is_file():
        return None
    if place.stat().st_size > most:
        raise ValueError(f"its {name} has more than {most:,} bytes")
    try:
        return place.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"its {name} is no UTF-8: download it again") from None


def json_object(text: str, what: str, remedy: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises `ValueError`, which says `what` is none, and the `remedy`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no JSON object: {remedy}")
    return value
