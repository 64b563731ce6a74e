"""How many jobs wait and how many are with workers, by model and revision: what a fleet is scaled by."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

from worker.contract.message import payload_in, run_mark_in
from worker.contract.queues import lists_of, queues_of
from worker.contract.refusals import code_of
from worker.state.fleet import Fleet
from worker.state.hashes import wait_of
from worker.state.keys import HELD, QUEUES, WAITING, job_key
from worker.state.parked import parked
from worker.state.tenants import lists_of_tenant, tenants_in

if TYPE_CHECKING:
    from redis.client import Redis

#: Held messages that Redis looks through at a time.
AT_ONCE = 500
#: Seconds that a job can have waited, at most: what says more was not written by smallcat.
_LONGEST_S = 366 * 86_400.0


class Served(NamedTuple):
    """What a queue is of."""

    #: The model's name, where a worker has announced it in the last days; else as the queue's name has it.
    model: str
    #: The revision as the queue's name has it; empty where any will do.
    revision: str


class Queued(NamedTuple):
    """Which jobs wait."""

    served: Served
    #: Whether they are tenants', of the HTTP API.
    of_tenants: bool


class QueueFigures(NamedTuple):
    """The jobs of one Redis at one moment."""

    #: Messages that wait, those for newer workers included.
    waiting: dict[Served, int]
    #: Messages that workers hold, also those of a worker that died and whose lease has not been swept.
    in_flight: dict[Served, int]
    #: Live workers that take jobs.
    workers: dict[Served, int]
    #: Of those that wait, by whose they are: how many, and seconds since the oldest was submitted, or 0.
    #: The oldest is among the next of each priority and tenant. Without those for newer workers.
    depth: dict[Queued, int]
    oldest_s: dict[Queued, float]
    #: Messages that wait for newer workers, by their version.
    parked: dict[int, int]
    #: Jobs that wait for the pictures of other jobs; they are in no queue.
    chained: int


def queue_figures(client: Redis, fleet: Fleet) -> QueueFigures:
    """The figures, of all queues that jobs were sent to in the last days. Raises redis-py's errors."""
    snapshot, workers = fleet.snapshot(), Counter[Served]()
    names: dict[str, str] = {}
    # Those that are live come last: their names hold.
    for group in [*snapshot.last_seen, *snapshot.live]:
        own, open_to_all, _ = queues_of(group.served)
        names |= {own: group.served.name, open_to_all: group.served.name}
    for group in snapshot.live:
        workers[_served(queues_of(group.served)[0], names)] += 0 if group.paused else group.workers
    waiting, in_flight = Counter[Served](), Counter[Served]()
    for queue, count in fleet.waiting().items():
        waiting[_served(queue, names)] += count
    for_newer = Counter[int]()
    for (queue, version), count in parked(client).items():
        waiting[_served(queue, names)] += count
        for_newer[version] += count
    for queue in _held(client):
        in_flight[_served(queue, names)] += 1
    for known in {*waiting, *workers}:
        for figures in (waiting, in_flight, workers):
            figures.setdefault(known, 0)
    depth, oldest_s = _by_class(client, fleet.now(), names, {*waiting, *workers})
    return QueueFigures(
        dict(waiting), dict(in_flight), dict(workers), depth, oldest_s, dict(for_newer), chained(client)
    )


def chained(client: Redis) -> int:
    """How many jobs wait for the pictures of other jobs."""
    # A producer may not ask for the length.
    return len(cast("list[str]", client.hkeys(WAITING)))


def fullness(info: Mapping[str, object]) -> float | None:
    """The share of Redis' `maxmemory` that is in use, by its INFO; None where it has no limit."""
    most = int(str(info.get("maxmemory", 0)))
    return int(str(info["used_memory"])) / most if most else None


def _by_class(
    client: Redis, now: float, names: dict[str, str], known: set[Served]
) -> tuple[dict[Queued, int], dict[Queued, float]]:
    """How many wait and how long the oldest has, by whose they are; `known` have both at least as 0."""
    depth = {Queued(served, of_tenants): 0 for served in known for of_tenants in (False, True)}
    oldest_s = dict.fromkeys(depth, 0.0)
    lists = [
        (Queued(_served(queue, names), of_tenants), name)
        for queue in sorted(str(queue) for queue in client.smembers(QUEUES))
        for of_tenants, found in (
            (False, lists_of(queue)),
            (True, [each for tenant in tenants_in(client, queue) for each in lists_of_tenant(queue, tenant)]),
        )
        for name in found
    ]
    with client.pipeline(transaction=False) as pipe:
        for _, name in lists:
            pipe.llen(name)
            # Messages are fetched from the right.
            pipe.lrange(name, -1, -1)
        found = pipe.execute(raise_on_error=False)
    next_ones: list[tuple[Queued, str]] = []
    for (queued, _), length, ends in zip(lists, found[::2], found[1::2], strict=True):
        for each in (length, ends):
            # What is no list is no queue, whoever named it.
            if isinstance(each, Exception) and "WRONGTYPE" not in str(each):
                raise each
        if isinstance(length, int) and isinstance(ends, list):
            depth[queued] = depth.get(queued, 0) + length
            oldest_s.setdefault(queued, 0.0)
            next_ones += [(queued, str(text)) for text in ends]
    for (queued, _), at in zip(next_ones, _submitted(client, [text for _, text in next_ones]), strict=True):
        # Producers can write it.
        waited_s = None if at is None else wait_of(now - at, _LONGEST_S)
        oldest_s[queued] = max(oldest_s[queued], waited_s or 0.0)
    return depth, oldest_s


def _submitted(client: Redis, messages: list[str]) -> Iterator[float | None]:
    """Unix seconds when the job of each message was submitted; None where nobody knows."""
    decoded = [_decoded(text) for text in messages]
    payloads = [payload_in(message) for message in decoded]
    with client.pipeline(transaction=False) as pipe:
        for payload in payloads:
            job_id = payload.get("id") if isinstance(payload, dict) else None
            pipe.hget(job_key(str(job_id)[:64]), "submitted_at")
        found = pipe.execute(raise_on_error=False)
    for message, at in zip(decoded, found, strict=True):
        # A job of a run has no record before a worker has fetched it.
        mark = run_mark_in(message)
        try:
            yield float(at) if at is not None else float(mark.at) if mark is not None else None
        except (TypeError, ValueError):
            yield None


def _decoded(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _held(client: Redis) -> Iterator[str]:
    """The queue of each message that is held."""
    try:
        entries = [str(entry) for _, entry in client.hscan_iter(HELD, count=AT_ONCE)]
    except Exception as error:
        if code_of(error) != "NOPERM":
            raise
        # A producer may read it at once.
        entries = [str(entry) for entry in client.hvals(HELD)]
    for entry in entries:
        # [message, exchange, queue], and the message is long. A queue's name has no comma.
        try:
            yield str(json.loads(entry.rpartition(",")[2].removesuffix("]")))
        except ValueError:
            yield ""


def _served(queue: str, names: dict[str, str]) -> Served:
    model, _, revision = queue.removeprefix("smallcat.").partition("@")
    return Served(names.get(queue, model), revision)
