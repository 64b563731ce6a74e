"""Jobs of a prompt file as the messages that carry them, fast: checked once a shape, then only what varies.

A **shape** is all of a job but its prompt, seed and metadata. The first line of a shape goes through `Job`
itself; its texts are kept in pieces, and for the next line the prompt, the seed and the metadata are
checked by the same limits and put between them. What these checks do not pass goes through `Job` again,
which then says what is wrong. The result is that of `Job.parse`, `Fleet.resolve`, `Job.id` and Celery's
own producer, to the byte; tests/producer/ingest/test_message_templates.py holds it to that.
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
from typing import Any

from worker.celery import app
from worker.contract.errors import InvalidJobError
from worker.contract.job import FORMAT_VERSION, MAX_METADATA, MAX_PROMPT, MAX_SEED, Job, hashed
from worker.contract.message import RENDER, args_repr, message_priority
from worker.contract.queues import queue_of

#: Shapes that are kept, at most.
MAX_SHAPES = 1_000
#: What `Job` refuses in a text.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Composed:
    """A checked and resolved job of a run, as texts."""

    #: The job's id.
    id: str
    #: The job as JSON, as its message carries it.
    job: str
    prompt: str
    seed: int
    #: The queue and the priority of its message.
    route: tuple[str, int]
    #: The other fields that determine the picture, and the metadata: for the manifest.
    shape: Mapping[str, Any]
    metadata: Any


@dataclass(frozen=True)
class _Shape:
    """The texts of one shape: what stands before, between and after what varies."""

    #: Of the hash: prompt, seed.
    hashed: tuple[str, str, str]
    #: Of the job: prompt, seed, metadata.
    job: tuple[str, str, str, str]
    route: tuple[str, int]
    fields: Mapping[str, Any]


class Composer:
    """Makes messages out of job fields. `resolve` pins a job's model, as `Fleet.resolve` does."""

    def __init__(self, resolve: Callable[[Job], Job]) -> None:
        self._resolve = resolve
        self._shapes: dict[tuple[object, ...], _Shape] = {}

    def compose(self, fields: Mapping[str, Any]) -> Composed:
        """The job of these fields. Raises `InvalidJobError` as `Job.parse` does."""
        prompt, seed, metadata = fields.get("prompt"), fields.get("seed"), fields.get("metadata", {})
        if (
            type(prompt) is not str
            or not 1 <= len(prompt) <= MAX_PROMPT
            or _UNPRINTABLE.search(prompt)
            or not prompt.strip()
            or type(seed) is not int
            or not 0 <= seed <= MAX_SEED
            or (text := _plain_metadata(metadata)) is None
        ):
            return self._carefully(fields)
        try:
            shape = self._shape(fields)
        except (InvalidJobError, TypeError):  # The job's own error may be longer; a list is in no key.
            return self._carefully(fields)
        words, number = quoted(prompt), str(seed)
        before, between, after = shape.hashed
        job_id = hashlib.sha256(f"{before}{words}{between}{number}{after}".encode()).hexdigest()[:32]
        first, second, third, last = shape.job
        job = f"{first}{words}{second}{number}{third}{text}{last}"
        return Composed(job_id, job, prompt, seed, shape.route, shape.fields, metadata)

    def _carefully(self, fields: Mapping[str, Any]) -> Composed:
        """By way of the job itself."""
        job = self._resolve(Job.parse(dict(fields)))
        values = job.model_dump(mode="json")
        text = json.dumps(values)
        prompt, seed, metadata = (values.pop(name) for name in ("prompt", "seed", "metadata"))
        return Composed(job.id, text, prompt, seed, _route(job), values, metadata)

    def _shape(self, fields: Mapping[str, Any]) -> _Shape:
        """Their shape. Raises `InvalidJobError`, or `TypeError` for fields that cannot be a key."""
        key = tuple(
            (name, type(value), value)
            for name, value in fields.items()
            if name not in ("prompt", "seed", "metadata")
        )
        if (known := self._shapes.get(key)) is not None:
            return known
        rest = {name: value for name, value in fields.items() if name != "metadata"}
        job = self._resolve(Job.parse(rest | {"prompt": "x", "seed": 0}))
        if len(self._shapes) >= MAX_SHAPES:
            self._shapes.clear()
        self._shapes[key] = made = _shape_of(job)
        return made


