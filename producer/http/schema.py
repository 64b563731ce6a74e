"""The JSON schemas of jobs and of what is known of them, made from `Job`, `JobRecord` and the `#:` lines.

There is no second list of fields: a field that is added to `Job` is in the schema, in the OpenAPI document
and in what the routes take.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel

from producer.http import problems
from worker.contract.job import WRITTEN_FIELDS, Job
from worker.contract.job_fields import help_lines
from worker.contract.job_parameters import MAX_SEED
from worker.contract.record import JobRecord
from worker.contract.webhook import MAX_WEBHOOK
from worker.state.fleet import WorkerInfo

#: Where the schemas are in the document.
_REFERENCE: Final = "#/components/schemas/{model}"
#: Jobs in one request, at most.
MAX_JOBS: Final = 1_000
#: A job as the document shows it.
EXAMPLE: Final = {"prompt": "a small cat", "seed": 7, "width": 128, "height": 128, "steps": 20}
#: Patterns of a job's id and of a submission's.
JOB_ID, SUBMISSION = "[0-9a-f]{32}", "[0-9a-f]{14,40}"

#: What is told when a job or a run has ended.
WEBHOOK: Final = {
    "type": ["string", "null"],
    "format": "uri",
    "minLength": 1,
    "maxLength": MAX_WEBHOOK,
    "title": "Webhook",
    "description": "Address of https that is told how it ended: see docs/webhooks.md.",
}
#: What fields may be given as, beside the form in which `Job` keeps them.
_ALSO_TAKEN: Final[Mapping[str, list[dict[str, Any]]]] = {
    # Read as not given.
    "image": [{"type": "null"}],
    "mask": [{"type": "null"}],
    # As a text, as weights by name, and as a list with texts.
    "loras": [{"type": "string"}, {"type": "object"}, {"type": "array", "contains": {"type": "string"}}],
}
_ID: Final = {"type": "string", "pattern": f"^{JOB_ID}$", "description": "The job's id: equal jobs have one."}
_SUBMISSION: Final = {
    "type": "string",
    "pattern": f"^{SUBMISSION}$",
    "description": "The caller's own submission of the job; empty where none of the caller's is known.",
}
_LINKS: Final = {
    "type": "object",
    "description": "Paths of this submission: `self`, `events` and `image`.",
    "additionalProperties": {"type": "string"},
}


def reference(name: str) -> dict[str, Any]:
    """A reference to a schema of the document."""
    return {"$ref": _REFERENCE.format(model=name)}


def _with_lines(schema: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """A model's schema with its `#:` lines as descriptions."""
    for name, text in help_lines(model).items():
        if name in schema.get("properties", {}):
            schema["properties"][name]["description"] = text
    return schema


def _of(model: type[BaseModel], mode: Any, found: dict[str, Any]) -> dict[str, Any]:
    """The schema of a model; those that it refers to are added to `found`."""
    schema = model.model_json_schema(ref_template=_REFERENCE, mode=mode)
    found |= schema.pop("$defs", {})
    return _with_lines(schema, model)


@functools.cache
def schemas() -> Mapping[str, Any]:
    """All schemas of the document by name."""
    found: dict[str, Any] = {}
    job = _of(Job, "validation", found)
    job["description"] = "One prompt with its parameters. What is left out is the model's own default."
    job["examples"] = [EXAMPLE]
    job["properties"]["seed"]["minimum"] = -1
    job["properties"] = {name: job["properties"][name] for name in WRITTEN_FIELDS}
    for name, field in WRITTEN_FIELDS.items():
        job["properties"][name].setdefault("title", field.label)
    for name, others in _ALSO_TAKEN.items():
        field = job["properties"][name]
        kept = {word: field.pop(word) for word in ("type", "items", "maxItems") if word in field}
        # Last, which is how the page asks for it.
        field["anyOf"] = [*others, kept]
    job["properties"]["webhook"] = dict(WEBHOOK)
    record = _of(JobRecord, "serialization", found)
    record.pop("description", None)
    record["properties"].pop("runs")
    record["properties"]["id"] = _ID
    record["properties"] |= {"submission": {**_SUBMISSION, "pattern": f"^({SUBMISSION})?$"}, "links": _LINKS}
    record["properties"]["job"] = {"type": "object", "description": "As `Job`, with what was filled in."}
    record["required"] = ["id", "state", "job", "submission", "links"]
    record["properties"]["note"] = {"type": "string", "description": "Why it cannot start, and what to do."}
    record["title"] = "JobView"
    submitted = {
        "type": "object",
        "title": "Submitted",
        "required": ["id", "submission", "state", "seed", "links"],
        "properties": {
            "id": _ID,
            "submission": _SUBMISSION,
            "state": {"type": "string", "const": "queued"},
            "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED},
            "links": _LINKS,
        },
    }
    listed = {
        "type": "object",
        "title": "SubmittedList",
        "required": ["jobs"],
        "properties": {"jobs": {"type": "array", "items": reference("Submitted")}},
    }
    found |= {"Job": job, "JobView": record, "Submitted": submitted, "SubmittedList": listed}
    found["JobState"] = {
        "type": "object",
        "title": "JobState",
        "required": ["id", "state"],
        "properties": {"id": _ID, "state": reference("State")},
    }
    found["Problem"] = dict(problems.SCHEMA)
    found["WorkerInfo"] = _of(WorkerInfo, "serialization", found)
    return found


def json_body(schema: Mapping[str, Any], example: Any = None) -> dict[str, Any]:
    """A route's `openapi_extra` for a body of JSON that the route reads by itself."""
    content: dict[str, Any] = {"schema": dict(schema)}
    if example is not None:
        content["examples"] = example
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def with_form(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The same `openapi_extra` for a route that takes a job as a form as well, with its pictures as files."""
    file = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "required": ["prompt"],
        "description": "The fields of Job as texts, but for pictures.",
        "properties": {"prompt": {"type": "string"}, "image": file, "mask": file},
    }
    body = extra["requestBody"]
    content = {**body["content"], "multipart/form-data": {"schema": form}}
    return {**extra, "requestBody": {**body, "content": content}}


def file_body(description: str) -> dict[str, Any]:
    """A route's `openapi_extra` where the body is a file as it is."""
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {"requestBody": {"required": True, "description": description, "content": content}}


def answers(
    status: int, schema: Mapping[str, Any] | None, *refusals: int, media: str = "application/json"
) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: what it answers with `status`, and the problems it may answer instead."""
    content = {} if schema is None else {"content": {media: {"schema": dict(schema)}}}
    found: dict[int | str, dict[str, Any]] = {status: {"description": "As asked.", **content}}
    said = {"content": {problems.MEDIA_TYPE: {"schema": reference("Problem")}}}
    for each in (401, 403, 429, 503, *refusals):
        found[each] = {"description": _WHY.get(each, "RefusedError."), **said}
    return found


_WHY: Final = {
    400: "The body or a header cannot be read.",
    401: "The key is missing or unknown.",
    403: "The key has no scope for it, or its tenant may never ask for it.",
    404: "There is nothing of that name.",
    406: "There is no such form of the answer.",
    409: "The state of the job, or of an earlier request, does not permit it.",
    413: "The body is too large.",
    415: "The body is of another type.",
    422: "A value is outside its limits.",
    429: "A limit of the key's tenant is reached: try again later.",
    503: "Redis or the bucket is away, or the server is full: try again.",
}
