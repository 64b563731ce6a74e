"""Which queue a server's runs are of, and their folder within that of `SMALLCAT_HTTP_DATA_DIR`.

    DATA/queue-NAME/RUN    a run of that queue: see `run_store`
    DATA/RUN               a run of an earlier version, whose servers shared DATA whatever their queues were

A run stays with the queue that it was accepted for. That queue's name is in its Redis, and so goes with the
data: to another address, to a replica, into a backup. The bucket is no part of it: it may be moved while runs
go on.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from producer.http import run_folder
from worker.state.keys import HTTP_QUEUE, run_key

if TYPE_CHECKING:
    from redis.client import Redis

logger = logging.getLogger("smallcat.http")


def name_of(redis: Redis) -> str:
    """The name of the queue: 16 hexadecimal digits, drawn when it is asked for first."""
    if (known := redis.get(HTTP_QUEUE)) is None:
        redis.set(HTTP_QUEUE, secrets.token_hex(8), nx=True)
        known = redis.get(HTTP_QUEUE)
    return str(known)


def folder_of(data: Path, queue: str) -> Path:
    """The folder of a queue's runs. Where it is new beside others, the log says how to move theirs to it."""
    folder = data / f"{run_folder.QUEUE}{queue}"
    if not folder.exists() and (others := sorted(filter(run_folder.is_queue, data.iterdir()))):
        logger.warning(
            "%s has runs of other queues, which this server leaves alone: it has begun %s. If its Redis was "
            "emptied, or restored from a backup of before, stop it and move them there, such as those in %s.",
            *(data, folder.name, others[0].name),
        )
    return folder


class EarlierRuns:
    """The runs of earlier versions in a folder for runs: one queue takes over what is its own."""

    def __init__(self, data: Path, folder: Path, ttl_s: float, knows: Callable[[str], bool]) -> None:
        """`folder`: the queue's; `knows`: whether its Redis knows a run."""
        self._data, self._folder, self._ttl_s, self._knows = data, folder, ttl_s, knows
        self._has_warned = False

    def take_over(self) -> list[str]:
        """Move this queue's runs into its folder. Returns their names. Raises what `knows` raises.

        Those are the runs that its Redis knows. Of a run that nobody has begun no Redis knows: the first
        server has it. One that a server of an earlier version feeds is taken over when that has ended.
        """
        taken, left = list[str](), list[str]()
        run_folder.delete_broken_uploads(self._data)
        for run in run_folder.lasting(self._data, self._ttl_s):
            if run_folder.has_begun(run) and not self._knows(run.name):
                left.append(run.name)
                continue
            with run_folder.locked(run / "lock") as is_mine:
                if is_mine:
                    # It is there already where its file was uploaded again meanwhile.
                    with contextlib.suppress(OSError):
                        run.rename(self._folder / run.name)
                        taken.append(run.name)
        if left and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%d runs of an earlier version in %s, such as %s, are unknown to this server's Redis, and so "
                "another queue's: a server of that queue takes them over. If its Redis was emptied, stop the "
                "server and move them into %s.",
                *(len(left), self._data, left[0], self._folder.name),
            )
        return taken


def knows(redis: Redis, run: str) -> bool:
    """Whether Redis knows a run, one that was forgotten included."""
    return bool(redis.hgetall(run_key(run)))
