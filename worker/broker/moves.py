"""Where a held message goes when it is given back, restored or set aside: decisions, without Redis."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from worker.broker.layout import Layout
from worker.contract.job_parameters import MAX_PRIORITY
from worker.contract.message import RETURNS, WAITS, tenant_in
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
    #: The message as it was found.
    raw: bytes = b""
    #: Whether it can be read, and came back too often without an outcome.
    is_poison: bool = False


@dataclass(frozen=True)
class Recorded:
    """A held message for which nothing is left to do, if its job's record says so: see `acknowledge.lua`."""

    #: Keys of the record, and of the job's attempts.
    records: tuple[str, str]
    #: The message's id, and who it is as the job's holder.
    holder: tuple[str, str]
    #: The message as it was found, and its queue.
    raw: bytes
    queue: str


@dataclass(frozen=True)
class Parked:
    """A held message of a newer version goes, as it is, to where workers that read it look."""

    key: str
    message: bytes


@dataclass(frozen=True)
class Wait:
    """A held message comes back after a while: as one whose lease ran out."""

    delay_s: float
    #: What is registered of it meanwhile; empty: what was before, so that its coming back counts.
    entry: str


#: What is to be done with a message that is no longer held: None is an acknowledgement.
Unsent = Move | SetAside | Parked | Wait | Recorded | None


def given_back(
    layout: Layout, raw: bytes | str, queue: str, push: str, *, counts: bool = False, limit: int = 0
) -> Move | SetAside:
    """The move of the message `raw` back into `queue`, which it was fetched from.

    `counts`: nobody chose that it comes back. Then it is set aside after `limit` times.
    """
    try:
        payload = json.loads(raw)
        if counts and (poison := _counted(payload, limit)):
            return set_aside(raw, poison, queue, is_poison=True)
        message = _redelivered(payload)
        priority = payload["properties"].get("priority")
        return Move([layout.list_of(queue, priority, tenant_in(payload))], message, push)
    except Exception:
        logger.exception("A message of queue %r cannot be read and is set aside", queue)
        return set_aside(raw, "it is not JSON with a priority", queue)


def set_aside(raw: bytes | str, reason: str, queue: str = "", *, is_poison: bool = False) -> SetAside:
    """The move of a message that no worker can read, or should, to where a person sees it."""
    found = raw.encode(errors="replace") if isinstance(raw, str) else raw
    head = {
        "at": round(time.time(), 3),
        "queue": queue,
        "reason": reason[:_REASON_LENGTH],
        "bytes": len(found),
    }
    entry = json.dumps(head).encode() + b"\n" + found[:KEPT_BYTES]
    return SetAside(entry, reason, found, is_poison)


def parked(layout: Layout, raw: bytes, queue: str, version: int) -> Parked:
    """The move of a message of a newer version."""
    try:
        priority = max(0, min(int(json.loads(raw)["properties"]["priority"]), MAX_PRIORITY))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        priority = 0
    return Parked(layout.prefix + parked_list_of(queue, priority, version), raw)


def waiting(raw: bytes, queue: str, delay_s: float, *, counts: bool) -> Wait:
    """Let the message `raw` of `queue` wait. Whoever restores it then counts that, or not."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        payload = json.loads(raw)
        payload["headers"][WAITS] = True
        return Wait(delay_s, "" if counts else json.dumps([payload, "", queue]))
    return Wait(delay_s, "")


def restored(layout: Layout, entry: bytes | None, limit: int) -> Move | SetAside:
    """The move of a message whose lease ran out, by its entry in the hash of held messages.

    Unless it was waiting, it is set aside after `limit` times.
    """
    if entry is None:
        # Only the index still has the message.
        return Move([], b"", NEXT)
    try:
        payload, exchange, queue = json.loads(entry)
        if exchange:
            raise ValueError(f"its exchange is {exchange!r}, and this transport keeps none")
        key = layout.list_of(queue, payload["properties"].get("priority"), tenant_in(payload))
        if poison := _counted(payload, limit):
            return set_aside(json.dumps(payload), poison, queue, is_poison=True)
        return Move([key], _redelivered(payload), NEXT)
    except Exception:
        logger.exception("A message that was held cannot be read and is set aside")
        return set_aside(entry, "it was held and cannot be read")


def _counted(payload: Any, limit: int) -> str:
    """Count in the message that it comes back, unless it was waiting. Returns why it must not, or nothing.

    The number stands in the message itself, which nobody can change while it is in a list or held: no other
    message can raise or lower it.
    """
    headers = payload.get("headers")
    if not isinstance(headers, dict) or headers.pop(WAITS, None) is True:
        return ""
    said = headers.get(RETURNS)
    returns = 1 + (said if type(said) is int and said > 0 else 0)
    headers[RETURNS] = returns
    if returns <= limit:
        return ""
    return f"it was fetched {returns} times, and each time its worker died or failed before it had the job"


def _redelivered(payload: Any) -> str:
    """The message with the marks by which a task knows that it may have run before, as kombu sets them."""
    for marks in (payload.get("headers"), payload["properties"].get("delivery_info")):
        if isinstance(marks, dict):
            marks["redelivered"] = True
    return json.dumps(payload)
