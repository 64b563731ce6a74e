"""What is known of each job on the page: the lines of a manifest, or the records in a bucket."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from producer.session import session
from worker.contract.choices import ImageFormat
from worker.contract.csv_cells import plain
from worker.contract.errors import CallerError
from worker.contract.job import JOB_FIELDS
from worker.contract.job_fields import NESTED, truth_of
from worker.contract.record import Timings

#: One job: the manifest's fields, or a record's, with the job's own fields beside them. Any may be missing.
Line = dict[str, Any]

#: Columns of a CSV manifest that hold JSON.
_JSON = {"grid", *(each.name for each in JOB_FIELDS.values() if each.kind in NESTED)}
#: Columns of a CSV manifest that hold numbers.
_INTEGERS = {each.name for each in JOB_FIELDS.values() if each.kind is int}
#: Columns of a CSV manifest that say yes or no.
_TRUTHS = {each.name for each in JOB_FIELDS.values() if each.kind is bool}
#: Of these every line of a manifest or of a run's journal has one.
_SURE = frozenset(("id", "uri", "state", "number", "run"))
#: Characters of a cell, at most.
_MAX_CELL = 1 << 24
#: Characters of a line of a manifest, and digits of a number in it, at most.
_MAX_LINE, _MAX_DIGITS = 1 << 20, 40
_FLOATS = {*(each.name for each in JOB_FIELDS.values() if each.kind is float), *Timings.model_fields}


def is_address(source: str) -> bool:
    """Whether `source` is an s3:// address rather than a manifest's path."""
    return source.startswith("s3://")


def read_lines(source: str, warn: Callable[[str], None]) -> Iterator[Line]:
    """The jobs of a manifest (JSONL; CSV by its ending; gzip too) or below an s3:// address, in order.

    A line that cannot be read is left out, and `warn` is called once with the number of such lines: the last
    line of a run that was killed may be incomplete. Raises `CallerError`, and `StorageError` for an address.
    """
    if is_address(source):
        return _bucket_lines(source)
    path = Path(source)
    if not path.is_file():
        raise CallerError(f"There is no manifest {source}: name the file that `smallcat ingest` wrote.")
    return _manifest_lines(path, warn)


def _manifest_lines(path: Path, warn: Callable[[str], None]) -> Iterator[Line]:
    # A run that is not over has a `.part` file in place of its manifest.
    name = path.name.removesuffix(".part").removesuffix(".gz")
    bad: list[int] = []
    try:
        with _open(path) as file:
            count = 0
            for line in _csv_lines(file) if name.endswith(".csv") else _json_lines(file, bad):
                if line and not line.keys() & _SURE:
                    raise _no_manifest(path)
                count += 1
                yield line
        if bad and not count:
            raise _no_manifest(path)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise CallerError(f"The manifest {path} cannot be read ({error}).") from error
    if bad:
        first = f"line {bad[0]}" if len(bad) == 1 else f"{len(bad):,} lines, the first is line {bad[0]}"
        warn(f"Not readable in the manifest and left out: {first}.")


def _no_manifest(path: Path) -> CallerError:
    """The error for a file of something else: most often it is the prompt file."""
    written = path.with_name(f"{path.name}.manifest.jsonl")
    remedy = (
        f"name {written}" if written.exists() else f"run `smallcat ingest {path}`, and name what it writes"
    )
    return CallerError(
        f"{path} is no manifest, for its lines have no job's id. If it is a prompt file, {remedy}."
    )


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _json_lines(file: TextIO, bad: list[int]) -> Iterator[Line]:
    count = 0
    while text := file.readline(_MAX_LINE):
        count += 1
        if len(text) >= _MAX_LINE and not text.endswith("\n"):
            bad.append(count)
            while (more := file.readline(_MAX_LINE)) and not more.endswith("\n"):
                pass
            continue
        if not text.strip():
            continue
        try:
            line = _DECODE(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict):
            yield line
        else:
            bad.append(count)


def _csv_lines(file: TextIO) -> Iterator[Line]:
    csv.field_size_limit(_MAX_CELL)
    # A line without end comes in pieces, of which the reader takes none as a cell.
    for row in csv.DictReader(iter(lambda: file.readline(2 * _MAX_CELL), "")):
        # Cells beyond the last heading are under None.
        line = {name: _value(name, plain(text)) for name, text in row.items() if name and text}
        yield line | {"timings": {name: line.pop(name) for name in Timings.model_fields if name in line}}


def _integer(text: str) -> int | str:
    """A number as it is; one of so many digits that nothing can count with it is a text."""
    return int(text) if len(text) <= _MAX_DIGITS else text


def _finite(text: str) -> float | str:
    return number if math.isfinite(number := float(text)) else text


#: NaN and infinite numbers, which no browser reads, are no values.
_DECODE = json.JSONDecoder(parse_constant=lambda _: None, parse_int=_integer, parse_float=_finite).decode


def _value(name: str, text: str) -> Any:
    """A cell as its column's type; the text where it is not of that type."""
    try:
        if name in _JSON:
            return json.loads(text)
        if name in _INTEGERS:
            return _integer(text)
        if name in _FLOATS:
            return _finite(text)
    except (ValueError, RecursionError):
        return text
    return text if name not in _TRUTHS or (truth := truth_of(text)) is None else truth


def _bucket_lines(address: str) -> Iterator[Line]:
    """A line for each job with a picture and a record, from the names of its objects alone."""
    name = address.removeprefix("s3://").partition("/")[0]
    if not name:
        raise CallerError(f"{address} names no bucket: s3://BUCKET/PREFIX.")
    # A listing is in the order of the names, so the objects of a job are next to each other.
    listing = session().bucket_named(name).below(address)
    for stem, objects in groupby(listing, lambda each: each[0].rpartition(".")[0]):
        found = {uri.rpartition(".")[2]: (uri, stored_at) for uri, stored_at in objects}
        if "json" not in found or "/images/" not in stem:
            continue
        for ending in found.keys() & set(ImageFormat):
            uri, stored_at = found[ending]
            yield {"id": stem.rpartition("/")[2], "state": "done", "uri": uri, "at": stored_at}
