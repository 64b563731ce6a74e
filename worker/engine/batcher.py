"""Decides which jobs run together, step by step. The clock is passed in. No torch, no threads, no I/O.

Terms. A **lane** is a set of jobs that may share a step, since their latents have the same shape. A job in a
lane is **waiting** or **scheduled**; a scheduled job stays so until it is finished, removed or preempted. The
**cap** is the most rows that a lane's batch may have; a job takes a row for each of its prompts, and one more
if it is guided. A lane is **crowded** from when its jobs have `CROWD` times as many rows as a batch of least
time a row, until they no longer fill one. The longest text of a batch is part of its cost, since all its rows
attend to as much, and so are its rows with LoRAs. A job's **effective priority** is its priority plus one for
every `AGEING_S` seconds since it was added. A job **may preempt** another one if its priority is higher and
its effective priority is higher by at least one. Since
all jobs age at the same rate, that never changes for two given jobs.

Rules.
1. The waiting job of the highest effective priority is scheduled first; of equal ones, the earliest. So jobs
   of one priority keep their order. No job waits for ever: after some time no new job may preempt it.
2. No smaller job overtakes that job. If its rows do not fit yet, they stay free until it fits. So at most as
   many rows of a cap are unused as that job has, less one.
3. A waiting job preempts those that it may, the lowest effective priority first, if that makes enough room.
   A preempted job waits again, keeps its effective priority, and loses no step.
4. Jobs do not slow down one that may preempt them: they take part in its steps only while such a step costs
   at most `MAX_SLOWDOWN` times what it costs without them. A batch that is far from full has room for them.
5. Lanes take turns by stride scheduling (Waldspurger and Weihl, 1995). Each lane has a pass. The lane with
   the lowest pass runs a step, and its pass grows by the step's cost divided by the lane's weight. The weight
   doubles with every two points of the highest effective priority among the lane's scheduled jobs, up to
   `MAX_PRIORITY`. The global pass grows at each step by its cost divided by the weight of all lanes. A new
   lane starts there, neither ahead of the lanes that wait nor behind them. So no lane has to wait until
   another one is empty, whatever jobs are added.
6. Jobs with LoRAs and jobs without are company like any other: what a LoRA costs, its own rows cost, and
   keeping the two apart would gain 1 to 2% (docs/performance.md, "LoRAs").
7. The cap is the size beyond which larger batches gain little, so that each job is done soon. In a crowded
   lane it is that of least time a row, because throughput is what its jobs wait for. No scheduled job is
   preempted when a lane is not crowded any more.
8. If a batch did not fit in memory, the cap of its lane is halved for the life of the process. If there are
   more rows than the cap, because of that or because a job needs more rows than before, the scheduled jobs
   of the lowest effective priority are preempted.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from worker.contract.job_parameters import MAX_PRIORITY

#: Seconds of waiting that count as one step of priority.
AGEING_S = 30.0
#: How many times the cost of a step may grow by jobs that others in the batch may preempt.
MAX_SLOWDOWN = 1.3

#: Rows of a lane's jobs, in batches of least time a row, from which it is crowded. Simulated
#: (docs/performance.md, "Which batch size, by how many jobs wait"): more gains less, less costs latency.
CROWD = 1.5

T = TypeVar("T", bound=Hashable)


class Costs(Protocol):
    """The largest batches of a device, and the cost of its steps. See `worker.engine.step_cost`."""

    def cap(self, lane: Hashable) -> int:
        """The cap of a lane at the start, in rows, >= 1."""

    def most(self, lane: Hashable) -> int:
        """The cap of a crowded lane, in rows, >= `cap`."""

    def step_s(self, lane: Hashable, rows: int, text_tokens: int = 0, lora_rows: int = 0) -> float:
        """The cost of a step of `rows` rows of `lane`, > 0, in seconds or in any other unit.

        `text_tokens`: tokens of the longest text in it; all rows attend to as many. `lora_rows`: how many of
        the rows have LoRAs.
        """


@dataclass
class _Entry(Generic[T]):
    """A job in a lane, waiting or scheduled."""

    item: T
    rows: int
    priority: int
    added_s: float
    #: The order in which jobs were added.
    number: int
    #: Tokens of its longest text.
    text_tokens: int = 0
    #: How many of its rows have LoRAs.
    lora_rows: int = 0

    def effective_priority(self, now_s: float) -> float:
        """Priority with ageing."""
        return self.priority + max(0.0, now_s - self.added_s) / AGEING_S

    def order(self, now_s: float) -> tuple[float, int]:
        """The key to sort by: higher is scheduled sooner."""
        return self.effective_priority(now_s), -self.number

    def may_preempt(self, other: _Entry[T]) -> bool:
        """Whether the other job may have to wait for this one."""
        difference = self.priority - other.priority + (other.added_s - self.added_s) / AGEING_S
        return self.priority > other.priority and difference >= 1


@dataclass
class _Lane(Generic[T]):
    cap: int
    pass_: float
    waiting: dict[T, _Entry[T]] = field(default_factory=dict)
    scheduled: dict[T, _Entry[T]] = field(default_factory=dict)
    is_crowded: bool = False

    def follow(self, usual: int, most: int) -> None:
        """Set the cap, which is `usual` rows, and in a crowded lane `most`."""
        rows = self.rows + sum(entry.rows for entry in self.waiting.values())
        if rows >= CROWD * most:
            self.is_crowded = True
        elif rows < most:
            self.is_crowded = False
        self.cap = most if self.is_crowded else max(usual, min(self.rows, most))

    @property
    def rows(self) -> int:
        """Rows of the scheduled jobs."""
        return sum(entry.rows for entry in self.scheduled.values())

    def schedule(self, now_s: float) -> None:
        """Keep the cap, then schedule waiting jobs while they fit."""
        self._preempt_over_cap(now_s)
        while self.waiting:
            first = max(self.waiting.values(), key=lambda entry: entry.order(now_s))
            if not self._try_schedule(first, now_s):
                return

    def _try_schedule(self, first: _Entry[T], now_s: float) -> bool:
        """Schedule `first`, and preempt others for it if need be. False: it does not fit now."""
        preemptible = [entry for entry in self._lowest_first(now_s) if first.may_preempt(entry)]
        room = self.cap - self.rows + sum(entry.rows for entry in preemptible)
        # A job of more rows than the cap runs alone: only the device knows whether it fits.
        if first.rows > room and len(preemptible) < len(self.scheduled):
            return False
        for entry in preemptible:
            if self.rows + first.rows <= self.cap:
                break
            self._preempt(entry)
        self.scheduled[first.item] = self.waiting.pop(first.item)
        return True

    def _preempt_over_cap(self, now_s: float) -> None:
        """Preempt the lowest effective priorities until the cap is kept or one job is left."""
        for entry in self._lowest_first(now_s):
            if self.rows <= self.cap or len(self.scheduled) == 1:
                return
            self._preempt(entry)

    def batch(self, costs: Costs, name: Hashable, now_s: float) -> list[_Entry[T]]:
        """The scheduled jobs that take part in the next step."""
        scheduled = list(self.scheduled.values())
        if len({entry.priority for entry in scheduled}) == 1:
            return scheduled
        preemptible = [entry for entry in scheduled if any(other.may_preempt(entry) for other in scheduled)]
        chosen = [entry for entry in scheduled if entry not in preemptible]
        limit = MAX_SLOWDOWN * _step_s(costs, name, chosen)
        for entry in sorted(preemptible, key=lambda entry: entry.order(now_s), reverse=True):
            if _step_s(costs, name, [*chosen, entry]) > limit:
                break
            chosen.append(entry)
        return chosen

    def weight(self, now_s: float) -> float:
        """The lane's share of the time, > 0. Bounded, or the oldest lane would in the end run alone."""
        highest = max(entry.effective_priority(now_s) for entry in self.scheduled.values())
        return float(2.0 ** (min(highest, MAX_PRIORITY) / 2))

    def _lowest_first(self, now_s: float) -> list[_Entry[T]]:
        return sorted(self.scheduled.values(), key=lambda entry: entry.order(now_s))

    def _preempt(self, entry: _Entry[T]) -> None:
        self.waiting[entry.item] = self.scheduled.pop(entry.item)


