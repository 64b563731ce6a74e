"""How many jobs wait and how many are with workers, by model and revision: what a fleet is scaled by."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from worker.contract.queues import queues_of
from worker.contract.refusals import code_of
from worker.state.fleet import Fleet
from worker.state.keys import HELD
from worker.state.parked import parked

if TYPE_CHECKING:
    from redis.client import Redis

#: Held messages that Redis looks through at a time.
AT_ONCE = 500


class Served(NamedTuple):
    """What a queue is of."""

    #: The model's name, where a worker has announced it in the last days; else as the queue's name has it.
    model: str
    #: The revision as the queue's name has it; empty where any will do.
    revision: str


class QueueFigures(NamedTuple):
    """The jobs of one Redis at one moment."""

    #: Messages that wait, those for newer workers included.
    waiting: dict[Served, int]
    #: Messages that workers hold, also those of a worker that died and whose lease has not been swept.
    in_flight: dict[Served, int]
    #: Live workers that take jobs.
    workers: dict[Served, int]


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
    for (queue, _), count in parked(client).items():
        waiting[_served(queue, names)] += count
    for queue in _held(client):
        in_flight[_served(queue, names)] += 1
    for known in {*waiting, *workers}:
        for figures in (waiting, in_flight, workers):
            figures.setdefault(known, 0)
    return QueueFigures(dict(waiting), dict(in_flight), dict(workers))


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
