"""The journal of a run: a file beside the manifest, to which each job is appended when it ends.

Its name is `MANIFEST.RUN.part`, so that two runs of one file have a journal each. An earlier version had one
journal a manifest, `MANIFEST.part`, whose first line names its run: that run takes it over.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

from producer.ingest.ended import Ended
from producer.ingest.manifest import json_line
from producer.ingest.writing import writing
from worker.contract.errors import PromptFileError


class Journal:
    """What became of the jobs that have ended. It survives a kill at any instant; the next call goes on."""

    def __init__(self, manifest: Path, run_id: str) -> None:
        """The journal of the run `run_id` beside `manifest`. Raises `PromptFileError`."""
        self.path = journal_path(manifest, run_id)
        self._head = json_line({"run": run_id})
        self._offsets = array("q")
        self._paths = array("q")
        #: Number of jobs whose picture was in the bucket already.
        self.cached = 0
        #: Number of jobs that were cancelled.
        self.cancelled = 0
        try:
            self._take_over(manifest.with_name(f"{manifest.name}.part"))
            self._file: BinaryIO = self.path.open("a+b")
            # A second file object for reading: jobs end nearly in their order, so what it read ahead is used.
            self._reader: BinaryIO = self.path.open("rb")
            self._flushed = 0
            self._load()
        except OSError as error:
            raise PromptFileError(f"{self.path} cannot be written: {error.strerror or error}.") from None

    def write(self, ended: Iterable[Ended]) -> None:
        """Append jobs that have ended. Returns when the operating system has them."""
        with writing(self.path):
            for each in ended:
                values = each._asdict()
                self._note(each.number, values, self._file.tell())
                self._file.write(json_line(values))
            self._file.flush()

    def write_path(self, number: int, path: Path) -> None:
        """Append where a job's picture was saved."""
        with writing(self.path):
            self._note_path(number, self._file.tell())
            self._file.write(json_line({"number": number, "path": str(path)}))
            self._file.flush()

    def result(self, number: int) -> dict[str, Any] | None:
        """What became of job `number`; None where it is not in the journal."""
        if (offset := _get(self._offsets, number)) < 0:
            return None
        result = self._at(offset)
        if (offset := _get(self._paths, number)) >= 0:
            result["path"] = self._at(offset)["path"]
        return result

    def done(self) -> Iterator[dict[str, Any]]:
        """The jobs that are done; those whose picture was saved with its `path`."""
        for number in range(len(self._offsets)):
            if (result := self.result(number)) is not None and result["state"] == "done":
                yield result

    def adopt(self, manifest: Path, files: Sequence[str] = ()) -> None:
        """Append the results of a finished JSONL manifest, which can so be written again with later ones.

        `files` are the names of the run's files.
        """
        numbers = {name: number for number, name in reversed(list(enumerate(files)))}
        with manifest.open("rb") as lines:
            for number, line in enumerate(lines):
                values = json.loads(line)
                timings = values.get("timings") or {}
                kept = {name: values.get(name) for name in Ended._fields if name in values}
                file = numbers.get(values.get("file"), 0)
                if self.result(number) is None:
                    self._note(number, values, self._file.tell())
                    self._file.write(json_line({**kept, "number": number, "file": file, "timings": timings}))
                if values.get("path"):
                    self.write_path(number, Path(values["path"]))
        self._file.flush()

    def close(self) -> None:
        """Close the file, which stays."""
        self._file.close()
        self._reader.close()

    def remove(self) -> None:
        """Close and delete it: the manifest is written."""
        self.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_over(self, earlier: Path) -> None:
        """Give an earlier version's journal its name of today, where it is this run's."""
        if self.path.exists() or not earlier.exists():
            return
        with earlier.open("rb") as file:
            is_ours = file.readline() == self._head
        if is_ours:
            earlier.rename(self.path)

    def _load(self) -> None:
        self._file.seek(0)
        if self._file.readline() != self._head:
            # A new one, or no journal at all.
            self._file.truncate(0)
            self._file.write(self._head)
            self._file.flush()
            return
        whole = self._file.tell()
        for line in iter(self._file.readline, b""):
            if not line.endswith(b"\n"):
                break  # A process was killed while it wrote this line: Redis still has it.
            values = json.loads(line)
            if "path" in values:
                self._note_path(values["number"], whole)
            else:
                self._note(values["number"], values, whole)
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, 2)

    def _note(self, number: int, values: Mapping[str, Any], offset: int) -> None:
        if (known := _get(self._offsets, number)) >= 0:
            before = self._at(known)["state"]
            if before == "done" or values["state"] != "done":
                return  # Written by a feeder that was killed before it could delete it from Redis.
            self.cancelled -= before == "cancelled"
        self.cached += bool(values["cached"])
        self.cancelled += values["state"] == "cancelled"
        _set(self._offsets, number, offset)

    def _note_path(self, number: int, offset: int) -> None:
        _set(self._paths, number, offset)

    def _at(self, offset: int) -> dict[str, Any]:
        if offset >= self._flushed:
            self._file.flush()
            self._flushed = self._file.tell()
        self._reader.seek(offset)
        values: dict[str, Any] = json.loads(self._reader.readline())
        return values


def journal_path(manifest: Path, run_id: str) -> Path:
    """Where the journal of a run lies."""
    return manifest.with_name(f"{manifest.name}.{run_id}.part")


def _get(offsets: array[int], number: int) -> int:
    return offsets[number] if number < len(offsets) else -1


def _set(offsets: array[int], number: int, offset: int) -> None:
    offsets.extend([-1] * (number + 1 - len(offsets)))
    offsets[number] = offset
