"""What workers of earlier versions held: they kept it under kombu's names, beside other applications.

While such workers live, they renew it themselves. When the last one has died, nobody else would restore it.
"""

from __future__ import annotations

from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Final

from worker.broker.layout import Layout
from worker.broker.scripts import ADOPTABLE
from worker.broker.transport import LEASE_S, OLD_UNACKED, OLD_UNACKED_INDEX

if TYPE_CHECKING:
    from redis import Redis

#: How many entries, of whatever application, are looked at in one step.
AT_ONCE: Final = 1000


class Adoption:
    """Finds what may be restored. A worker of an earlier version renews at every quarter of its lease.

    lease_s: seconds, > 0: this worker's lease. Workers of earlier versions had the same, or the default.
    """

    def __init__(self, layout: Layout, lease_s: float) -> None:
        self.layout = replace(
            layout, unacked=layout.prefix + OLD_UNACKED, index=layout.prefix + OLD_UNACKED_INDEX
        )
        self._lease_s = max(lease_s, LEASE_S)
        self._looked_at: float | None = None
        self._not_before = 0.0
        self._skip = 0

    def due(self, client: Redis) -> list[tuple[bytes, bytes, bytes]]:
        """Tag, score and entry of messages of ours whose lease ran out. Looks four times a lease.

        After an outage of Redis, nothing for half a lease, so that all can renew first.
        """
        now, every_s = monotonic(), self._lease_s / 4
        if self._looked_at is not None and now - self._looked_at < every_s:
            return []
        keys = [self.layout.index, self.layout.unacked]
        found = client.register_script(ADOPTABLE)(keys=keys, args=[str(self._lease_s), AT_ONCE, self._skip])
        if self._looked_at is not None and now - self._looked_at > 2 * every_s:
            self._not_before = now + 2 * every_s
        self._looked_at = now
        seen, *due = found
        self._skip = self._skip + AT_ONCE - len(due) if seen == AT_ONCE else 0
        return due if now >= self._not_before else []
