"""Messages of a prompt file's jobs, fast: text templates of which only a few gaps are filled for each job.

A **shape** is all of a job but its prompt, seed and metadata. The first line of a shape goes through `Job`
itself, and its texts become templates. For each later line of the shape the prompt, the seed and the
metadata are checked by the same limits and filled in. A line that these checks refuse goes through `Job`,
which says what is wrong. The result equals that of `Job.parse`, `Fleet.resolve`, `Job.id` and Celery's own
producer, to the byte; tests/producer/ingest/test_message_templates.py checks it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING, Any, NamedTuple

from worker.celery import message_of
from worker.contract import a1111_syntax
from worker.contract.choices import PromptSyntax
from worker.contract.embedding_names import EmbeddingNames
from worker.contract.errors import InvalidJobError
from worker.contract.file_index import MAX_NAME
from worker.contract.job import JOB_FIELDS, WRITTEN_FIELDS, Job, hashed, version_needed
from worker.contract.job_checks import VISIBLE
from worker.contract.job_parameters import FIRST_MAX_PROMPT, MAX_METADATA, MAX_SEED
from worker.contract.message import Route, args_repr, payload_text, route_of, task_call

if TYPE_CHECKING:
    from worker.state.fleet import FleetSnapshot

#: Shapes that are kept, at most.
MAX_SHAPES = 1_000
#: Fields that follow from who submits.
_SUBMITTERS = JOB_FIELDS.keys() - WRITTEN_FIELDS.keys()
#: The prompt of a job that stands for others: a word that is longer than any name of a file.
_NO_NAME = "x" * (MAX_NAME + 1)
#: Where a message's headers begin.
_HEADERS = '"headers": {'
_NO_NAMES = EmbeddingNames(())
#: What `Job` refuses in a text.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class Resolver(NamedTuple):
    """How jobs are resolved whose prompts may name files."""

    #: As `Fleet.resolve`.
    job: Callable[[Job], Job]
    #: The names that the prompts may have of all jobs that are like this one but for their prompt.
    names: Callable[[Job], EmbeddingNames]


def resolver_of(snapshot: FleetSnapshot) -> Resolver:
    """How jobs are resolved by what the fleet serves at one moment."""

    def names(job: Job) -> EmbeddingNames:
        meant = snapshot.meant(job)
        return _NO_NAMES if meant is None else meant.index.embedding_names

    return Resolver(snapshot.resolve, names)


@dataclass(frozen=True, slots=True)
class TemplatedJob:
    """A checked and resolved job of a run, as texts."""

    #: The job's id.
    id: str
    #: The job as JSON, as its message carries it.
    job: str
    prompt: str
    seed: int
    #: Where its message waits.
    route: Route
    #: Version of messages that it needs.
    version: int
    #: The other fields that determine the picture: for the manifest.
    shape: Mapping[str, Any]
    metadata: Any
    #: The webhook of its submission; empty: it has none.
    webhook: str = ""


@dataclass(frozen=True)
class _Shape:
    """The texts of one shape: what stands before, between and after the gaps."""

    #: Of what is hashed into the id; the gaps are prompt and seed.
    hashed: tuple[str, str, str]
    #: Of the job as JSON; the gaps are prompt, seed and metadata.
    job: tuple[str, str, str, str]
    route: Route
    version: int
    fields: Mapping[str, Any]
    #: Prompts with one of these go through `Job`: its file is part of the job.
    names: EmbeddingNames


class JobTemplates:
    """Makes jobs of job fields."""

    def __init__(
        self,
        resolve: Callable[[Job], Job] | Resolver,
        job_of: Callable[[dict[str, Any]], Job] = Job.parse,
    ) -> None:
        """`resolve` fills in the model and its revision, as `Fleet.resolve` does; `job_of` checks fields."""
        resolver = resolve if isinstance(resolve, Resolver) else Resolver(resolve, lambda _: _NO_NAMES)
        self._resolve, self._names, self._job_of = resolver.job, resolver.names, job_of
        self._shapes: dict[tuple[object, ...], _Shape] = {}

    def fill(self, fields: Mapping[str, Any], tenant: str = "") -> TemplatedJob:
        """The job of these fields, which `tenant` submits. Raises `InvalidJobError` as `job_of` does.

        Who writes the fields is not asked whose job it is.
        """
        if not _SUBMITTERS.isdisjoint(fields):
            raise InvalidJobError("tenant is not part of a job here: it follows from who submits it.")
        prompt, seed, metadata = fields.get("prompt"), fields.get("seed"), fields.get("metadata", {})
        if (
            type(prompt) is not str
            or not 1 <= len(prompt) <= FIRST_MAX_PROMPT
            or _UNPRINTABLE.search(prompt)
            or not VISIBLE.search(prompt)
            or type(seed) is not int
            or not 0 <= seed <= MAX_SEED
            or (metadata_text := _plain_metadata(metadata)) is None
        ):
            return self._parse(fields, tenant)
        try:
            shape = self._shape(fields, tenant)
        except (InvalidJobError, TypeError):
            # The job's own error may name more fields; not every value can be part of a key.
            return self._parse(fields, tenant)
        if shape.names.may_be_in(prompt):
            return self._parse(fields, tenant)
        if shape.fields.get("prompt_syntax") == PromptSyntax.A1111 and not _is_readable(prompt, shape.fields):
            return self._parse(fields, tenant)
        prompt_text, seed_text = quoted(prompt), str(seed)
        before, between, after = shape.hashed
        job_id = hashlib.sha256(f"{before}{prompt_text}{between}{seed_text}{after}".encode()).hexdigest()[:32]
        first, second, third, last = shape.job
        job = f"{first}{prompt_text}{second}{seed_text}{third}{metadata_text}{last}"
        return TemplatedJob(job_id, job, prompt, seed, shape.route, shape.version, shape.fields, metadata)

    def _parse(self, fields: Mapping[str, Any], tenant: str) -> TemplatedJob:
        """The same without a template, by the job itself."""
        job = self._resolve(self._job_of(dict(fields)).of_tenant(tenant))
        values = job.model_dump(mode="json")
        text, version = json.dumps(values), version_needed(values)
        prompt, seed, metadata = (values.pop(name) for name in ("prompt", "seed", "metadata"))
        return TemplatedJob(job.id, text, prompt, seed, route_of(job), version, values, metadata)

    def _shape(self, fields: Mapping[str, Any], tenant: str) -> _Shape:
        """The shape of these fields. Raises `InvalidJobError`; `TypeError` where they cannot be a key."""
        key = tuple(
            (name, type(value), json.dumps(value) if isinstance(value, list | dict) else value)
            for name, value in (*fields.items(), ("tenant", tenant))
            if name not in ("prompt", "seed", "metadata")
        )
        if (known := self._shapes.get(key)) is not None:
            return known
        rest = {name: value for name, value in fields.items() if name != "metadata"}
        given = self._job_of(rest | {"prompt": _NO_NAME, "seed": 0}).of_tenant(tenant)
        job = self._resolve(given)
        if len(self._shapes) >= MAX_SHAPES:
            self._shapes.clear()
        self._shapes[key] = made = _shape_of(job, self._names(given))
        return made


class MessageTemplate:
    """The messages of one route, as Celery's own producer puts them into Redis, with gaps."""

    def __init__(self, route: Route, producer: Any) -> None:
        """`producer` is kombu's, on a connected channel."""
        gaps = {name: _gap() for name in ("id", "payload", "shown", "tag")}
        call = task_call(gaps["payload"], gaps["shown"], route)
        message = message_of(call, gaps["id"], producer)
        #: The Redis list that the messages go to.
        self.list = route.list
        body = base64.b64decode(message["body"]).decode()
        self._body = body.partition(json.dumps(gaps["payload"]))[::2]
        message["body"] = gaps["body"] = _gap()
        message["properties"]["delivery_tag"] = gaps["tag"]
        text = json.dumps(message)
        names = {json.dumps(gap): name for name, gap in gaps.items()}
        # Even places hold texts, odd ones the names of gaps.
        self._parts = [
            names.get(part, part) for part in re.split(f"({'|'.join(map(re.escape, names))})", text)
        ]
        self._gaps = self._parts[1::2]

    def fill(
        self,
        templated: TemplatedJob,
        mark: str,
        task_id: str,
        tag: str,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """The message of one job, with its run mark and its delivery tag, as it stands in the list.

        `headers`: those of its trace.
        """
        before, after = self._body
        body = f"{before}{payload_text(templated.version, templated.id, templated.job, mark)}{after}"
        values = {
            "id": f'"{task_id}"',
            "body": f'"{base64.b64encode(body.encode()).decode()}"',
            "shown": quoted(args_repr(templated.prompt, templated.seed)),
            "tag": f'"{tag}"',
        }
        parts = self._parts.copy()
        parts[1::2] = [values[name] for name in self._gaps]
        text = "".join(parts)
        # What stands before is base64.
        return text.replace(_HEADERS, f"{_HEADERS}{json.dumps(headers)[1:-1]}, ", 1) if headers else text


def _is_readable(prompt: str, fields: Mapping[str, Any]) -> bool:
    """Whether a prompt can be read in AUTOMATIC1111's syntax, beside these other fields.

    Not where there is a second pass, in whose steps it is another text: `Job` looks at both.
    """
    if "upscale" in fields:
        return False
    try:
        a1111_syntax.check(prompt, fields["negative_prompt"], fields["steps"])
    except ValueError:
        return False
    return True


def _gap() -> str:
    """A text that is in no message."""
    return f"@{secrets.token_hex(16)}@"


def _plain_metadata(metadata: object) -> str | None:
    """Metadata as JSON, where it is so plain that nothing can be wrong with it; else None."""
    if type(metadata) is not dict:
        return None
    if not metadata:
        return "{}"
    for name, value in metadata.items():
        if type(name) is not str or type(value) is not str:
            return None
        if not (name.isascii() and value.isascii()) and _UNPRINTABLE.search(name + value):
            return None
    text = json.dumps(metadata)
    # As ASCII with blanks it is longer than what `Job` measures.
    return text if len(text) <= MAX_METADATA else None


def _shape_of(job: Job, names: EmbeddingNames) -> _Shape:
    gaps = [_gap() for _ in range(3)]
    values = job.model_dump(mode="json") | dict(zip(("prompt", "seed", "metadata"), gaps, strict=True))
    ends = [json.dumps(gap) for gap in gaps]
    text = json.dumps(values)
    before, rest = hashed(values).split(ends[0])
    between, after = rest.split(ends[1])
    first, rest = text.split(ends[0])
    second, rest = rest.split(ends[1])
    third, last = rest.split(ends[2])
    fields = {name: value for name, value in values.items() if name not in ("prompt", "seed", "metadata")}
    # What the gaps are filled with is of the first version, or goes through `Job`.
    version = version_needed(fields)
    texts = (before, between, after), (first, second, third, last)
    return _Shape(*texts, route_of(job), version, fields, names)
