"""What `ingest --check` prints: how the first lines are read, and what of them means nothing here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from producer.cli.json_output import say
from producer.ingest.check import check, given_of, rejected_of
from producer.session import session
from worker.contract.errors import ServiceError, SettingsError
from worker.contract.job import Job
from worker.contract.plain_text import counted, plain_json
from worker.contract.prompt_syntax import SYNTAX

if TYPE_CHECKING:
    from producer.ingest.plan import Plan, Planned, Rejected
    from worker.contract.choices import PromptSyntax
    from worker.state.fleet import FleetSnapshot

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

    fleet = _FleetsSyntax()
    findings = check(plan, found, lambda text: say(text, err=True), read, fleet.resolve)
    names = [f"{name} ({counted(count, 'job')})" for name, count in findings.metadata.items()]
    if names:
        more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
        say(f"to metadata: {', '.join(map(_short, names[:_NAMES]))}{more}", err=as_json)
    for sentence, (count, file, line) in findings.warnings.items():
        say(f"{sentence} ({counted(count, 'job')}, the first in {file}, line {line})", err=as_json)
    if fleet.is_unknown and any(sentence.startswith(fleet.names) for sentence in findings.warnings):
        say(
            "note  Redis does not answer, so the fleet's default syntax of prompts is not known: these were "
            "checked as plain. To be sure, give --prompt-syntax.",
            err=True,
        )
    if not (findings.jobs or findings.bad):
        say("note  the files have no prompts", err=True)
    jobs, bad = counted(findings.jobs, "job"), counted(findings.bad, "bad line")
    say(f"{jobs}, {bad}; nothing was sent", err=as_json)
    return 1 if findings.bad else 0


class _FleetsSyntax:
    """Gives jobs that do not say their syntax the fleet's default, where Redis answers; else none."""

    #: What the warnings of plain prompts begin with.
    names = tuple(SYNTAX)

    def __init__(self) -> None:
        self.is_unknown = False
        self._known: dict[tuple[str, str], PromptSyntax] = {}
        self._fleet: FleetSnapshot | None = None

    def resolve(self, job: Job) -> Job:
        """`job` in its syntax, and else as it is. Raises `InvalidJobError`."""
        if job.says_syntax or self.is_unknown:
            return job
        name = (job.model, job.revision)
        if name not in self._known:
            self._fleet = self._fleet or _snapshot()
            if self._fleet is None:
                self.is_unknown = True
                return job
            plain = Job(prompt="x", seed=0, model=job.model, revision=job.revision)
            self._known[name] = self._fleet.resolve(plain).prompt_syntax
        return job.in_syntax(self._known[name])


def _snapshot() -> FleetSnapshot | None:
    """What the fleet serves now; None where Redis does not answer at once."""
    try:
        now = session(0)
        with now.queue_errors():
            return now.fleet.snapshot()
    except (ServiceError, SettingsError):
        return None


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
