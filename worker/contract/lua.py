"""Lua scripts for Redis, each in a file of its own beside the module that runs it.

A script is sent whole with every call (EVAL), or at least once a connection, so what Redis need not know is
left out: lines that are comments, and blank lines. A line `-- include NAME` is replaced by the file of that
name, which is relative to the including file; a file that is included twice is inserted once.
"""

from __future__ import annotations

import re
from pathlib import Path

_INCLUDE = re.compile(r"\s*--\s*include\s+(\S+)\s*")


def script(path: Path) -> str:
    """The text of the script in the file `path`, as Redis takes it.

    Comments stand on lines of their own; multi-line comments are refused with a `ValueError`. Raises
    `FileNotFoundError` where the file, or one that it includes, is missing.
    """
    return "".join(_lines(path, set()))


def _lines(path: Path, included: set[Path]) -> list[str]:
    included.add(path.resolve())
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if named := _INCLUDE.fullmatch(line):
            other = path.parent / named[1]
            if other.resolve() not in included:
                lines += _lines(other, included)
        elif text.startswith("--[["):
            raise ValueError(f"{path} has a multi-line comment: begin each of its lines with --.")
        elif text and not text.startswith("--"):
            lines.append(f"{line}\n")
    return lines
