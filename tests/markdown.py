"""Reading documents in Markdown: what is code in them, and what is prose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^(?: {4}.*(?:\n|\Z))+", re.MULTILINE)


@dataclass(frozen=True)
class Code:
    """A piece of code in a document."""

    #: The language of a fenced block; "" for an indented block, "inline" for one between backticks.
    language: str
    text: str


def prose(text: str) -> str:
    """The document without its blocks of code."""
    return _INDENTED.sub("", _FENCED.sub("", text))


def codes(document: Path) -> Iterator[Code]:
    """The fenced and the indented blocks of a document, and what stands between backticks."""
    text = document.read_text("utf-8")
    for found in _FENCED.finditer(text):
        yield Code(found[1], found[2])
    for found in _INDENTED.finditer(_FENCED.sub("", text)):
        yield Code("", found[0])
    for found in re.finditer(r"`([^`\n]+)`", prose(text)):
        yield Code("inline", found[1])
