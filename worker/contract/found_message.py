"""A message as it lies in a Redis list, whatever is wrong with it: what it says, and its fingerprint.

Whoever pushes into queues can write any id into a message. A message is recognised by its fingerprint: who
sends it notes that where workers find it (`worker/state/unreadable.lua`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import NamedTuple

from worker.contract.errors import SmallcatError
from worker.contract.job import Job
from worker.contract.message import AGAIN, RETURNS, WAITS, Message, payload_in, run_mark_in


def digest_of(text: bytes | str) -> str:
    """The fingerprint of a message that was written just now, in Python's own form of JSON."""
    data = text.encode(errors="replace") if isinstance(text, str) else text
    return hashlib.sha256(data).hexdigest()[:32]


def fingerprint(raw: bytes | str) -> str:
    """32 hexadecimal digits that only this very message has, as its producer sent it.

    What workers add to a message that comes back to its queue does not count.
    """
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, RecursionError):
        message = json.loads(raw)
        headers, properties = message["headers"], message["properties"]
        for marks in (headers, properties["delivery_info"]):
            marks.pop("redelivered", None)
        for name in (RETURNS, WAITS):
            headers.pop(name, None)
        properties["delivery_tag"] = properties["delivery_tag"].partition(AGAIN)[0]
        return digest_of(json.dumps(message))
    return digest_of(raw)


class FoundMessage(NamedTuple):
    """What a message says of itself. All of it may be forged."""

    #: Its id; empty where it has none that can be read.
    id: str
    #: The delivery tag under which a worker held it; likewise.
    tag: str
    #: Its run mark; likewise, or where its job belongs to no run.
    run: str
    #: Its job; None where this version cannot read it.
    job: Job | None

    @classmethod
    def read(cls, raw: bytes | str) -> FoundMessage:
        """What can be read in `raw`."""
        try:
            message = json.loads(raw)
        except (ValueError, RecursionError):
            message = None
        mark = run_mark_in(message)
        return cls(
            _text(message, "headers", "id"),
            _text(message, "properties", "delivery_tag"),
            "" if mark is None else mark.encode(),
            _job(message),
        )


def _text(message: object, part: str, name: str) -> str:
    try:
        found = message[part][name]  # type: ignore[index]
    except (KeyError, TypeError, IndexError):
        return ""
    return found if isinstance(found, str) else ""


def _job(message: object) -> Job | None:
    try:
        return Message.parse(payload_in(message)).job
    except SmallcatError:
        return None
