"""A file to which other processes append lines: logs and journals of tests."""

from __future__ import annotations

from pathlib import Path


def complete_lines(path: Path) -> list[str]:
    """Its lines up to the last line end: who reads beside a writer may see the beginning of a line."""
    return path.read_text().rpartition("\n")[0].splitlines()
