"""The JSON configs that lie beside files of weights. Nobody trusts their authors: all is bounded first."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


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


def sha256_with(weights: str, config: str | None) -> str:
    """The SHA-256 of a file and the config beside it: that of the weights alone where there is none."""
    return weights if config is None else hashlib.sha256(json.dumps([weights, config]).encode()).hexdigest()


def json_object(text: str, what: str, remedy: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises `ValueError`, which says `what` is none, and the `remedy`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no JSON object: {remedy}")
    return value
