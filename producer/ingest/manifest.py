"""What a run leaves behind: the manifest, a line a job.

    prompts.txt.manifest.jsonl           a line a job in input order, when the run is over; CSV by its ending
    prompts.txt.manifest.jsonl.RUN.part  the journal: a line a job that has ended, in the order of their ends
    prompts.txt.rejected.jsonl           lines that are no jobs (`producer.ingest.rejects`)

Redis forgets what became of a job only when the journal has it. The manifest is made by reading the files
again and joining each job with its line of the journal, so that a job takes no more memory than a number.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from producer.ingest.plan import Planned, Rejected
from producer.prompts.sources import Source
from worker.contract.csv_cells import neutral
from worker.contract.job import JOB_FIELDS
from worker.contract.job_fields import NESTED
from worker.contract.record import Timings

_TIMINGS = tuple(Timings.model_fields)
#: Fields of a job that are JSON in a cell of CSV.
_OBJECTS = tuple(each.name for each in JOB_FIELDS.values() if each.kind in NESTED)
_FIRST_FIELDS = tuple(each.name for each in JOB_FIELDS.values() if each.is_original)


def _since(name: str) -> int:
    since = JOB_FIELDS[name].since
    # Those of the first three versions are in the order of the table.
    return max(since, 3) if isinstance(since, int) else 3


#: Columns of a manifest in CSV. They are only ever appended to: the first version's come first, in its order,
#: then the job fields that were added later, by the version that added them.
COLUMNS = (
    *("file", "line", "id", "state", "uri", "path", "seed"),
    *(name for name in _FIRST_FIELDS if name not in ("seed", *_OBJECTS)),
    *("grid", "cached", "error_type", "error", *_TIMINGS),
    *(name for name in _FIRST_FIELDS if name in _OBJECTS),
    *sorted((name for name in JOB_FIELDS if name not in _FIRST_FIELDS), key=_since),
)
_COLUMNS = frozenset(COLUMNS)
#: Fields that a shape has or leaves out, with their default.
_SHAPE = {
    each.name: each.default for each in JOB_FIELDS.values() if each.name not in ("prompt", "seed", "metadata")
}


def write_manifest(
    manifest: Path,
    jobs: Iterable[Planned | Rejected],
    sources: Sequence[Source],
    result: Callable[[int, str], Mapping[str, Any]],
) -> int:
    """Write the manifest of `jobs` in their order; as CSV where its name ends so.

    `result` gives what became of a job by its number and id. Returns the number of jobs.
    """
    number = 0
    with manifest.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS) if manifest.suffix.lower() == ".csv" else None
        if table:
            table.writeheader()
        for each in jobs:
            if isinstance(each, Rejected):
                continue
            values = _manifest_line(each, sources, result(number, each.templated.id))
            if table:
                table.writerow(_flat(values))
            else:
                file.write(json_line(values).decode())
            number += 1
    return number


def _manifest_line(job: Planned, sources: Sequence[Source], result: Mapping[str, Any]) -> dict[str, Any]:
    templated = job.templated
    return {
        "file": sources[job.file].name,
        "line": job.line,
        "id": templated.id,
        "state": result["state"],
        "uri": result.get("uri"),
        "path": result.get("path"),
        "seed": templated.seed,
        "prompt": templated.prompt,
        **_whole(templated.shape),
        "grid": dict(job.grid),
        "cached": bool(result.get("cached")),
        "error_type": result.get("error_type"),
        "error": result.get("error"),
        "timings": result.get("timings") or {},
        "metadata": templated.metadata,
    }


def _whole(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that determine the picture, also those that messages leave out at their default."""
    return {name: shape.get(name, default) for name, default in _SHAPE.items()}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    timings = {name: values["timings"].get(name) for name in _TIMINGS}
    nested = {name: json.dumps(values[name], ensure_ascii=False) for name in ("grid", *_OBJECTS)}
    cells = {**values, **timings, **nested}
    return {name: neutral(value) for name, value in cells.items() if name in _COLUMNS}


def json_line(values: Mapping[str, Any]) -> bytes:
    """A line of JSON, as manifests and journals have it."""
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"
