"""Looking at a run's lines without sending any: how they are read, and what of them means nothing here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from producer.ingest.message_templates import Resolver
from producer.ingest.plan import Plan, Planned, Rejected, sentences_of, unresolved
from producer.ingest.types import FILE_PRIORITY
from worker.contract.errors import PromptFileError
from worker.contract.job import JOB_FIELDS, Job
from worker.contract.plain_text import counted

#: Bad lines that an error names.
_NAMED = 10
#: Names of metadata that are counted; there may be as many as lines.
_MAX_NAMES = 1_000
#: What the jobs of a file have where nothing is given.
_OPEN = {each.name: each.default for each in JOB_FIELDS.values()} | {"priority": FILE_PRIORITY}


@dataclass
class Findings:
    """What a check found."""

    jobs: int = 0
    bad: int = 0
    #: For each name that went to metadata: jobs that have it.
    metadata: dict[str, int] = field(default_factory=dict)
    #: For each warning: jobs that deserve it, and the first one's file and line.
    warnings: dict[str, tuple[int, str, int]] = field(default_factory=dict)


def check(
    plan: Plan,
    found: Callable[[Rejected], None],
    warn: Callable[[str], None],
    read: Callable[[Planned, list[str]], None] = lambda _job, _warnings: None,
    resolve: Callable[[Job], Job] | Resolver = unresolved,
) -> Findings:
    """Read all lines without sending any.

    `resolve` says in which syntax jobs are, beside what their lines say.
    Calls `found` for each bad line, and `read` for each job with the warnings that its prompts deserve.
    """
    findings = Findings()
    for each in plan.items(resolve, warn=warn, warn_of_words=False):
        if isinstance(each, Rejected):
            findings.bad += 1
            found(each)
            continue
        findings.jobs += 1
        warnings = sentences_of(each.templated)
        for sentence in warnings:
            number, file, line = findings.warnings.get(sentence, (0, plan.sources[each.file].name, each.line))
            findings.warnings[sentence] = number + 1, file, line
        for name in each.templated.metadata:
            if name in findings.metadata or len(findings.metadata) < _MAX_NAMES:
                findings.metadata[name] = findings.metadata.get(name, 0) + 1
        read(each, warnings)
    return findings


def given_of(plan: Plan, job: Planned) -> dict[str, Any]:
    """The fields of a job that are not at their default, with its file and line; values are JSON."""
    shape = job.templated.shape
    return {
        "file": plan.sources[job.file].name,
        "line": job.line,
        "prompt": job.templated.prompt,
        "seed": job.templated.seed,
        **{name: shape[name] for name in JOB_FIELDS if name in shape and shape[name] != _OPEN[name]},
        **({"metadata": job.templated.metadata} if job.templated.metadata else {}),
    }


def rejected_of(plan: Plan, rejected: Rejected) -> dict[str, Any]:
    """A bad line; values are JSON."""
    values: dict[str, Any] = {"file": plan.sources[rejected.file].name, "line": rejected.line}
    return values | {"field": rejected.field, "reason": rejected.reason}


def refuse_bad_lines(
    plan: Plan, warn: Callable[[str], None], resolve: Callable[[Job], Job] | Resolver = unresolved
) -> None:
    """Raise `PromptFileError` that names the first bad lines, if there are any.

    `resolve` is how the run would resolve its jobs: a line may be wrong in the fleet's syntax alone.
    """
    bad: list[Rejected] = []

    def found(rejected: Rejected) -> None:
        if len(bad) < _NAMED:
            bad.append(rejected)

    number = check(plan, found, warn, resolve=resolve).bad
    if number:
        shown = "\n".join(f"{plan.sources[each.file].name}, line {each.line}: {each.reason}" for each in bad)
        lines = counted(number, "line is no job", "lines are no jobs")
        raise PromptFileError(f"{lines}, and nothing was sent:\n{shown}")
