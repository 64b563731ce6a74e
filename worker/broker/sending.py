"""The commands that take a held message where `worker.broker.moves` says."""

from __future__ import annotations

from typing import Any

from worker.broker.layout import Layout
from worker.broker.moves import LAST, Move, Parked, SetAside, Unsent, Wait
from worker.broker.scripts import MOVE, POSTPONE, SET_ASIDE
from worker.broker.transport import UNDECODABLE_MAX, UNDECODABLE_TTL_S, unreadable


def tell(move: Unsent) -> None:
    """Before a message is set aside: it is not gone while its job's record says that it is queued."""
    if isinstance(move, SetAside):
        unreadable(move.raw, move.reason, move.is_poison)


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


def send_wait(pipeline: Any, layout: Layout, tag: str, wait: Wait, lease_s: float) -> None:
    """Queue the command that lets the message `tag` wait; `lease_s` is the lease of who restores it."""
    held = (layout.index, layout.unacked)
    pipeline.eval(POSTPONE, 2, *held, tag, str(wait.delay_s - lease_s), wait.entry)
