"""Celery's Redis transport, without the faults by which it loses jobs or runs them twice.

This module is the door for the rest of smallcat, and is light: it registers the transport with kombu by name,
so that Redis' client is imported only where a connection is opened. `worker.broker.channel` consumes,
`worker.broker.lease` holds what was consumed.

Lists and messages are those of kombu's own Redis transport, so kombu's producers, Flower and `celery inspect`
work with it. All other keys have names of our own: other applications may use the same database. What a
worker promises beyond kombu: at every instant a message is in a queue or leased to a process, whoever is
killed; the lease is renewed for as long as that process lives, so that a short lease never runs a long job
twice; a lost connection ends no job; an acknowledgement is sent until Redis answers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

from kombu.transport import TRANSPORT_ALIASES

from worker.contract.redis_url import RedisURL

logger = logging.getLogger("smallcat.transport")

#: Scheme in `REDIS_URL` -> scheme that Celery is given. No "+" in them: kombu would cut the URL in two there.
SCHEMES: Final = {
    "redis": "smallcat-redis",
    "rediss": "smallcat-rediss",
    "unix": "smallcat-unix",
    "redis+sentinel": "smallcat-sentinel",
    "rediss+sentinel": "smallcat-sentinels",
}

TRANSPORT_ALIASES[SCHEMES["redis"]] = "worker.broker.channel:Transport"
TRANSPORT_ALIASES[SCHEMES["rediss"]] = "worker.broker.channel:TLSTransport"
TRANSPORT_ALIASES[SCHEMES["unix"]] = "worker.broker.addresses:UnixTransport"
TRANSPORT_ALIASES[SCHEMES["redis+sentinel"]] = "worker.broker.addresses:SentinelTransport"
TRANSPORT_ALIASES[SCHEMES["rediss+sentinel"]] = "worker.broker.addresses:SentinelTLSTransport"

#: The hash of messages that workers hold, and the index of when each was last renewed.
UNACKED: Final = "smallcat:unacked"
UNACKED_INDEX: Final = "smallcat:unacked_index"
#: As `worker.state.records.Records` takes them.
HELD: Final = (UNACKED_INDEX, UNACKED)
#: Their names in earlier versions, which are kombu's: other applications use them, too.
OLD_UNACKED: Final = "unacked"
OLD_UNACKED_INDEX: Final = "unacked_index"

#: Seconds that the list of messages that no worker can read stays, and how many it has at most.
UNDECODABLE_TTL_S: Final = 604_800
UNDECODABLE_MAX: Final = 1_000

#: Seconds for which a worker keeps a message without renewing its lease.
LEASE_S: Final = 30.0

_is_alive: Callable[[], bool] = lambda: True  # noqa: E731 -- until `set_liveness` is called
_slots: Callable[[], tuple[int, int]] | None = None
_urgent = 0
_is_paused: Callable[[], bool] = lambda: False  # noqa: E731 -- until `set_pause` is called
_on_unreadable: Callable[[bytes, str, bool], object] = lambda *_: None  # noqa: E731 -- until it is set
_max_returns = 13


def broker_url(redis_url: str) -> str:
    """Map `REDIS_URL` to the URL that Celery is given: by a scheme whose transport is ours.

    A ValueError does not repeat the URL, which may hold a password.
    """
    return RedisURL.parse(redis_url).broker_url(SCHEMES)


def transport_options(lease_s: float = LEASE_S) -> dict[str, Any]:
    """Make `broker_transport_options`; all processes that consume need the same, the shortest lease wins.

    lease_s: seconds, > 0: how long a killed worker's jobs wait for another worker, and how long Redis may be
    out of a worker's reach before its jobs run twice.

    visibility_timeout: the lease. It may be shorter than a job, because every quarter of it is renewed.
    unacked_restore_interval: seconds between two checks for leases that ran out; one cheap command. All
    workers make them, so a fleet notices sooner.
    unacked_restore_limit: messages that are restored at a time, so that a large restore blocks nobody.
    queue_order_strategy: among messages of equal priority, queues take turns.
    priority_steps: a list for each of the ten priorities; kombu's default has four lists for them.
    socket_connect_timeout: seconds until connecting to a host that does not answer is tried again.
    socket_timeout: seconds until a command to a Redis that does not answer fails.
    socket_keepalive: so that firewalls do not drop idle connections.
    health_check_interval: seconds until a dead connection is noticed.
    """
    if lease_s <= 0:
        raise ValueError(f"lease_s is {lease_s}; it must be above 0")
    return {
        "visibility_timeout": lease_s,
        "unacked_restore_interval": min(5.0, lease_s / 4),
        "unacked_restore_limit": 1000,
        "queue_order_strategy": "round_robin",
        "priority_steps": list(range(10)),
        "socket_connect_timeout": 5,
        "socket_timeout": 30,
        "socket_keepalive": True,
        "health_check_interval": 10,
    }


def set_liveness(is_alive: Callable[[], bool]) -> None:
    """Set the function that says whether this process still works on its jobs.

    While `is_alive()` is false or raises, no lease is renewed and no message fetched: other workers take the
    jobs over when the leases end. It must be quick: two threads call it, up to once a message.
    """
    global _is_alive
    _is_alive = is_alive


def set_slots(slots: Callable[[], tuple[int, int]], urgent: int) -> None:
    """Set the function that says how many messages this process holds at most.

    Of those that `slots()` returns, the first, >= 1, is for all messages, and so many more for urgent ones:
    of priorities 0 to `urgent`, as Redis counts: 0 is fetched first. While the process holds as many as are
    for all, of whatever priority, it fetches only urgent ones. It is called up to twice a message: it must be
    quick.
    """
    global _slots, _urgent
    _slots, _urgent = slots, urgent


def set_pause(is_paused: Callable[[], bool]) -> None:
    """Define when this process fetches no messages.

    While `is_paused()` is true, what it holds stays with it, as before: leases are renewed. It is called
    about once a second and up to once a message: it must be quick.
    """
    global _is_paused
    _is_paused = is_paused


def set_on_unreadable(on_unreadable: Callable[[bytes, str, bool], object]) -> None:
    """Set what is done about a message before it is set aside.

    It is given the message, why it is set aside, and whether that is because it came back too often. A thread
    of the transport calls it, again after an error of Redis that it raises.
    """
    global _on_unreadable
    _on_unreadable = on_unreadable


def unreadable(raw: bytes, reason: str, is_poison: bool) -> None:
    """Do what `set_on_unreadable` says."""
    _on_unreadable(raw, reason, is_poison)


def set_max_returns(times: int) -> None:
    """Set how often, >= 1, a message comes back whose worker died, or failed, before it claimed the job."""
    global _max_returns
    _max_returns = times


def max_returns() -> int:
    """What `set_max_returns` says."""
    return _max_returns


def paused() -> bool:
    """Whether this process must not fetch messages, by the word of whoever called `set_pause`."""
    return _is_paused()


def open_steps(priority_steps: Sequence[int], held: int) -> Sequence[int]:
    """Those of `priority_steps` whose messages may be fetched by a process that holds `held` messages."""
    if _slots is None or held < _slots()[0]:
        return priority_steps
    return [step for step in priority_steps if step <= _urgent]


def open_slots(limit: int, held: int) -> int:
    """How many messages of `open_steps` a process may fetch that holds `held` messages, of `limit`."""
    if _slots is not None:
        open_to_all, reserved = _slots()
        limit = min(limit, open_to_all if held < open_to_all else open_to_all + reserved)
    return limit - held


def alive() -> bool:
    """Whether this process still works on its jobs: see `set_liveness`."""
    try:
        return bool(_is_alive())
    except Exception:
        logger.exception("The state of the engine is unknown: it counts as failed")
        return False
