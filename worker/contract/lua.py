"""Lua scripts for Redis, each in a file of its own beside the module that runs it.

A script is sent whole with every call (EVAL), or at least once a connection, so what Redis need not know is
left out: lines that are comments, and blank lines. A line `-- include NAME` is replaced by the file of that
name, which is relative to the including file; a file that is included twice is inserted once.

A call makes each function that it comes to, which takes longer than many a command. So what few calls need is
included in the block that needs it. It is known there only: another block includes it again.
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
    return "".join(_lines(path, [(0, set())]))


def _lines(path: Path, blocks: list[tuple[int, set[Path]]]) -> list[str]:
    """`blocks`: those that are open, each by its indentation, with the files that are included in it."""
    blocks[-1][1].add(path.resolve())
    own = len(blocks)
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        indentation = len(line) - len(line.lstrip())
        if named := _INCLUDE.fullmatch(line):
            other = path.parent / named[1]
            if indentation > (blocks[-1][0] if len(blocks) > own else 0):
                blocks.append((indentation, set()))
            if not any(other.resolve() in included for _, included in blocks):
                lines += _lines(other, blocks)
        elif text.startswith("--[["):
            raise ValueError(f"{path} has a multi-line comment: begin each of its lines with --.")
        elif text and not text.startswith("--"):
            while len(blocks) > own and indentation < blocks[-1][0]:
                blocks.pop()
            lines.append(f"{line}\n")
    del blocks[own:]
    return lines
