"""Where the manifest of a run goes: never over the finished manifest of another run.

A name that the user gave stands for one run: it is refused at the start where it holds anything else. A
name that we chose, `FILE.manifest.jsonl`, gets a number where it is taken, `FILE.manifest-2.jsonl`, and a
notice: so a file can be run again with other options, also at the same time, and no result is replaced. A
name that is taken while the run goes on gets a number, too, because the work is done by then.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from worker.contract.errors import PromptFileError


def fingerprint(manifest: Path) -> str:
    """Tells a manifest from another one at its path; empty where there is none. Redis has it of each run."""
    try:
        stat = manifest.stat()
    except OSError:
        return ""
    return f"{manifest.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def choose(wanted: Path, own: str, *, is_named: bool) -> Path:
    """The path for a run's manifest. `own` is the fingerprint of its earlier one; `is_named`: by the user.

    Raises `PromptFileError` where the user named a file that is not this run's.
    """
    if (earlier := _earlier(wanted, own)) is not None:
        return earlier
    if is_named and wanted.exists():
        raise PromptFileError(
            f"{wanted} is there already, and no manifest of this run: name another file with --manifest, "
            "or remove it."
        )
    return next(path for path in names_from(wanted) if not path.exists())


def place(draft: Path, wanted: Path, own: str) -> Path:
    """Move a finished draft to `wanted` or, where another run has taken that name, to one with a number."""
    if (earlier := _earlier(wanted, own)) is not None:
        draft.replace(earlier)
        return earlier
    for path in names_from(wanted):
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        draft.replace(path)
        return path
    raise AssertionError  # The names do not end.


def _earlier(wanted: Path, own: str) -> Path | None:
    """This run's own earlier manifest, where it has the name `wanted` or that with a number."""
    path = Path(own.rsplit(" ", 2)[0])
    if not own or fingerprint(path) != own or path.parent != wanted.parent.resolve():
        return None
    name = rf"{re.escape(wanted.stem)}(-[0-9]+)?{re.escape(wanted.suffix)}"
    return wanted.with_name(path.name) if re.fullmatch(name, path.name) else None


def names_from(wanted: Path) -> Iterator[Path]:
    """The names for a file that is wanted as `wanted`: that one, then those with a number, from 2 on."""
    yield wanted
    for number in itertools.count(2):
        yield wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
