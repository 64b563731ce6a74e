"""What a job's steps were like, for whoever asks: noted at each step, in a fixed amount of memory."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final

#: Mates that are remembered, at most.
MOST_MATES: Final = 32


@dataclass(eq=False)
class StepWatch:
    """The steps of one job. Times are seconds by the engine's clock."""

    #: By which the watches of its mates remember it.
    name: Hashable
    #: When its first step began, and its last one ended; None: it has had none.
    began_s: float | None = None
    ended_s: float = 0.0
    #: Steps that it has had; the model may be evaluated more often than the job says.
    steps: int = 0
    #: Rows of all of them, those of its mates included.
    rows: int = 0
    #: Seconds of all of them.
    in_steps_s: float = 0.0
    #: The first `MOST_MATES` that were in a step with it and are watched, too, by name.
    mates: dict[Hashable, None] = field(default_factory=dict)
    _last: Sequence[Hashable] = ()

    def stepped(self, began_s: float, ended_s: float, rows: int, names: Sequence[Hashable]) -> None:
        """Note a step of so many rows; `names`: of all watches in it, this one included."""
        if self.began_s is None:
            self.began_s = began_s
        self.ended_s = ended_s
        self.steps += 1
        self.rows += rows
        self.in_steps_s += ended_s - began_s
        # Most batches are as the one before, and that is seen without looking into the names.
        if len(self.mates) < MOST_MATES and names != self._last:
            self._last = names
            for name in names:
                if name != self.name and len(self.mates) < MOST_MATES:
                    self.mates[name] = None
