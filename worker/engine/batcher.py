"""Which jobs run together: pure decisions, with the clock passed in. No torch, no threads, no I/O.

Words. A **lane** is a set of jobs that may share a step (equal latent shape). A job that has a place in
its lane is **seated**: it stays seated until it is finished, removed or outranked. A lane has as many seats
as its **cap** has rows; a guided job takes two rows, one without guidance takes one. A job's **rank** is its
priority, plus one for every `AGEING_S` seconds since it came. Of two jobs, one is **below** the other if its
priority is lower and its rank is lower by a whole one; since both age alike, that never changes.

Rules.
1. Seats go to the waiting job of the highest rank; among equals, the first come. So order within a priority
   is kept, and everybody's turn comes: whoever has waited long enough is below no newcomer.
2. The job next in rank is never passed over by a smaller one: if its rows do not fit, the seat stays free
   for the moment until they do. At most one row of a cap is unused this way.
3. A job that is waiting takes the seats of those below it, lowest first, if that makes room for it. They
   keep their place in line and all their progress.
4. A job is not slowed down by those below it: they take part in its steps only as far as these cost no more
   than `COMPANY` times what they cost without them. Where a batch is far from full, that is nearly free.
5. Lanes take turns by stride scheduling (Waldspurger and Weihl, 1995): each lane has a pass; the lane with
   the lowest one runs a step, and its pass grows by the step's cost over its weight, which doubles with
   each two ranks, up to the highest priority's. The pass of all grows with every step by its cost over the
   weight of all lanes: there a new lane starts, neither catching up nor ahead of those who wait. So no lane
   waits for another one to become empty, whatever arrives.
6. A lane's cap falls by half when its batch did not fit in memory, for good. Where seats are too few, then
   or because a job needs more rows than before, the lowest in rank lose theirs, and no progress.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from worker.contract.job import MAX_PRIORITY

#: Seconds of waiting that count as one step of priority.
AGEING_S = 30.0
#: How much more a step may cost for the sake of jobs below those whose step it is.
COMPANY = 1.3

T = TypeVar("T", bound=Hashable)


class Costs(Protocol):
    """What the device can take, and how long it takes. See `worker.engine.step_cost`."""

    def cap(self, lane: Hashable) -> int:
        """Rows worth having in one step of `lane`, >= 1: its cap to begin with."""

    def step_s(self, lane: Hashable, rows: int) -> float:
        """What a step of `rows` rows of `lane` costs, > 0, in seconds or any one unit."""


@dataclass
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

    def is_below(self, other: _Place[T]) -> bool:
        """Whether this job may be put off for the other's sake."""
        apart = self.priority - other.priority + (other.arrived_s - self.arrived_s) / AGEING_S
        return self.priority < other.priority and apart <= -1