class Envelope:
    """A message of one queue and priority, as Celery's own producer puts it into Redis, with its gaps."""

    def __init__(self, queue: str, priority: int, producer: Any) -> None:
        """`producer` is kombu's, on a connected channel."""
        gaps = {name: f"@{name}-{secrets.token_hex(8)}@" for name in ("id", "payload", "shown", "tag")}
        channel, caught = producer.channel, []
        channel._put = lambda to, message, **_: caught.append((to, message))
        try:
            app.send_task(
                RENDER,
                args=[gaps["payload"]],
                argsrepr=gaps["shown"],
                task_id=gaps["id"],
                queue=queue,
                priority=priority,
                producer=producer,
            )
        finally:
            del channel._put
        [(to, message)] = caught
        #: The list that it waits in.
        self.list = str(channel._q_for_pri(to, priority))
        body = base64.b64decode(message["body"]).decode()
        self._body = body.partition(json.dumps(gaps["payload"]))[::2]
        message["body"] = gaps["body"] = f"@body-{secrets.token_hex(8)}@"
        message["properties"]["delivery_tag"] = gaps["tag"]
        text = json.dumps(message)
        names = {json.dumps(gap): name for name, gap in gaps.items()}
        self._parts = [
            names.get(part, part) for part in re.split(f"({'|'.join(map(re.escape, names))})", text)
        ]
        # Even places are texts, odd ones the names of gaps.
        self._gaps = self._parts[1::2]

    def message(self, composed: Composed, run: str, task_id: str, tag: str) -> str:
        """The message of one job, at place `run` of its run, as it stands in the list."""
        before, after = self._body
        body = (
            f'{before}{{"version": {FORMAT_VERSION}, "id": "{composed.id}", "job": {composed.job}, '
            f'"run": "{run}"}}{after}'
        )
        values = {
            "id": f'"{task_id}"',
            "body": f'"{base64.b64encode(body.encode()).decode()}"',
            "shown": quoted(args_repr(composed.prompt, composed.seed)),
            "tag": f'"{tag}"',
        }
        parts = self._parts.copy()
        parts[1::2] = [values[name] for name in self._gaps]
        return "".join(parts)


def _plain_metadata(metadata: object) -> str | None:
    """Metadata as JSON, where it is so plain that nothing can be wrong with it; else None."""
    if type(metadata) is not dict:
        return None
    for name, value in metadata.items():
        if type(name) is not str or type(value) is not str:
            return None
        if not (name.isascii() and value.isascii()) and _UNPRINTABLE.search(name + value):
            return None
    text = json.dumps(metadata)
    # As ASCII with blanks it is longer than what `Job` measures.
    return text if len(text) <= MAX_METADATA else None


def _shape_of(job: Job) -> _Shape:
    gaps = [f"@{secrets.token_hex(16)}@" for _ in range(3)]
    values = job.model_dump(mode="json") | dict(zip(("prompt", "seed", "metadata"), gaps, strict=True))
    ends = [json.dumps(gap) for gap in gaps]
    text = json.dumps(values)
    before, rest = hashed(values).split(ends[0])
    between, after = rest.split(ends[1])
    first, rest = text.split(ends[0])
    second, rest = rest.split(ends[1])
    third, last = rest.split(ends[2])
    fields = {name: value for name, value in values.items() if name not in ("prompt", "seed", "metadata")}
    return _Shape((before, between, after), (first, second, third, last), _route(job), fields)


def _route(job: Job) -> tuple[str, int]:
    return queue_of(job), message_priority(job)
