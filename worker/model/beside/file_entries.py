"""What is to be known of a file before jobs name it: its content, what it fits, and what is wrong with it.

Reading a file for its hash takes long, so what is known is remembered in the cache, by the file's stamp.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path

from worker.contract.errors import ServiceError, SmallcatError
from worker.contract.file_index import MAX_FILES, FileEntry, Kind, composed_name, name_problem
from worker.contract.plain_text import plain
from worker.model.beside import lora_files
from worker.model.beside.file_kinds import KINDS
from worker.model.beside.file_places import Found
from worker.model.index import PICKLE_REASON

logger = logging.getLogger("smallcat.files")

#: What reading a file that somebody else wrote can raise: its own problem, and none of the others'.
_UNREADABLE = (OSError, SmallcatError, ValueError, TypeError, ArithmeticError, RecursionError)

#: Where what is known of files is kept, in the cache; and the version of how they are described.
REMEMBERED, DESCRIBED = "known.json", 1


def entry_by_name(found: Found) -> FileEntry:
    """What a file's name says; it has a problem where that is enough to refuse the file."""
    name = found.name.removeprefix("<").removesuffix(">")
    if found.kind is Kind.LORA:
        name = composed_name(name)
    problem = PICKLE_REASON if found.is_pickled else name_problem(name, found.kind)
    return FileEntry(kind=found.kind, name=name[:200] if problem else name, problem=problem)


def entry_by_content(found: Found, path: Path) -> FileEntry:
    """What is to be known of a file, which is at `path` on this machine. Raises `ServiceError`."""
    named, kind = entry_by_name(found), KINDS[found.kind]
    try:
        size, sha256 = path.stat().st_size, kind.sha256_of(path)
        fits, problem = kind.describe(path)
    except _UNREADABLE as error:
        return with_error(named, error)
    known = {
        "sha256": sha256,
        "architecture": fits,
        "size": size,
        # All workers say the same of one file, wherever each has it.
        "problem": plain(problem.replace(str(path), found.where)),
    }
    if found.kind is Kind.LORA and not problem:
        known["auto_v3"] = lora_files.auto_v3(path)
    return named.model_copy(update=known)


def with_error(entry: FileEntry, error: Exception) -> FileEntry:
    """What is known of a file that cannot be read. Raises `error` where that is a service's fault."""
    if isinstance(error, ServiceError):
        raise error
    return entry.model_copy(update={"problem": plain(error).rstrip(".")})


def remembered(folder: Path) -> dict[str, FileEntry]:
    """What an earlier process knew of files; nothing where that cannot be read, or is another version's."""
    try:
        kept = json.loads((folder / REMEMBERED).read_text("utf-8"))
        if kept["version"] != DESCRIBED:
            return {}
        return {stamp: FileEntry.model_validate(entry) for stamp, entry in kept["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def remember(folder: Path, known: Mapping[str, FileEntry]) -> None:
    """Keep what is known for the next start, beside what other workers of this machine know.

    A cache that cannot be written costs that start some time.
    """
    others = remembered(folder)
    both = known if len(others) > 4 * MAX_FILES else {**others, **known}
    values = {stamp: entry.model_dump(mode="json") for stamp, entry in both.items()}
    part = folder / f".{secrets.token_hex(8)}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"version": DESCRIBED, "files": values}), "utf-8")
        part.replace(folder / REMEMBERED)
    except OSError as error:
        logger.warning("What is known of files cannot be kept in %s: %s", folder, error)
