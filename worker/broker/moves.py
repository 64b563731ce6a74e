"""Where a held message goes when it is given back, restored or set aside: decisions, without Redis."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from worker.broker.layout import Layout
from worker.contract.job import MAX_PRIORITY
from worker.contract.queues import parked_list_of

logger = logging.getLogger("smallcat.transport")

#: The end of a list at which a message is fetched after all others of its priority, and next.
LAST: Final = "LPUSH"
NEXT: Final = "RPUSH"

#: Bytes that are kept of a message that is set aside; of the reason, characters.
KEPT_BYTES: Final = 16_384
_REASON_LENGTH: Final = 400


@dataclass(frozen=True)
class Move:
    """A held message that goes into lists; into none: it is only no longer held."""

    #: The lists.
    keys: Sequence[str]
    message: bytes | str
    #: `LAST` or `NEXT`.
    push: str


@dataclass(frozen=True)
class SetAside:
    """A held message that no worker can read goes where a person sees it."""

    #: The entry: what is known of it as JSON, a line's end, and the message, cut at `KEPT_BYTES`.
    entry: bytes
    #: Why, in words.
    reason: str
    #: The id that it says it has; empty: none that can be read.
    id: str = ""


@dataclass(frozen=True)
class Parked:
    """A held message of a newer version goes, as it is, to where workers that read it look."""

    key: str
    message: bytes


def given_back(layout: Layout, raw: bytes | str, queue: str, push: str) -> Move | SetAside:
    """The move of the message `raw` back into `queue`, which it was fetched from."""
    try:
        payload = json.loads(raw)
        message = _redelivered(payload)
        return Move([layout.list_of(queue, payload["properties"].get("priority"))], message, push)
    except Exception:
        logger.exception("A message of queue %r cannot be read and is set aside", queue)
        return set_aside(raw, "it is not JSON with a priority", queue)


def set_aside(raw: bytes | str, reason: str, queue: str = "", message_id: str = "") -> SetAside:
    """The move of a message that no worker can read to where a person sees it."""
    found = raw.encode(errors="replace") if isinstance(raw, str) else raw
    head = {
        "at": round(time.time(), 3),
        "queue": queue,
        "reason": reason[:_REASON_LENGTH],
        "bytes": len(found),
    }
    entry = json.dumps(head).encode() + b"\n" + found[:KEPT_BYTES]
    return SetAside(entry, reason, message_id)


def parked(layout: Layout, raw: bytes, queue: str, version: int) -> Parked:
    """The move of a message of a newer version."""
    try:
        priority = max(0, min(int(json.loads(raw)["properties"]["priority"]), MAX_PRIORITY))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        priority = 0
    return Parked(layout.prefix + parked_list_of(queue, priority, version), raw)


def restored(layout: Layout, entry: bytes | None) -> Move | SetAside:
    """The move of a message whose lease ran out, by its entry in the hash of held messages."""
    if entry is None:
        # Only the index still has the message.
        return Move([], b"", NEXT)
    try:
        payload, exchange, queue = json.loads(entry)
        if exchange:
            raise ValueError(f"its exchange is {exchange!r}, and this transport keeps none")
        key = layout.list_of(queue, payload["properties"].get("priority"))
        return Move([key], _redelivered(payload), NEXT)
    except Exception:
        logger.exception("A message that was held cannot be read and is set aside")
        return set_aside(entry, "it was held and cannot be read")


def _redelivered(payload: Any) -> str:
    """The message with the marks by which a task knows that it may have run before, as kombu sets them."""
    for marks in (payload.get("headers"), payload["properties"].get("delivery_info")):
        if isinstance(marks, dict):
            marks["redelivered"] = True
    return json.dumps(payload)