@dataclass
class _Lane(Generic[T]):
    cap: int
    pass_: float
    waiting: dict[T, _Place[T]] = field(default_factory=dict)
    seated: dict[T, _Place[T]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Seats taken."""
        return sum(place.rows for place in self.seated.values())

    def fill(self, now_s: float) -> None:
        """Give seats to those waiting, by rank."""
        self.make_fit(now_s)
        while self.waiting:
            first = max(self.waiting.values(), key=lambda place: place.rank(now_s))
            if not self._seat(first, now_s):
                return

    def _seat(self, first: _Place[T], now_s: float) -> bool:
        """Give `first` a seat, if need be of those below it. False: there is none for it now."""
        below = [place for place in self._lowest_first(now_s) if place.is_below(first)]
        room = self.cap - self.rows + sum(place.rows for place in below)
        # A job of more rows than the whole cap runs alone: whether it fits is for the device to say.
        if first.rows > room and len(below) < len(self.seated):
            return False
        for place in below:
            if self.rows + first.rows <= self.cap:
                break
            self._unseat(place)
        self.seated[first.item] = self.waiting.pop(first.item)
        return True

    def make_fit(self, now_s: float) -> None:
        """Take seats back, from the lowest in rank, until the cap is kept or one job is left."""
        for place in self._lowest_first(now_s):
            if self.rows <= self.cap or len(self.seated) == 1:
                return
            self._unseat(place)

    def batch(self, costs: Costs, name: Hashable, now_s: float) -> list[_Place[T]]:
        """Those seated who take part in the next step."""
        seated = list(self.seated.values())
        if len({place.priority for place in seated}) == 1:
            return seated
        below = [place for place in seated if any(place.is_below(other) for other in seated)]
        chosen = [place for place in seated if place not in below]
        rows = sum(place.rows for place in chosen)
        limit = COMPANY * costs.step_s(name, rows)
        for place in sorted(below, key=lambda place: place.rank(now_s), reverse=True):
            rows += place.rows
            if costs.step_s(name, rows) > limit:
                break
            chosen.append(place)
        return chosen

    def weight(self, now_s: float) -> float:
        """How large its share of the time is. Bounded, or the oldest lane would in the end run alone."""
        highest = max(place.rank(now_s)[0] for place in self.seated.values())
        return float(2.0 ** (min(highest, MAX_PRIORITY) / 2))

    def _lowest_first(self, now_s: float) -> list[_Place[T]]:
        return sorted(self.seated.values(), key=lambda place: place.rank(now_s))

    def _unseat(self, place: _Place[T]) -> None:
        self.waiting[place.item] = self.seated.pop(place.item)


class Batcher(Generic[T]):
    """Decides which jobs share the next step. Not thread-safe: the engine's thread owns it."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
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

    def __iter__(self) -> Iterator[T]:
        """Jobs in all lanes, waiting and seated, in the order they came."""
        return iter(self._lane_of)

    def __contains__(self, item: T) -> bool:
        """Whether `item` is in a lane, waiting or seated."""
        return item in self._lane_of

    def add(self, item: T, *, lane: Hashable, rows: int, priority: int, now_s: float) -> None:
        """Let `item` wait in `lane` for a seat. It must not be in any lane yet."""
        if item in self._lane_of:
            raise ValueError(f"{item!r} is on board already.")
        self._arrivals += 1
        if lane not in self._lanes:
            self._lanes[lane] = _Lane(cap=self.cap(lane), pass_=self._pass)
        self._lanes[lane].waiting[item] = _Place(item, rows, priority, now_s, self._arrivals)
        self._lane_of[item] = lane

    def resize(self, item: T, rows: int) -> None:
        """Let `item` take `rows` rows from the next step on."""
        lane = self._lanes[self._lane_of[item]]
        (lane.seated.get(item) or lane.waiting[item]).rows = rows

    def remove(self, item: T) -> None:
        """Let `item` go, finished or not. Its seat is free for the next batch."""
        name = self._lane_of.pop(item)
        lane = self._lanes[name]
        lane.waiting.pop(item, None)
        lane.seated.pop(item, None)
        if not lane.waiting and not lane.seated:
            del self._lanes[name]

    def next_batch(self, now_s: float) -> list[T]:
        """The jobs to run one step of, all of one lane; empty when idle."""
        if not self._lanes:
            return []
        for lane in self._lanes.values():
            lane.fill(now_s)
        name, turn = min(self._lanes.items(), key=lambda named: named[1].pass_)
        batch = turn.batch(self._costs, name, now_s)
        cost = self._costs.step_s(name, sum(place.rows for place in batch))
        turn.pass_ += cost / turn.weight(now_s)
        self._pass += cost / sum(lane.weight(now_s) for lane in self._lanes.values())
        return [place.item for place in batch]

    def cap(self, lane: Hashable) -> int:
        """Rows of a step in `lane`, at most."""
        return self._caps[lane] if lane in self._caps else self._costs.cap(lane)

    def lower_cap(self, lane: Hashable, rows: int) -> None:
        """Remember that `rows` rows do not fit in `lane`: half of them from now on, at least one."""
        self._caps[lane] = max(1, min(self.cap(lane), rows // 2))
        if lane in self._lanes:
            self._lanes[lane].cap = self._caps[lane]
