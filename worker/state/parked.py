"""Messages of newer versions, which wait in lists of their own for workers that read them.

An older worker that finds such a message moves it there (`worker.broker.moves`); a worker that reads it looks
there first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from worker.contract.found_message import FoundMessage
from worker.contract.queues import PARKED, queue_of_list, version_of_parked
from worker.contract.refusals import code_of

if TYPE_CHECKING:
    from redis.client import Redis

    from worker.state.records import Records

#: Messages that are read in one round trip.
CHUNK: Final = 200


class ParkedMessage(NamedTuple):
    """A message of a newer version. What it says of itself may be forged."""

    #: The id of its job; empty where it says none.
    job: str
    #: The queue that it is for.
    queue: str
    #: Its version.
    version: int
    #: What its sender shows of it: the prompt's beginning and the seed; empty where it says nothing.
    shown: str
    #: The list that it waits in, and the message as it was found.
    list: str
    raw: bytes

    def shown_as(self) -> dict[str, Any]:
        """It as JSON, without the message."""
        return {"id": self.job, "queue": self.queue, "version": self.version, "shown": self.shown}


def parked_lists(client: Redis) -> dict[str, int]:
    """The lists with such messages, and how many each has.

    Empty where this user may not read which they are: the ACL of an earlier version does not name that key.
    """
    try:
        names = sorted(str(name) for name in client.smembers(PARKED))
    except Exception as error:
        if code_of(error) != "NOPERM":
            raise
        return {}
    if not (names := [name for name in names if version_of_parked(name)]):
        return {}
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.llen(name)
        return {name: count for name, count in zip(names, pipe.execute(), strict=True) if count}


def parked(client: Redis) -> dict[tuple[str, int], int]:
    """How many such messages wait, by queue and version."""
    found: dict[tuple[str, int], int] = {}
    for name, count in parked_lists(client).items():
        key = queue_of_list(name), version_of_parked(name)
        found[key] = found.get(key, 0) + count
    return found


def parked_messages(client: Redis) -> Iterator[ParkedMessage]:
    """Each such message, by list, the oldest of a list first; read all of them before one is dropped."""
    for name in parked_lists(client):
        version, queue = version_of_parked(name), queue_of_list(name)
        # Counted from the end that is fetched next: others come at the other one.
        seen = 0
        while found := _range(client, name, -seen - CHUNK, -seen - 1):
            for raw in reversed(found):
                job = FoundMessage.read(raw).id[:32]
                yield ParkedMessage(job, queue, version, _shown(raw), name, raw)
            seen += len(found)


def drop_parked(client: Redis, records: Records, message: ParkedMessage) -> bool:
    """Delete one, and let its job fail, or its place in a run. False: it was taken before.

    A worker that takes it meanwhile does the job all the same.
    """
    records.set_aside(
        message.raw, f"it is of version {message.version} and was dropped before a worker came that reads it"
    )
    # From the end where it was found.
    return bool(client.lrem(message.list, -1, message.raw))  # type: ignore[arg-type]


def _range(client: Redis, name: str, first: int, last: int) -> list[bytes]:
    found: Any = client.execute_command("LRANGE", name, first, last, NEVER_DECODE=True)  # type: ignore[no-untyped-call]
    return list(found)


def _shown(raw: bytes) -> str:
    try:
        return str(json.loads(raw)["headers"]["argsrepr"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
