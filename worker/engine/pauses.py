"""The longest pause between two steps while a worker changes over to compiled ones. No torch.

Code is compiled and loaded beside the steps of jobs, and then takes their place between two of them. Both
should hold no job up. What a pause is: by how much the time from the end of a step to that of the next is
longer than it usually is for such a step.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from worker.engine.ticket import Ticket

logger = logging.getLogger("smallcat.engine")

#: Seconds before and after the first compiled step that count, and turns that are remembered, at most.
AROUND_S: Final = 15.0
MOST_TURNS: Final = 4_096
#: Turns of a kind from which its usual time is known.
_ENOUGH: Final = 3


@dataclass(frozen=True)
class _Turn:
    ended_s: float
    #: Seconds from the end of the turn before it.
    seconds: float
    lane: Hashable
    rows: int
    is_compiled: bool


class Pauses:
    """Notes each turn of the engine's loop. For its thread alone. `clock` returns monotonic seconds.

    `is_compiled` says whether the last step was. `on_change` is called with the longest pause in seconds,
    once for each lane that has changed over, `AROUND_S` after it has.
    """

    def __init__(
        self,
        is_compiled: Callable[[], bool],
        on_change: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_compiled, self._on_change, self._clock = is_compiled, on_change, clock
        self._turns: deque[_Turn] = deque(maxlen=MOST_TURNS)
        #: When the last turn ended; None: there was nothing to do after it.
        self._ended_s: float | None = None
        #: Lanes that have had uncompiled steps, and when those that have changed over did.
        self._plain: set[Hashable] = set()
        self._changed_s: dict[Hashable, float] = {}

    def turn(self, batch: Sequence[Ticket[Any]], goes_on: bool) -> None:
        """A turn has ended, with a step of this batch. `goes_on`: the next one follows at once."""
        now_s, is_compiled = self._clock(), self._is_compiled()
        states = [ticket.state for ticket in batch if ticket.state is not None]
        lane, rows = states[0].lane, sum(state.rows for state in states)
        if self._ended_s is not None:
            self._turns.append(_Turn(now_s, now_s - self._ended_s, lane, rows, is_compiled))
        self._ended_s = now_s if goes_on else None
        if not is_compiled:
            self._plain.add(lane)
        elif lane in self._plain:
            self._plain.remove(lane)
            self._changed_s[lane] = now_s
        if self._changed_s:
            self._report(now_s)

    def _report(self, now_s: float) -> None:
        for lane, changed_s in list(self._changed_s.items()):
            if now_s - changed_s > AROUND_S:
                del self._changed_s[lane]
                pause_s = self._longest(changed_s)
                shape = "x".join(map(str, lane)) if isinstance(lane, tuple) else lane
                text = "Steps of %s run compiled now; the longest pause at the change was %.0f ms."
                logger.info(text, shape, 1e3 * pause_s)
                self._on_change(pause_s)

    def _longest(self, changed_s: float) -> float:
        """The longest pause within `AROUND_S` of a moment."""
        turns = [turn for turn in self._turns if abs(turn.ended_s - changed_s) <= AROUND_S]
        known: dict[tuple[Hashable, ...], list[float]] = defaultdict(list)
        for turn in turns:
            for kind in _kinds(turn):
                known[kind].append(turn.seconds)
        usual = {kind: statistics.median(all_) for kind, all_ in known.items() if len(all_) >= _ENOUGH}
        return max((turn.seconds - _usual(turn, usual) for turn in turns), default=0.0)


def _kinds(turn: _Turn) -> tuple[tuple[Hashable, ...], ...]:
    """What a turn is one of, the narrowest first."""
    return (turn.lane, turn.rows, turn.is_compiled), (turn.lane, turn.rows), (turn.lane,), ()


def _usual(turn: _Turn, usual: dict[tuple[Hashable, ...], float]) -> float:
    """Seconds of such a turn; its own where too few are known."""
    return next((usual[kind] for kind in _kinds(turn) if kind in usual), turn.seconds)
