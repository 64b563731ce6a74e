"""The jobs of a run: from files and options, the same jobs in the same order whenever it is asked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from producer.ingest.message_templates import JobTemplates, TemplatedJob
from producer.prompts.reader import BadEntry, LineError, read
from producer.prompts.sources import Source
from producer.prompts.variants import Variants
from worker.contract.errors import InvalidJobError, PromptFileError
from worker.contract.job import FORMAT_VERSION, Job

#: A change to which jobs a plan has, or to their order, is a new number.
PLAN_VERSION = 1

_FIELD = re.compile(r'There is no job field "?([^":]+)|(\w+)')


class Cursor(NamedTuple):
    """A position between two jobs of a plan."""

    #: The file, from 0.
    file: int = 0
    #: The entry of that file, from 0.
    entry: int = 0
    #: Jobs of that entry that are before the cursor.
    offset: int = 0

    @classmethod
    def read(cls, text: str) -> Cursor:
        """The cursor that `str` wrote; the beginning for ""."""
        return cls(*map(int, text.split(":"))) if text else cls()

    def __str__(self) -> str:
        return f"{self.file}:{self.entry}:{self.offset}"


class Rejected(NamedTuple):
    """A line that is rejected, or a variant of one."""

    file: int
    line: int
    #: The job field that is wrong; "" where the line itself is.
    field: str
    reason: str
    #: The position after it.
    cursor: Cursor


class Planned(NamedTuple):
    """A job of a run."""

    file: int
    line: int
    templated: TemplatedJob
    #: The values of the grid's axes.
    grid: Mapping[str, Any]
    #: The position after it.
    cursor: Cursor


@dataclass(frozen=True)
class Plan:
    """The jobs of a run: the same ones in the same order each time."""

    sources: Sequence[Source]
    variants: Variants = field(default_factory=Variants)

    @property
    def digest(self) -> str:
        """A hash over all that determines the jobs: 32 hexadecimal digits. The priority is left out."""
        how = self.variants
        defaults = {name: value for name, value in how.defaults.items() if name != "priority"}
        wildcards = "" if how.literal else how.wildcards.digest
        values = [PLAN_VERSION, FORMAT_VERSION, [(each.format, each.digest) for each in self.sources]]
        values += [defaults, how.images, how.seed_start, dict(how.grid), how.sample, how.literal, wildcards]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]

    def items(
        self,
        resolve: Callable[[Job], Job],
        start: Cursor = Cursor(),  # noqa: B008 - frozen
        warn: Callable[[str], None] = lambda _: None,
    ) -> Iterator[Planned | Rejected]:
        """The jobs and the rejected lines from `start` on. Raises `PromptFileError`."""
        templates = JobTemplates(resolve)
        for file in range(start.file, len(self.sources)):
            skip = start.entry if file == start.file else 0
            for number, entry in enumerate(read(self.sources[file], skip, warn), skip):
                after = Cursor(file, number + 1)
                if isinstance(entry, BadEntry):
                    yield Rejected(file, entry.line, entry.field, entry.reason, after)
                    continue
                done = start.offset if (file, number) == start[:2] else 0
                reported: set[tuple[str, str]] = set()
                offset = 0
                try:
                    for offset, variant in enumerate(self.variants.expand(entry, file), 1):
                        if offset <= done:
                            continue
                        after = Cursor(file, number, offset)
                        try:
                            templated = templates.fill(variant.fields)
                        except InvalidJobError as error:
                            finding = (_field(str(error)), str(error))
                            if finding not in reported:
                                reported.add(finding)
                                yield Rejected(file, entry.line, *finding, after)
                            continue
                        yield Planned(file, entry.line, templated, variant.grid, after)
                except LineError as error:
                    yield Rejected(file, entry.line, error.field, error.reason, Cursor(file, number + 1))
                except RecursionError:
                    reason = "It has too many alternatives: split it."
                    yield Rejected(file, entry.line, "prompt", reason, Cursor(file, number + 1))


def unresolved(job: Job) -> Job:
    """`job` as it is: for checking a plan without Redis, where no model can be resolved."""
    return job


def _field(sentence: str) -> str:
    """The job field that a sentence of `Job.parse` begins with."""
    match = _FIELD.match(sentence)
    return (match[1] or match[2]) if match else ""


def check(plan: Plan, found: Callable[[Rejected], None], warn: Callable[[str], None]) -> int:
    """Read all lines without sending any. Returns the number of jobs; calls `found` for each bad line."""
    jobs = 0
    for each in plan.items(unresolved, warn=warn):
        if isinstance(each, Rejected):
            found(each)
        else:
            jobs += 1
    return jobs


def refuse_bad_lines(plan: Plan, warn: Callable[[str], None]) -> None:
    """Raise `PromptFileError` that names the first bad lines, if there are any."""
    bad: list[Rejected] = []
    check(plan, bad.append, warn)
    if bad:
        shown = "\n".join(
            f"{plan.sources[each.file].name}, line {each.line}: {each.reason}" for each in bad[:10]
        )
        raise PromptFileError(f"{len(bad)} lines are no jobs, and nothing was sent:\n{shown}")
