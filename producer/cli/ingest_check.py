"""What `ingest --check` prints: how the first lines are read, and what of them means nothing here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from producer.cli.json_output import say
from producer.ingest.check import check, given_of, rejected_of
from producer.ingest.message_templates import Resolver, resolver_of
from producer.session import session
from worker.contract.embedding_names import EmbeddingNames
from worker.contract.errors import ServiceError, SettingsError
from worker.contract.job import JOB_FIELDS, Job
from worker.contract.plain_text import counted, plain_json
from worker.contract.prompt_syntax import SYNTAX

if TYPE_CHECKING:
    from producer.ingest.plan import Plan, Planned, Rejected
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

    fleet = _Fleet()
    findings = check(
        plan, found, lambda text: say(text, err=True), read, Resolver(fleet.checked, fleet.names_for)
    )
    names = [f"{name} ({counted(count, 'job')})" for name, count in findings.metadata.items()]
    if names:
        more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
        say(f"to metadata: {', '.join(map(_short, names[:_NAMES]))}{more}", err=as_json)
    for sentence, (count, file, line) in findings.warnings.items():
        say(f"{sentence} ({counted(count, 'job')}, the first in {file}, line {line})", err=as_json)
    if fleet.is_syntax_unknown and any(sentence.startswith(fleet.syntaxes) for sentence in findings.warnings):
        say(
            "note  Redis does not answer, so the fleet's default syntax of prompts is not known: these were "
            "checked as plain. To be sure, give --prompt-syntax.",
            err=True,
        )
    if not (findings.jobs or findings.bad):
        say("note  the files have no prompts", err=True)
    jobs, bad = counted(findings.jobs, "job"), counted(findings.bad, "bad line")
    # In the last line, so that nobody takes it for all that a run checks.
    but = " (Redis does not answer: models and names of LoRAs and VAEs were not checked)"
    say(f"{jobs}, {bad}; nothing was sent{but if fleet.is_unknown else ''}", err=as_json)
    return 1 if findings.bad else 0


class _Fleet:
    """Checks jobs by what the fleet serves at one moment, as a run that begins then; else as they are."""

    #: What the warnings of plain prompts begin with.
    syntaxes = tuple(SYNTAX)

    def __init__(self) -> None:
        #: Whether Redis did not answer when it was asked.
        self.is_unknown = False
        #: Whether it would have been asked for a job's syntax.
        self.is_syntax_unknown = False
        self._known: Resolver | None = None

    def checked(self, job: Job) -> Job:
        """`job` in its syntax, and else as it is. Raises `InvalidJobError` where a run would reject it."""
        if (known := self._resolver()) is None:
            self.is_syntax_unknown = self.is_syntax_unknown or not job.says_syntax
            return job
        return job.in_syntax(known.job(job).prompt_syntax)

    def names_for(self, job: Job) -> EmbeddingNames:
        """As `Resolver.names`."""
        known = self._resolver()
        return EmbeddingNames(()) if known is None else known.names(job)

    def _resolver(self) -> Resolver | None:
        if self._known is None and not self.is_unknown:
            snapshot = _snapshot()
            self.is_unknown = snapshot is None
            self._known = resolver_of(snapshot) if snapshot else None
        return self._known


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
    parts = [f"{name} {_short(_written(name, value))}" for name, value in values.items()]
    if metadata:
        parts.append(f"metadata {_short(json.dumps(metadata, ensure_ascii=False))}")
    return place, f"    {', '.join(parts)}"


def _written(name: str, value: Any) -> object:
    """A field's value as people write it."""
    as_text = JOB_FIELDS[name].as_text
    if as_text is not None:
        return as_text(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, bool | dict | list) else value


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
