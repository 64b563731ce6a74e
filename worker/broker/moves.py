"""Where a held message goes when it is given back, restored or set aside: decisions, without Redis."""

# mypy: disallow-untyped-calls=False
# kombu says that it is typed, but most of its functions are not.

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from kombu.utils.json import dumps, loads

from worker.broker.layout import Layout

logger = logging.getLogger("smallcat.transport")

#: The end of a list at which a message is fetched after all others of its priority, and next.
LAST: Final = "LPUSH"
NEXT: Final = "RPUSH"


@dataclass(frozen=True)
class Move:
    """A held message that goes into lists; into none: it is only no longer held."""

    #: The lists.
    keys: Sequence[str]
    message: bytes | str
    #: `LAST` or `NEXT`.
    push: str


def given_back(layout: Layout, raw: bytes | str, queue: str, push: str) -> Move:
    """The move of the message `raw` back into `queue`, which it was fetched from."""
    try:
        payload = loads(raw)
        message = _redelivered(payload)
        return Move([layout.list_of(queue, payload["properties"].get("priority"))], message, push)
    except Exception:
        logger.exception("A message of queue %r cannot be read and is set aside", queue)
        return set_aside(layout, raw)


def set_aside(layout: Layout, raw: bytes | str) -> Move:
    """The move of a message that no worker can read to where a person sees it."""
    return Move([layout.undecodable], raw, LAST)


def restored(layout: Layout, entry: bytes | None) -> Move:
    """The move of a message whose lease ran out, by its entry in the hash of held messages."""
    if entry is None:
        # Only the index still has the message.
        return Move([], b"", NEXT)
    try:
        payload, exchange, queue = loads(entry)
        if exchange:
            raise ValueError(f"its exchange is {exchange!r}, and this transport keeps none")
        key = layout.list_of(queue, payload["properties"].get("priority"))
        return Move([key], _redelivered(payload), NEXT)
    except Exception:
        logger.exception("A message that was held cannot be read and is set aside")
        return set_aside(layout, entry)


def _redelivered(payload: Any) -> str:
    """The message with the marks by which a task knows that it may have run before, as kombu sets them."""
    for marks in (payload.get("headers"), payload["properties"].get("delivery_info")):
        if isinstance(marks, dict):
            marks["redelivered"] = True
    return str(dumps(payload))
