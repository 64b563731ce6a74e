"""The commands that take a held message where `worker.broker.moves` says."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from worker.broker.layout import Layout
from worker.broker.moves import LAST, Move, Parked, Recorded, SetAside, Unsent, Wait
from worker.broker.scripts import ACKNOWLEDGE, MOVE, POSTPONE, SET_ASIDE
from worker.broker.transport import UNDECODABLE_MAX, UNDECODABLE_TTL_S, unreadable
from worker.contract.refusals import code_of

logger = logging.getLogger("smallcat.transport")


def tell(move: Unsent) -> None:
    """Before a message is set aside: it is not gone while its job's record says that it is queued.

    Raises the error of a Redis that is away or refuses. Any other one is of this message alone: the process'
    other messages do not wait for it.
    """
    if not isinstance(move, SetAside):
        return
    try:
        unreadable(move.raw, move.reason, move.is_poison)
    except Exception as error:
        if code_of(error) is not None or _is_of_the_connection(error):
            raise
        logger.exception("The job of a message that is set aside could not be marked as failed")


def _is_of_the_connection(error: Exception) -> bool:
    # By name: Redis' client is not imported here.
    names = {kind.__name__ for kind in type(error).__mro__}
    return not names.isdisjoint({"ConnectionError", "TimeoutError", "OSError"})


def send_move(
    pipeline: Any, layout: Layout, tag: str | bytes, score: str | bytes, move: Move | SetAside | Parked
) -> None:
    """Queue the commands of a move of the message `tag`, if it still has that `score`, or whatever it has."""
    held = (layout.index, layout.unacked)
    match move:
        case Move():
            keys = [*held, *move.keys]
            pipeline.eval(MOVE, len(keys), *keys, tag, score, move.push, move.message)
        case SetAside():
            limits = (UNDECODABLE_TTL_S, UNDECODABLE_MAX)
            pipeline.eval(SET_ASIDE, 3, *held, layout.undecodable, tag, score, move.entry, *limits)
        case Parked():
            pipeline.sadd(layout.parked, move.key)
            pipeline.eval(MOVE, 3, *held, move.key, tag, score, LAST, move.message)


def send_recorded(pipeline: Any, layout: Layout, recorded: Mapping[str, Recorded]) -> None:
    """Queue the command that acknowledges messages by their jobs' records; its answer are the other tags."""
    keys = [layout.index, layout.unacked, *(key for each in recorded.values() for key in each.records)]
    words = [word for tag, each in recorded.items() for word in (tag, *each.holder)]
    pipeline.eval(ACKNOWLEDGE, len(keys), *keys, *words)


def send_wait(pipeline: Any, layout: Layout, tag: str, wait: Wait, lease_s: float) -> None:
    """Queue the command that lets the message `tag` wait; `lease_s` is the lease of who restores it."""
    held = (layout.index, layout.unacked)
    pipeline.eval(POSTPONE, 2, *held, tag, str(wait.delay_s - lease_s), wait.entry)
