"""Where a held message goes when it is given back, restored or set aside: decisions, without Redis."""

# mypy: disallow-untyped-calls=False
# kombu says that it is typed, but most of its functions are not.

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kombu.utils.json import dumps, loads

from worker.broker.layout import Layout
from worker.contract.queues import SEPARATOR

logger = logging.getLogger("smallcat.transport")

#: The end of a list at which a message is fetched after all others of its priority, and next.
LAST: Final = "LPUSH"
NEXT: Final = "RPUSH"

_UNREADABLE: Final = "A message that was held cannot be read and is set aside"


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


def restored(layout: Layout, entry: bytes | None, bindings: Callable[[str], Iterable[bytes]]) -> Move:
    """The move of a message whose lease ran out, by its entry in the hash of held messages.

    `bindings` returns the bindings of an exchange; what it raises is raised.
    """
    if entry is None:
        # Only the index still has the message: kombu's own workers acknowledge in two steps.
        return Move([], b"", NEXT)
    try:
        payload, exchange, routing_key = loads(entry)
        priority, message = payload["properties"].get("priority"), _redelivered(payload)
    except Exception:
        logger.exception(_UNREADABLE)
        return set_aside(layout, entry)
    bound = bindings(exchange) if exchange else ()
    try:
        queues = _queues_of(bound, routing_key) if exchange else [routing_key]
        keys = [layout.list_of(queue, priority) for queue in queues]
    except Exception:
        logger.exception(_UNREADABLE)
        return set_aside(layout, entry)
    return Move(keys or [layout.undecodable], message, NEXT)


def _queues_of(bindings: Iterable[bytes], routing_key: str) -> list[str]:
    """Where kombu's own transport, which keeps the exchange in its entries, would put the message."""
    queues = []
    for binding in bindings:
        key, pattern, queue = binding.decode().split(SEPARATOR)
        if key == routing_key or (pattern and re.match(pattern, routing_key)):
            queues.append(queue)
    return queues


def _redelivered(payload: Any) -> str:
    """The message with the marks by which a task knows that it may have run before, as kombu sets them."""
    for marks in (payload.get("headers"), payload["properties"].get("delivery_info")):
        if isinstance(marks, dict):
            marks["redelivered"] = True
    return str(dumps(payload))
