"""Messages of newer versions, which wait in lists of their own for workers that read them.

An older worker that finds such a message moves it there (`worker.broker.moves`); a worker that reads it looks
there first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.contract.queues import PARKED, queue_of_list, version_of_parked
from worker.contract.refusals import code_of

if TYPE_CHECKING:
    from redis.client import Redis


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
