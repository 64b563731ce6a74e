"""Where the transport keeps messages in Redis: the keys, and what stands in them."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from worker.contract.queues import list_of

#: The beginning of the keys with bindings. Celery's exchanges need none: see `worker.broker.bindings`.
BINDINGS: Final = "smallcat:binding"


@dataclass(frozen=True)
class Layout:
    """The keys of one transport. All are complete: with `global_keyprefix`."""

    #: Hash of held messages: delivery tag -> [message, exchange, routing key] as JSON.
    unacked: str
    #: Their index, a sorted set: delivery tag -> Unix seconds when its holder last renewed the lease.
    index: str
    #: List of messages that no worker can read.
    undecodable: str
    #: Set of the lists where messages of newer versions wait.
    parked: str
    #: `global_keyprefix`, for the queues.
    prefix: str
    #: Lowest priority value of each list, ascending.
    priority_steps: Sequence[int]

    def list_of(self, queue: str, priority: object, tenant: str = "") -> str:
        """The list in which a message of this priority waits."""
        try:
            value = max(0, min(int(priority), 9))  # type: ignore[call-overload]
        except (TypeError, ValueError):
            value = 0
        step = self.priority_steps[bisect.bisect(self.priority_steps, value) - 1]
        return self.prefix + list_of(queue, step, tenant)


def json_name(queue: str) -> str:
    """A queue's name as it stands in an entry of the `unacked` hash."""
    return json.dumps(queue)


def words_of(lists: Iterable[tuple[str, str]]) -> list[bytes | str]:
    """What `fetch.lua` is told of the lists that it fetches from: two bytes for each, then the queues.

    Of each: its queue, or "" where messages are not acknowledged; and the class of a list of arrivals, "0" or
    "1", else "". Each queue is named once, because every fetch sends this. At most 200 queues.
    """
    numbers: dict[str, int] = {}
    said = bytearray()
    for queue, kind in lists:
        said += bytes((ord("0") + numbers.setdefault(queue, len(numbers)), ord(kind or "-")))
    return [bytes(said), *(queue and json_name(queue) for queue in numbers)]
