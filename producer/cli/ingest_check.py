"""What `ingest --check` prints: how the first lines are read, and what of them means nothing here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from producer.cli.json_output import say
from producer.ingest.check import check, given_of, rejected_of
from worker.contract.plain_text import plain_json

if TYPE_CHECKING:
    from producer.ingest.plan import Plan, Planned, Rejected

#: Jobs of each file that are shown, and characters of a value and names of a list, at most.
_SHOWN, _LONGEST, _NAMES = 3, 100, 20


def print_check(plan: Plan, *, as_json: bool) -> int:
    """Check a plan, print what was found, and return the exit code: 1 if there are bad lines.

    As JSON every job and every bad line is a line of standard output.
    """
    shown = [0] * len(plan.sources)

    def read(job: Planned, warnings: list[str]) -> None:
        if as_json:
            more = {"warnings": warnings} if warnings else {}
            say(plain_json(given_of(plan, job) | more, indent=None))
        elif shown[job.file] < _SHOWN:
            shown[job.file] += 1
            for line in _shown(plan, job):
                say(line)

    def found(rejected: Rejected) -> None:
        values = rejected_of(plan, rejected)
        if as_json:
            say(plain_json(values, indent=None))
        else:
            say(f"{values['file']}, line {values['line']}: {values['reason']}", err=True)

    findings = check(plan, found, lambda text: say(text, err=True), read)
    names = [f"{name} ({count:,} jobs)" for name, count in findings.metadata.items()]
    if names:
        more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
        say(f"to metadata: {', '.join(map(_short, names[:_NAMES]))}{more}", err=as_json)
    for sentence, (count, file, line) in findings.warnings.items():
        say(f"{sentence} ({count:,} jobs, the first in {file}, line {line})", err=as_json)
    say(f"{findings.jobs:,} jobs, {findings.bad:,} bad lines; nothing was sent", err=as_json)
    return 1 if findings.bad else 0


def _shown(plan: Plan, job: Planned) -> tuple[str, str]:
    """A job as people read it: its place, its prompt, and a line for its other fields."""
    values = given_of(plan, job)
    place = f"{values.pop('file')}, line {values.pop('line')}: {_short(values.pop('prompt'))}"
    metadata = values.pop("metadata", None)
    parts = [f"{name} {_short(value)}" for name, value in values.items()]
    if metadata:
        parts.append(f"metadata {_short(json.dumps(metadata, ensure_ascii=False))}")
    return place, f"    {', '.join(parts)}"


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
