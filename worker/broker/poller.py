"""kombu's poller of connections, with the transport's fetch in the place of BRPOP."""

# mypy: disallow-untyped-calls=False
# kombu says that it is typed, but most of its functions are not.

from __future__ import annotations

from typing import Any, Final

from kombu.transport import redis as stock

#: Seconds until empty lists are checked again, in case a change went unnoticed, or the connection is dead.
#: Also the pause after a fetch that Redis refused.
CHECK_AGAIN_S: Final = 1.0


class Poller(stock.MultiChannelPoller):
    """kombu's poller, with the fetch in the place of BRPOP."""

    def _register(self, channel: Any, client: Any, type: str) -> None:  # noqa: A002 -- kombu's name
        super()._register(channel, client, type)
        if type == "BRPOP":
            channel.track()

    def _register_BRPOP(self, channel: Any) -> None:  # noqa: N802 -- kombu's name
        super()._register_BRPOP(channel)
        channel.fetch_if_due()

    def get(self, callback: Any, timeout: float | None = None) -> Any:
        """Wait for one event, but no longer than until empty lists are due to be checked again."""
        return super().get(callback, CHECK_AGAIN_S if timeout is None else min(timeout, CHECK_AGAIN_S))
