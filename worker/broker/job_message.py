"""A message of a job as Celery takes it, and what is logged of those that are none."""

# mypy: disallow-untyped-calls=False
# kombu says that it is typed, but most of its functions are not.

from __future__ import annotations

import logging
from typing import Any, Final

from kombu.transport.virtual import base
from kombu.utils.json import loads

from worker.broker.layout import Layout
from worker.broker.malformed import CheckedMessage, check
from worker.contract.errors import NewerMessageError

logger = logging.getLogger("smallcat.transport")

#: What kombu and Celery raise on reading a malformed message. Any other error of a callback is the worker's.
MALFORMED: Final = (AttributeError, KeyError, TypeError, ValueError, RecursionError)
#: Why the fetch sets a message aside by itself; its script says it, too.
UNREGISTERED: Final = "it is not JSON with a delivery tag, or it is too long"

_told: set[int] = set()


class JobMessage(base.Message):
    """A message whose body is decoded: Celery takes it as it is."""

    def __init__(self, checked: CheckedMessage, queue: str, channel: Any) -> None:
        checked.properties["delivery_info"]["routing_key"] = queue
        super().__init__({"headers": checked.headers, "properties": checked.properties}, channel=channel)
        self.body = self._decoded_cache = checked.body


def read_message(raw: bytes, queue: str, tag: str, channel: Any) -> Any:
    """The message `raw`, registered under `tag`, for the consumers of `queue`. Raises as `check`.

    What need not be acknowledged has no tag: answers to `celery inspect`, which are read as kombu reads them.
    """
    if not tag:
        return channel.Message(loads(raw), channel=channel)
    return JobMessage(check(raw, tag), queue, channel)


def log_set_aside(queue: str, layout: Layout, reason: object) -> None:
    """Log that a message cannot be read. `reason` may quote it, and is escaped."""
    text = ascii(str(reason))[1:-1]
    logger.error(
        "A message in queue %r cannot be read and is set aside in %r: %.200s",
        queue, layout.undecodable, text,
    )  # fmt: skip


def log_parked(layout: Layout, error: NewerMessageError) -> None:
    """Log, once a version, that messages of it wait for other workers."""
    if error.version not in _told:
        _told.add(error.version)
        logger.error("%s Such messages wait in the lists that %r names.", error, layout.parked)
