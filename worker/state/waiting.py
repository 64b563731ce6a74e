"""What waits in a queue that nobody serves: for which model, and how much of it somebody still wants."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from worker.contract.message import payload_in, run_mark_in
from worker.contract.queues import lists_of
from worker.state.keys import job_key, run_key
from worker.state.tenants import lists_of_tenant, tenants_in

if TYPE_CHECKING:
    from collections.abc import Iterable

    from redis.client import Redis

#: Messages that are looked at, at most.
MAX_MESSAGES = 1_000


class Waiting(NamedTuple):
    """The messages that were looked at: those that are fetched first."""

    #: Their number.
    messages: int
    #: Of these, the messages of jobs that are not over: a cancelled job's message stays until it is fetched.
    wanted: int
    #: The model and the revision of the first wanted job, else of the first one; empty where none is known.
    model: str
    revision: str


def waiting_in(client: Redis, queue: str) -> Waiting:
    """What waits in `queue`."""
    texts: list[str] = []
    of_tenants = [name for each in tenants_in(client, queue) for name in lists_of_tenant(queue, each)]
    for name in (*lists_of(queue), *of_tenants):
        # Messages are fetched from the right.
        texts += reversed([str(text) for text in client.lrange(name, len(texts) - MAX_MESSAGES, -1)])
        if len(texts) >= MAX_MESSAGES:
            break
    messages = list(_decoded(texts[:MAX_MESSAGES]))
    payloads = [payload_in(message) for message in messages]
    ids = [payload.get("id", "") if isinstance(payload, dict) else "" for payload in payloads]
    runs = [mark.run if (mark := run_mark_in(message)) else "" for message in messages]
    with client.pipeline(transaction=False) as pipe:
        for job_id, run in zip(ids, runs, strict=True):
            pipe.hget(job_key(str(job_id)), "state")
            # HGET, which a producer may.
            pipe.hget(run_key(run), "cancelled")
        found = pipe.execute()
    wanted = [
        payload
        for payload, state, is_cancelled in zip(payloads, found[::2], found[1::2], strict=True)
        # A job of a run has no record before a worker has fetched it.
        if state in ("queued", "running") or (state is None and not is_cancelled)
    ]
    job = _job_in(next(iter([*wanted, *payloads]), None))
    return Waiting(len(messages), len(wanted), str(job.get("model", "")), str(job.get("revision", "")))


def _decoded(texts: Iterable[str]) -> Iterable[Any]:
    for text in texts:
        try:
            yield json.loads(text)
        except (ValueError, RecursionError):
            yield None


def _job_in(payload: Any) -> dict[str, Any]:
    job = payload.get("job") if isinstance(payload, dict) else None
    return job if isinstance(job, dict) else {}
