"""The message of a job: written here by producers, read here by workers.

A message is one call of the Celery task `TASK`, whose only argument is the **payload**, a JSON object:

    {"version": 1, "id": "<job id>", "job": {<the job's fields>}, "run": "<run mark>"}

`version` is the first that can say this job: workers of that version and later ones read it. `run` is left
out where the job belongs to no run of a prompt file. `payload_of` makes the payload of a job,
`payload_text` writes it faster for producers that send jobs by the thousand, `task_call` puts it into a call.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker.contract.errors import InvalidJobError, NewerMessageError
from worker.contract.job import FORMAT_VERSION, Job, version_needed
from worker.contract.job_checks import is_tenant
from worker.contract.job_parameters import MAX_PRIORITY
from worker.contract.queues import list_of, queue_of
from worker.contract.second_pass import pixel_steps

#: Name of the one Celery task.
TASK = "smallcat.render"
#: Headers of a message, by what they hold. Of traces: W3C's Trace Context and Baggage, as OpenTelemetry sends
#: them. A text may be null, except the two that are needed.
NEEDED_HEADERS = ("task", "id")
TEXT_HEADERS = (
    *("lang", "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin"),
    *("traceparent", "tracestate", "baggage"),
)
#: Whole numbers, true, false or null.
NUMBER_HEADERS = ("retries", "replaced_task_nesting", "ignore_result", "redelivered")
#: Properties of a message: likewise.
TEXT_PROPERTIES = ("correlation_id", "reply_to", "argsrepr")
NUMBER_PROPERTIES = ("delivery_mode",)
#: How the names of headers and properties begin that are ours to come: workers that do not know them ignore
#: them. All others must be null or empty, so that no feature of Celery's can be used by sending it.
OURS = "smallcat-"
#: Headers that workers set on a message that comes back to its queue. How often it came back without an
#: outcome that a worker chose: the worker died before it had the job, or failed in a way that nobody foresaw.
RETURNS = "smallcat-returns"
#: What a tenant's job costs, in pixels x steps: `shares.lua` deals out the queue by it.
COST = "smallcat-cost"
#: True while a worker lets the message wait: that it comes back is no death.
WAITS = "smallcat-waits"
#: In a delivery tag, what follows was added by a worker: another message of the same tag was held.
AGAIN = "#"
#: Bytes of a message, at most: twice those of the largest job within its limits, which
#: tests/worker/contract/test_message.py computes.
MAX_MESSAGE = 550_000
#: Versions are 1 to this number.
MAX_VERSION = 999

#: Regular expressions of a run's name, and of a run mark.
RUN_NAME = r"[0-9a-z]{1,40}"
RUN_MARK = rf"{RUN_NAME}(:[0-9]{{1,12}}){{4}}"


class RunMark(NamedTuple):
    """Which job of a prompt file's run a message carries. As text: `RUN:NUMBER:FILE:LINE:AT`."""

    #: Name of the run: see `RUN_NAME`.
    run: str
    #: Number of the job in its run, from 0: its bit in the run's bitmaps.
    number: int
    #: Number of the file, from 0.
    file: int
    #: Its line there, from 1.
    line: int
    #: Unix seconds by Redis' clock when the message was written.
    at: int

    def encode(self) -> str:
        """The mark as text. `RUN_MARK` is its form; `worker/state/mark_runs.lua` reads it too."""
        return f"{self.run}:{self.number}:{self.file}:{self.line}:{self.at}"

    @classmethod
    def parse(cls, text: str) -> RunMark:
        """The mark in `text`. Raises `ValueError` where it is none."""
        if not re.fullmatch(RUN_MARK, text):
            raise ValueError(f"{text!r} is no run mark: it must be RUN:NUMBER:FILE:LINE:AT.")
        run, *numbers = text.split(":")
        return cls(run, *map(int, numbers))


