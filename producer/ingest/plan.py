"""The jobs of a run: from files and options, the same jobs in the same order whenever it is asked."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from producer.ingest.message_templates import JobTemplates, Resolver, TemplatedJob
from producer.ingest.pictures import Pictures
from producer.prompts import fields_v1, reader_v1
from producer.prompts.a1111_options import has_a1111_options
from producer.prompts.entries import BadEntry, Entry, LineError
from producer.prompts.reader import READING, read
from producer.prompts.sources import Source
from producer.prompts.variants import Variants
from producer.prompts.wildcards import ENDINGS
from worker.contract.choices import PromptSyntax
from worker.contract.errors import InvalidJobError
from worker.contract.job import ID_VERSION, Job
from worker.contract.prompt_syntax import (
    UNUSED_NEGATIVE,
    has_unused_negative,
    odd_in_a1111,
    only_words,
    only_words_warning,
)

#: A change to which jobs a plan has, or to their order, is a new number.
PLAN_VERSION = 1

#: The versions of reading files and of dynamic prompts that earlier versions had together, the first one's
#: before others.
_EARLIER = ((1, 1), (2, 1), (1, 2))
#: The files of wildcards that earlier versions of dynamic prompts had.
_ENDINGS = {1: (".txt",)}
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
    #: Whether names that are nearly a job field's go to metadata.
    extra: bool = False
    #: The version of reading files: that of new runs, or the one that a run was begun with.
    reading: int = READING
    #: The variants that the first version made of the same options; None: `variants`.
    first_variants: Variants | None = None
    #: Whether the prompts of files with AUTOMATIC1111's options are in its syntax: not in earlier versions.
    knows_a1111: bool = True
    #: Whether lines are taken by the limits of this version: not in a run that an earlier one began, so that
    #: what was a job there stays one.
    is_new: bool = True
    #: Whose jobs they are; empty: nobody's.
    tenant: str = ""
    #: Reads the pictures that lines name; None: lines name none but those that are stored, by reference.
    pictures: Pictures | None = None

    @property
    def digest(self) -> str:
        """A hash over all that determines the jobs: 32 hexadecimal digits. The priority is left out."""
        how = self.variants
        defaults = {name: value for name, value in how.defaults.items() if name != "priority"}
        wildcards = "" if how.literal else how.wildcards.digest_of(*_ENDINGS.get(how.syntax, ENDINGS))
        reading = [self.reading] if self.reading > 1 else []
        files = [(each.format, each.digest, *reading) for each in self.sources]
        values = [PLAN_VERSION, ID_VERSION, files]
        values += [defaults, how.images, how.seed_start, dict(how.grid), how.sample, how.literal, wildcards]
        values += ["extra"] if self.extra else []
        values += ["syntax", how.syntax] if how.syntax > 1 and not how.literal else []
        values += ["a1111"] if any(self._in_a1111) else []
        values += ["tenant", self.tenant] if self.tenant else []
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]

    def as_begun(self, is_begun: Callable[[str], bool]) -> Plan:
        """This plan, or that of an earlier version for the same files and options if a run was begun with it.

        `is_begun` says whether there is a run of a plan with that digest. The run goes on as it began.
        """
        if is_begun(self.digest):
            return self
        # Earlier versions knew no syntax of prompts.
        plain = replace(self, knows_a1111=False) if any(self._in_a1111) else self
        if plain is not self and is_begun(plain.digest):
            return plain
        for reading, syntax in _EARLIER:
            variants = replace(self.variants, syntax=syntax)
            if reading == syntax == 1:
                variants = replace(self.first_variants or variants, syntax=1, draws_seeds=False)
            earlier = replace(plain, reading=reading, variants=variants)
            if is_begun(earlier.digest):
                return earlier
        return self

    @functools.cached_property
    def _in_a1111(self) -> tuple[bool, ...]:
        """For each file whether its prompts are in AUTOMATIC1111's syntax, unless a line says otherwise."""
        says = "prompt_syntax" in {*self.variants.defaults, *self.variants.grid}
        return tuple(self.knows_a1111 and not says and has_a1111_options(each) for each in self.sources)

    def items(
        self,
        resolve: Callable[[Job], Job] | Resolver,
        start: Cursor = Cursor(),  # noqa: B008 - frozen
        warn: Callable[[str], None] | None = None,
        *,
        warn_of_words: bool = True,
    ) -> Iterator[Planned | Rejected]:
        """The jobs and the rejected lines from `start` on. Raises `PromptFileError`.

        `warn` is called with one sentence for each name and, unless `warn_of_words` is False, for each syntax
        in a prompt that has no meaning here.
        """
        job_of = functools.partial(Job.parse, is_new=self.is_new)
        templates = JobTemplates(resolve, fields_v1.job_of if self.reading == 1 else job_of)
        words = _Words(warn) if warn and warn_of_words else None
        for file in range(start.file, len(self.sources)):
            skip = start.entry if file == start.file else 0
            syntax = {"prompt_syntax": PromptSyntax.A1111} if self._in_a1111[file] else {}
            for number, entry in enumerate(self._read(file, skip, warn), skip):
                after = Cursor(file, number + 1)
                if isinstance(entry, BadEntry):
                    yield Rejected(file, entry.line, entry.field, entry.reason, after)
                    continue
                done = start.offset if file == start.file and number == start.entry else 0
                reported: set[tuple[str, str]] = set()
                offset = 0
                try:
                    for offset, variant in enumerate(self.variants.expand(entry, file, **syntax), 1):
                        if offset <= done:
                            continue
                        after = Cursor(file, number, offset)
                        try:
                            fields = syntax | variant.fields if syntax else variant.fields
                            if self.pictures:
                                fields = dict(self.pictures.named(fields, self.sources[file]))
                            templated = templates.fill(fields, self.tenant)
                        except InvalidJobError as error:
                            finding = (_field(str(error)), str(error))
                            if finding not in reported:
                                reported.add(finding)
                                yield Rejected(file, entry.line, *finding, after)
                            continue
                        if words:
                            words.look(self.sources[file].name, entry.line, templated)
                        yield Planned(file, entry.line, templated, variant.grid, after)
                except LineError as error:
                    yield Rejected(file, entry.line, error.field, error.reason, Cursor(file, number + 1))
                except RecursionError:
                    reason = "It has too many alternatives: split it."
                    yield Rejected(file, entry.line, "prompt", reason, Cursor(file, number + 1))
                if warn:
                    for sentence in self.variants.wildcards.notices():
                        warn(sentence)

    def _read(self, file: int, skip: int, warn: Callable[[str], None] | None) -> Iterator[Entry | BadEntry]:
        if self.reading == 1:
            return reader_v1.read(self.sources[file], skip)
        return read(self.sources[file], skip, warn or (lambda _: None), extra=self.extra)


class _Words:
    """Warns of what is only drawn as words, and of unused negative prompts: once of each kind."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._warned: set[str] = set()

    def look(self, file: str, line: int, job: TemplatedJob) -> None:
        """Look at the prompts of a job."""
        for sentence in sentences_of(job):
            if sentence not in self._warned:
                self._warned.add(sentence)
                self._warn(f"{file}, line {line}: {sentence}")


def sentences_of(job: TemplatedJob) -> list[str]:
    """What of a job's prompts no picture shows: a sentence for each kind."""
    negative = job.shape.get("negative_prompt", "")
    unused = [UNUSED_NEGATIVE] if has_unused_negative(job.shape) else []
    if job.shape.get("prompt_syntax") == PromptSyntax.A1111:
        return [*odd_in_a1111(job.prompt, negative), *unused]
    return [*(only_words_warning([name]) for name in only_words(job.prompt, negative)), *unused]


def unresolved(job: Job) -> Job:
    """`job` as it is: for checking a plan without Redis, where no model can be resolved."""
    return job


def _field(sentence: str) -> str:
    """The job field that a sentence of `Job.parse` begins with."""
    match = _FIELD.match(sentence)
    return (match[1] or match[2]) if match else ""