def _step_s(costs: Costs, lane: Hashable, entries: Collection[_Entry[T]]) -> float:
    """The cost of a step of these jobs."""
    return costs.step_s(
        lane,
        sum(entry.rows for entry in entries),
        max((entry.text_tokens for entry in entries), default=0),
        sum(entry.lora_rows for entry in entries),
    )


class Batcher(Generic[T]):
    """Decides which jobs share the next step. Not thread-safe: the engine's thread owns it."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        #: Lowered caps, which are kept when their lane becomes empty.
        self._caps: dict[Hashable, int] = {}
        self._lanes: dict[Hashable, _Lane[T]] = {}
        self._lane_of: dict[T, Hashable] = {}
        self._added = 0
        #: The global pass: where a new lane starts.
        self._pass = 0.0

    def __len__(self) -> int:
        """Jobs in all lanes, waiting and scheduled."""
        return len(self._lane_of)

    def __iter__(self) -> Iterator[T]:
        """Jobs in all lanes, waiting and scheduled, in the order they were added."""
        return iter(self._lane_of)

    def __contains__(self, item: T) -> bool:
        """Whether `item` is in a lane, waiting or scheduled."""
        return item in self._lane_of

    def add(
        self,
        item: T,
        *,
        lane: Hashable,
        rows: int,
        priority: int,
        now_s: float,
        text_tokens: int = 0,
        lora_rows: int = 0,
    ) -> None:
        """Let `item` wait in `lane`. Raises `ValueError` if it is in a lane already."""
        if item in self._lane_of:
            raise ValueError(f"{item!r} is in lane {self._lane_of[item]!r} already: remove it first.")
        self._added += 1
        if lane not in self._lanes:
            self._lanes[lane] = _Lane(cap=self.cap(lane), pass_=self._pass)
        entry = _Entry(item, rows, priority, now_s, self._added, text_tokens, lora_rows)
        self._lanes[lane].waiting[item] = entry
        self._lane_of[item] = lane

    def resize(self, item: T, rows: int, text_tokens: int = 0, lora_rows: int = 0) -> None:
        """Let `item` take `rows` rows, and have a text of so many tokens, from the next step on."""
        entry = self._entry(item)
        entry.rows, entry.text_tokens, entry.lora_rows = rows, text_tokens, lora_rows

    def step_s(self, items: Collection[T]) -> float:
        """The cost of a step of these jobs, of one lane and at least one."""
        lane = self._lane_of[next(iter(items))]
        return _step_s(self._costs, lane, [self._entry(item) for item in items])

    def _entry(self, item: T) -> _Entry[T]:
        lane = self._lanes[self._lane_of[item]]
        return lane.scheduled.get(item) or lane.waiting[item]

    def remove(self, item: T) -> None:
        """Take `item` out of its lane, finished or not. Its rows are free for the next batch."""
        name = self._lane_of.pop(item)
        lane = self._lanes[name]
        lane.waiting.pop(item, None)
        lane.scheduled.pop(item, None)
        if not lane.waiting and not lane.scheduled:
            del self._lanes[name]

    def next_batch(self, now_s: float) -> list[T]:
        """The jobs to run one step of, all of one lane; empty when there are none."""
        if not self._lanes:
            return []
        for name, lane in self._lanes.items():
            # What the device gains by may be known better now.
            lane.follow(self.cap(name), self.most(name))
            lane.schedule(now_s)
        name, lowest = min(self._lanes.items(), key=lambda named: named[1].pass_)
        batch = lowest.batch(self._costs, name, now_s)
        cost = _step_s(self._costs, name, batch)
        lowest.pass_ += cost / lowest.weight(now_s)
        self._pass += cost / sum(lane.weight(now_s) for lane in self._lanes.values())
        return [entry.item for entry in batch]

    def cap(self, lane: Hashable) -> int:
        """The most rows in a step of `lane` while it is not crowded, >= 1."""
        return min(self._caps[lane], self._costs.cap(lane)) if lane in self._caps else self._costs.cap(lane)

    def most(self, lane: Hashable) -> int:
        """The most rows in a step of `lane`, >= 1."""
        return self._caps[lane] if lane in self._caps else self._costs.most(lane)

    def lower_cap(self, lane: Hashable, rows: int) -> None:
        """Lower the cap of `lane` to half of `rows`, which did not fit in memory; to one row at least."""
        self._caps[lane] = max(1, min(self.most(lane), rows // 2))
        if lane in self._lanes:
            self._lanes[lane].cap = self._caps[lane]
