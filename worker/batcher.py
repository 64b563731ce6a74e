"""Which jobs run together: pure decisions, with the clock passed in. No torch, no threads, no I/O.

Words. A **lane** is a set of jobs that may share a step (equal latent shape). A job that has a place in
its lane is **seated**: it stays seated until it is finished or removed. A lane has as many seats as its
**cap** has rows; a guided job takes two rows, one without guidance takes one.

Rules.
1. Seats go to the waiting job of the highest rank: its priority, plus one for every `AGEING_S` seconds it
   has waited; among equals, the first come. So order within a priority is kept, and everybody's turn comes.
2. The job next in rank is never passed over by a smaller one: if its rows do not fit, the seat stays free
   for the moment until they do. At most one row of a cap is unused this way.
3. Lanes take turns by stride scheduling (Waldspurger and Weihl, 1995): each lane has a pass; the lane with
   the lowest one runs a step, and its pass grows by the rows it ran over its weight, which doubles with
   each two ranks, up to the highest priority's. The pass of all grows with every step by its rows over the
   weight of all lanes: there a new lane starts, neither catching up nor ahead of those who wait. So no lane
   waits for another one to become empty, whatever arrives.
4. A lane's cap falls by half when its batch did not fit in memory, for good. Those who lose their seat
   keep their place in line and all their progress.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from worker.job import MAX_PRIORITY

#: Seconds of waiting that count as one step of priority.
AGEING_S = 10.0

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class _Place(Generic[T]):
    """A job in a lane, waiting or seated."""

    item: T
    rows: int
    priority: int
    arrived_s: float
    #: Number in order of arrival: settles what the clock cannot.
    number: int

    def rank(self, now_s: float) -> tuple[float, int]:
        """Higher is sooner."""
        return self.priority + max(0.0, now_s - self.arrived_s) / AGEING_S, -self.number


@dataclass
class _Lane(Generic[T]):
    cap: int
    pass_: float
    waiting: dict[T, _Place[T]] = field(default_factory=dict)
    seated: dict[T, _Place[T]] = field(default_factory=dict)

    def fill(self, now_s: float) -> None:
        """Give free seats to those waiting, by rank."""
        free = self.cap - sum(place.rows for place in self.seated.values())
        while self.waiting and free > 0:
            first = max(self.waiting.values(), key=lambda place: place.rank(now_s))
            # A job of more rows than the whole cap runs alone: whether it fits is for the device to say.
            if first.rows > free and self.seated:
                return
            self.seated[first.item] = self.waiting.pop(first.item)
            free -= first.rows

    def weight(self, now_s: float) -> float:
        """How large its share of the steps is. Bounded, or the oldest lane would in the end run alone."""
        highest = max(place.rank(now_s)[0] for place in self.seated.values())
        return float(2.0 ** (min(highest, MAX_PRIORITY) / 2))


class Batcher(Generic[T]):
    """Decides which jobs share the next step. Not thread-safe: the engine's thread owns it.

    `first_cap` gives each lane's cap to begin with, >= 1, in rows of a UNet forward.
    """

    def __init__(self, first_cap: Callable[[Hashable], int]) -> None:
        self._first_cap = first_cap
        #: Caps that were lowered outlive their lane.
        self._caps: dict[Hashable, int] = {}
        self._lanes: dict[Hashable, _Lane[T]] = {}
        self._lane_of: dict[T, Hashable] = {}
        self._arrivals = 0
        #: The pass of all: where a lane starts that was idle.
        self._pass = 0.0

    def __len__(self) -> int:
        """Jobs in all lanes, waiting and seated."""
        return len(self._lane_of)

    def add(self, item: T, *, lane: Hashable, rows: int, priority: int, now_s: float) -> None:
        """Let `item` wait in `lane` for a seat. It must not be in any lane yet."""
        if item in self._lane_of:
            raise ValueError(f"{item!r} is on board already.")
        self._arrivals += 1
        if lane not in self._lanes:
            self._lanes[lane] = _Lane(cap=self.cap(lane), pass_=self._pass)
        self._lanes[lane].waiting[item] = _Place(item, rows, priority, now_s, self._arrivals)
        self._lane_of[item] = lane

    def remove(self, item: T) -> None:
        """Let `item` go, finished or not. Its seat is free for the next batch."""
        name = self._lane_of.pop(item)
        lane = self._lanes[name]
        lane.waiting.pop(item, None)
        lane.seated.pop(item, None)
        if not lane.waiting and not lane.seated:
            del self._lanes[name]

    def next_batch(self, now_s: float) -> list[T]:
        """The jobs to run one step of, all of one lane, in the order they were seated; empty when idle."""
        if not self._lanes:
            return []
        for lane in self._lanes.values():
            lane.fill(now_s)
        turn = min(self._lanes.values(), key=lambda lane: lane.pass_)
        rows = sum(place.rows for place in turn.seated.values())
        turn.pass_ += rows / turn.weight(now_s)
        self._pass += rows / sum(lane.weight(now_s) for lane in self._lanes.values())
        return list(turn.seated)

    def cap(self, lane: Hashable) -> int:
        """Rows of a step in `lane`, at most."""
        return self._caps[lane] if lane in self._caps else self._first_cap(lane)

    def lower_cap(self, lane: Hashable, rows: int) -> None:
        """Remember that `rows` rows do not fit in `lane`: half of them from now on, at least one.

        Those seated last lose their seat until one is free again.
        """
        self._caps[lane] = max(1, min(self.cap(lane), rows // 2))
        here = self._lanes.get(lane)
        if here is None:
            return
        here.cap = self._caps[lane]
        while len(here.seated) > 1 and sum(place.rows for place in here.seated.values()) > here.cap:
            item, place = here.seated.popitem()
            here.waiting[item] = place
