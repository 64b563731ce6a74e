"""Notifications to webhooks in Redis: told by the scripts that end jobs, sent by the sender, at least once.

    finish.lua and others ─► list of what was told ─► book: due by host and time ─► sender
                                                        │        ▲ not delivered       │
                                                        ▼        └─────────────────────┤
                                                     given up ◄────────────────────────┘

A notification that a sender has taken comes back when that sender dies. `webhook_book.lua` has the keys,
which no producer may write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from worker.state import scripts
from worker.state.keys import TOLD_BY_PRODUCERS, WEBHOOKS
from worker.state.shared_scripts import Script

if TYPE_CHECKING:
    from redis.client import Redis

#: Seconds that a sender holds a notification: longer than an attempt may take.
HELD_S: Final = 120
#: Seconds that one that was given up is kept.
FAILED_KEPT_S: Final = 30 * 86_400
#: Notifications that were given up and are kept, at most.
MAX_FAILED: Final = 10_000
#: How an attempt ends: delivered, to be tried again, or given up.
Ended = Literal["sent", "later", "failed"]


@dataclass(frozen=True)
class Shares:
    """How many of what one sender sends at once may be of one tenant, and go to one machine."""

    #: Of one tenant, or of none, while others wait; and where no others do.
    per_tenant: int
    alone: int
    #: To one host name at all its ports; to one that lately did not answer in time.
    per_name: int
    per_slow: int
    #: What is sent now, by tenant, and by host name.
    tenants: Mapping[str, int]
    names: Mapping[str, int]
    #: The names that lately did not answer in time.
    slow: Sequence[str] = ()

    def as_json(self) -> str:
        """As `webhook_take.lua` reads it."""
        found = {name: getattr(self, name) for name in ("per_tenant", "alone", "per_name", "per_slow")}
        counts = {"tenants": dict(self.tenants), "names": dict(self.names)}
        return json.dumps(found | counts | {"slow": dict.fromkeys(self.slow, 1)})


def name_of(host: str) -> str:
    """A host and port without the port, as `webhook_take.lua` has it."""
    return re.sub(r":\d*$", "", host).removesuffix(".")


@dataclass(frozen=True)
class Notification:
    """One notification."""

    #: Its id in Redis; its receiver gets that without the first letter.
    id: str
    #: The host and port that it goes to, as they stand in the address.
    host: str
    #: Attempts that have failed.
    attempts: int
    #: Unix seconds when the sender first saw it.
    told_at: float
    #: What is told: see `notify.lua`. Empty where that cannot be read.
    what: Mapping[str, Any]
    #: How its last attempt ended, and when; empty: there was none.
    ended: str = ""
    ended_at: float = 0.0
    #: Unix seconds of the next attempt; 0: it is given up.
    due_at: float = 0.0

    @property
    def hook(self) -> Mapping[str, Any]:
        """Where it goes, and whose it is; empty where that cannot be read."""
        return _object(self.what.get("hook"))


class Notifications:
    """The notifications of one Redis. Thread-safe. Raises redis-py's errors."""

    def __init__(self, client: Redis) -> None:
        self._redis = client
        self._take = Script(client, scripts.WEBHOOK_TAKE)
        self._settle = Script(client, scripts.WEBHOOK_SETTLE)
        self._retry = Script(client, scripts.WEBHOOK_RETRY)

    def take(
        self, most: int, per_host: int, busy: Mapping[str, int], shares: Shares | None = None
    ) -> list[Notification]:
        """Up to `most` notifications that are due, held for `HELD_S` seconds.

        Of each host so many that it has at most `per_host`, with those that are `busy` at this sender.
        `shares`: of each tenant and host name; None: without limit.
        """
        said = shares.as_json() if shares else "{}"
        found = self._take(keys=[], args=[most, HELD_S, per_host, json.dumps(dict(busy)), said])
        return [
            Notification(str(name), str(host), int(attempts), float(told_at), _object(entry))
            for name, host, attempts, told_at, entry in found
        ]

    def settle(self, notification: Notification, ended: Ended, delay_s: float = 0.0, text: str = "") -> None:
        """Note how an attempt ended, `text` in words. `delay_s`: seconds until the next one."""
        args = [notification.id, notification.host, ended, delay_s, text[:500], FAILED_KEPT_S, MAX_FAILED]
        self._settle(keys=[], args=args)

    def retry(self, names: Sequence[str]) -> int:
        """Send these again at once, with all attempts. Returns how many of them there are."""
        return int(self._retry(keys=[], args=list(names))) if names else 0

    def failed(self) -> list[Notification]:
        """Those that were given up, the latest first."""
        return self._read(
            {str(name): 0.0 for name in cast("Any", self._redis.zrevrange(f"{WEBHOOKS}:failed", 0, -1))}
        )

    def waiting(self, most: int = 1_000) -> list[Notification]:
        """Up to `most` of those that are sent or wait for their next attempt, the next first."""
        due: dict[str, float] = {}
        hosts: Any = self._redis.zrange(f"{WEBHOOKS}:hosts", 0, most - 1)
        for host in hosts:
            found: Any = self._redis.zrange(f"{WEBHOOKS}:due:{host}", 0, most - 1, withscores=True)
            due |= dict(found)
        return self._read(dict(sorted(due.items(), key=lambda each: each[1])[:most]))

    def untaken(self) -> int:
        """How many were told since a sender looked last."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.llen(f"{WEBHOOKS}:new")
            pipe.llen(TOLD_BY_PRODUCERS)
            return sum(pipe.execute())

    def counts(self) -> tuple[int, int]:
        """How many wait or are sent now, also those that no sender has seen; and how many were given up."""
        hosts: Any = self._redis.zrange(f"{WEBHOOKS}:hosts", 0, -1)
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.zcard(f"{WEBHOOKS}:failed")
            for host in hosts:
                pipe.zcard(f"{WEBHOOKS}:due:{host}")
            given_up, *due = pipe.execute()
        return sum(due) + self.untaken(), given_up

    def _read(self, names: Mapping[str, float]) -> list[Notification]:
        fields = ("host", "attempts", "told_at", "entry", "ended", "ended_at")
        with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hmget(f"{WEBHOOKS}:of:{name}", *fields)
            found = pipe.execute()
        return [
            Notification(
                *(name, host, int(attempts or 0), float(told_at or 0), _object(entry)),
                *(ended or "", float(ended_at or 0), names[name]),
            )
            for name, (host, attempts, told_at, entry, ended, ended_at) in zip(names, found, strict=True)
            if host is not None
        ]


def _object(text: Any) -> Mapping[str, Any]:
    """The JSON object in a text; an empty one where there is none."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
