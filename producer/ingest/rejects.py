"""The files of rejected lines: one beside each prompt file that has such lines, and for each run its own.

The first run of a file writes `FILE.rejected.jsonl`. Where that is another run's, it stays, and this run
writes `FILE.rejected-2.jsonl`. Redis has with each run which files are its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from producer.ingest.manifest import json_line
from producer.ingest.manifest_path import names_from
from producer.ingest.plan import Rejected
from producer.ingest.writing import writing
from producer.prompts.sources import Source


@dataclass
class OwnFiles:
    """Which files a run has written: Redis' part of `Rejects`."""

    #: By the path as it was wanted, in its folder, the path that it has; both resolved.
    paths: dict[str, str] = field(default_factory=dict)
    #: Whether an earlier version, which did not note its files, has rejected lines of this run.
    was_not_noted: bool = False

    @classmethod
    def read(cls, noted: str | None, rejected: int) -> OwnFiles:
        """From what `written` returned, and the number of lines that were rejected so far."""
        return cls(json.loads(noted) if noted else {}, was_not_noted=noted is None and rejected > 0)

    def written(self) -> str:
        """A text for Redis."""
        return json.dumps(self.paths)


class Rejects:
    """The files of rejected lines of one run."""

    def __init__(
        self,
        sources: Sequence[Source],
        start: tuple[int, ...],
        own: OwnFiles | None = None,
        note: Callable[[str], None] = lambda _: None,
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Keep what was rejected before the place `start` of the plan (a `Cursor`), and delete the rest.

        `note` stores which files are the run's `own`; it is called before a file is made. `notice` gets a
        sentence where another run's file is in the way.
        """
        self._sources, self._own = sources, own or OwnFiles()
        self._note, self._notice = note, notice
        self._files: dict[Path, TextIO] = {}
        for wanted in dict.fromkeys(each.beside("rejected.jsonl") for each in sources):
            if self._own.was_not_noted and wanted.exists():
                self._own.paths[str(wanted.resolve())] = str(wanted.resolve())
            if (path := self._path(wanted)) is not None and path.exists():
                _keep(path, start)

    def write(self, rejected: Rejected) -> None:
        """Append one. Returns when the operating system has it. Raises `PromptFileError`."""
        wanted = self._sources[rejected.file].beside("rejected.jsonl")
        values = {"file": self._sources[rejected.file].name, "line": rejected.line}
        values |= {"field": rejected.field, "reason": rejected.reason, "after": str(rejected.cursor)}
        with writing(self._path(wanted) or wanted):
            if wanted not in self._files:
                self._files[wanted] = self._open(wanted)
            self._files[wanted].write(json_line(values).decode())
            self._files[wanted].flush()

    def paths(self) -> list[Path]:
        """The files that exist."""
        wanted = dict.fromkeys(each.beside("rejected.jsonl") for each in self._sources)
        found = (self._path(each) for each in wanted)
        return [path for path in found if path is not None and path.exists()]

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _path(self, wanted: Path) -> Path | None:
        """The run's own file of that name; None where it has none."""
        path = self._own.paths.get(str(wanted.resolve()))
        return None if path is None else wanted.with_name(Path(path).name)

    def _open(self, wanted: Path) -> TextIO:
        if (own := self._path(wanted)) is not None and own.exists():
            return own.open("a", encoding="utf-8")
        for path in names_from(wanted):
            if path.exists():
                continue
            self._own.paths[str(wanted.resolve())] = str(path.resolve())
            self._note(self._own.written())
            try:
                file = path.open("x", encoding="utf-8")
            except FileExistsError:
                continue
            if path != wanted:
                self._notice(
                    f"{wanted} is there already, and not as this run wrote it: it stays, and this run "
                    f"writes {path}."
                )
            return file
        raise AssertionError  # The names do not end.


def _keep(path: Path, start: tuple[int, ...]) -> None:
    draft = path.with_name(f"{path.name}.draft")
    kept = 0
    with writing(draft), path.open("rb") as lines, draft.open("wb") as file:
        for line in lines:
            try:
                after = tuple(map(int, json.loads(line)["after"].split(":")))
            except (ValueError, KeyError):
                continue
            if after <= start:
                kept += file.write(line)
    draft.replace(path)
    if not kept:
        path.unlink()