class Message(BaseModel):
    """The payload of a message, as a worker reads it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: What a worker must read: see `worker.contract.job.version_needed`.
    version: int
    #: The job's id, as the producer computed it.
    id: str
    #: The job.
    job: Job
    #: The job's `RunMark` as text; empty where it belongs to no run.
    run: str = Field(default="", pattern=rf"^({RUN_MARK})?$")

    @classmethod
    def parse(cls, payload: object) -> Message:
        """The message in `payload`. Raises `NewerMessageError`, `InvalidJobError`."""
        if version_in(payload) > FORMAT_VERSION:
            raise newer(version_in(payload))
        try:
            message = cls.model_validate(payload)
        except ValidationError as error:
            finding = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in finding["loc"]) or "it"
            raise InvalidJobError(f"A message is not a job: {where}: {finding['msg']}.") from None
        if message.id != message.job.id:
            raise InvalidJobError(f"A message says id {message.id}, its job's id is {message.job.id}.")
        return message


def version_in(payload: object) -> int:
    """The version of a payload, which every version has in this place; 0 where it has none."""
    version = payload.get("version") if isinstance(payload, dict) else None
    return version if type(version) is int and 1 <= version <= MAX_VERSION else 0


def newer(version: int) -> NewerMessageError:
    """The error for a message of that version."""
    error = NewerMessageError(
        f"A message is of version {version}, this worker reads up to {FORMAT_VERSION}: update it."
    )
    error.version = version
    return error


def payload_of(job: Job, run: str = "", least: int = 1) -> dict[str, object]:
    """The payload for `job`, and for its run mark `run` where it has one: nothing but JSON.

    `least`: the version that what the submission asks for needs, whatever its job needs.
    """
    fields = job.model_dump(mode="json")
    return _payload(max(version_needed(fields), least), job.id, fields, run)


def _payload(version: object, job_id: str, job: object, run: str) -> dict[str, object]:
    """The shape of all payloads."""
    payload = {"version": version, "id": job_id, "job": job}
    return payload | {"run": run} if run else payload


def _around(text: str, *gaps: str) -> list[str]:
    """What stands before, between and after the `gaps` in `text`, each of which is in it once."""
    parts = []
    for gap in gaps:
        part, _, text = text.partition(json.dumps(gap))
        parts.append(part)
    return [*parts, text]


_GAPS = ("@version@", "@id@", "@job@", "@run@")
_BEFORE_VERSION, _BEFORE_ID, _BEFORE_JOB, _BEFORE_RUN, _AFTER = _around(json.dumps(_payload(*_GAPS)), *_GAPS)


def payload_text(version: int, job_id: str, job: str, run: str) -> str:
    """The payload as JSON, for `job` as JSON and a run mark, both known to need no escaping.

    `version` is what the job needs (`worker.contract.job.version_needed`).

    For producers that send jobs by the thousand: no object is made.
    """
    mark = f'{_BEFORE_RUN}"{run}"' if run else ""
    return f'{_BEFORE_VERSION}{version}{_BEFORE_ID}"{job_id}"{_BEFORE_JOB}{job}{mark}{_AFTER}'


def payload_in(message: object) -> Any:
    """The payload of a message as it lies in a Redis list, decoded from JSON; None where it is not ours."""
    try:
        args, _, _ = json.loads(base64.b64decode(message["body"]))  # type: ignore[index]
        return args[0]
    except (KeyError, TypeError, ValueError, IndexError, RecursionError):
        return None


def tenant_in(message: object) -> str:
    """Whose job a message as it lies in a Redis list, decoded from JSON, has; empty where it says none."""
    payload = payload_in(message)
    job = payload.get("job") if isinstance(payload, dict) else None
    tenant = job.get("tenant") if isinstance(job, dict) else None
    return tenant if isinstance(tenant, str) and is_tenant(tenant) else ""


def run_mark_in(message: object) -> RunMark | None:
    """The run mark of a message as it lies in a Redis list, decoded from JSON; None where it has none."""
    payload = payload_in(message)
    try:
        return RunMark.parse(payload["run"])
    except (KeyError, TypeError, ValueError):
        return None


class Route(NamedTuple):
    """Where a message waits."""

    #: Its Celery queue.
    queue: str
    #: Its priority as Redis counts it: backwards, 0 is fetched first.
    priority: int
    #: Whose it is; empty: nobody's.
    tenant: str = ""
    #: What a tenant's job costs, in pixels x steps; 0: it is nobody's, or that is not known yet.
    cost: int = 0

    @property
    def list(self) -> str:
        """Its Redis list."""
        return list_of(self.queue, self.priority, self.tenant)


def route_of(job: Job) -> Route:
    """Where the message of `job` waits."""
    cost = (pixel_steps(dict(job)) or 0) if job.tenant else 0
    return Route(queue_of(job), MAX_PRIORITY - job.priority, job.tenant, cost)


def args_repr(prompt: str, seed: int) -> str:
    """What Flower shows of a message. Celery's own would take longer than all else, and more memory."""
    return f"({prompt[:80]!r}, seed {seed})"


def task_call(payload: object, shown: str, route: Route) -> dict[str, Any]:
    """A call of the task, as arguments of Celery's `send_task`. The caller adds a task id and a connection.

    `shown` is the call's `args_repr`.
    """
    return {
        "name": TASK,
        "args": [payload],
        "argsrepr": shown,
        "queue": route.queue,
        "priority": route.priority,
        **({"headers": {COST: route.cost}} if route.cost else {}),
    }


def task_call_of(job: Job, run: str = "", least: int = 1) -> dict[str, Any]:
    """The call for `job`, and for its run mark `run` where it has one; `least` as in `payload_of`."""
    return task_call(payload_of(job, run, least), args_repr(job.prompt, job.seed), route_of(job))
