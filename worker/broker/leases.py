"""The leases of this process, one for each Redis that it consumes from, and what a running task asks of them.

The tag of a running task's message is `task.request.properties["delivery_tag"]`.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable

from worker.broker.lease import FLUSH_S, Lease

_leases: dict[tuple[object, ...], Lease] = {}
_lock = threading.Lock()


def lease_of_process(broker: tuple[object, ...], new: Callable[[], Lease]) -> Lease:
    """The one lease that this process has from a broker; `new` makes it for the first caller."""
    with _lock:
        if broker not in _leases:
            _leases[broker] = new()
            atexit.register(_leases[broker].end, FLUSH_S)
        return _leases[broker]


def postpone(delivery_tag: str, delay_s: float, *, counts: bool = False) -> None:
    """Let a message that this process holds wait for `delay_s` seconds, once its task is rejected.

    `counts`: nobody chose that it comes back, as after a worker's death. There is a limit to that.

    Celery's Reject alone would deliver it again at once, in a loop. While it waits it stays registered as
    held, so that nothing is lost whoever is killed, and any worker fetches it afterwards.
    """
    with _lock:
        for lease in _leases.values():
            lease.postpone(delivery_tag, delay_s, counts=counts)


def set_aside_held(delivery_tag: str, reason: str) -> None:
    """Set a message aside that this process holds: its job cannot be read. Celery may acknowledge it then."""
    with _lock:
        for lease in _leases.values():
            lease.set_aside(delivery_tag, reason)


def acknowledge_by_record(delivery_tag: str, records: tuple[str, str], holder: tuple[str, str]) -> None:
    """Let a message that this process holds be acknowledged only if its job's record says that it is over.

    `records`, the keys of the job's record and of its attempts, are read in the step that acknowledges. What
    was written there before, on a primary that has died since, may never have reached the replica that is the
    primary now; the message is delivered again then. `holder`: see `Recorded`.
    """
    with _lock:
        for lease in _leases.values():
            lease.acknowledge_by_record(delivery_tag, records, holder)


def acknowledged(delivery_tag: str) -> None:
    """A message that this process holds was acknowledged in Redis, in the step that marked its job done."""
    with _lock:
        for lease in _leases.values():
            lease.acknowledged(delivery_tag)


def held() -> int:
    """How many messages this process holds."""
    with _lock:
        return sum(lease.count for lease in _leases.values())


def _forget() -> None:
    """After a fork: the child has the parent's leases, but not its threads."""
    for lease in _leases.values():
        atexit.unregister(lease.end)
    _leases.clear()


os.register_at_fork(after_in_child=_forget)
