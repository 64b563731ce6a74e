"""Which jobs run together: caps, order and turns; and no job waits for ever, whatever other jobs arrive."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from worker.engine.batcher import AGEING_S, MAX_SLOWDOWN, Batcher


@dataclass(frozen=True)
class Device:
    """The same cap and costs for every lane: `fixed` for a step, and one for each row."""

    max_rows: int
    fixed: float = 0.0
    #: The cap of a crowded lane; 0: the same.
    most_rows: int = 0

    def cap(self, lane: Hashable) -> int:
        return self.max_rows

    def most(self, lane: Hashable) -> int:
        return max(self.max_rows, self.most_rows)

    def step_s(self, lane: Hashable, rows: int, text_tokens: int = 0, lora_rows: int = 0) -> float:
        return self.fixed + rows


def batcher_with(
    max_rows: int, *jobs: tuple[str, int], priority: int = 5, lane: str = "lane", fixed: float = 0.0
) -> Batcher[str]:
    """A batcher in which `jobs`, of a name and a number of rows each, arrived in this order at time 0."""
    batcher: Batcher[str] = Batcher(Device(max_rows, fixed))
    for name, rows in jobs:
        batcher.add(name, lane=lane, rows=rows, priority=priority, now_s=0.0)
    return batcher


@pytest.mark.parametrize(
    ("max_rows", "jobs", "batch"),
    [
        (8, [("a", 2)], ["a"]),
        (8, [("a", 2), ("b", 1), ("c", 2)], ["a", "b", "c"]),
        (4, [("a", 2), ("b", 2), ("c", 2)], ["a", "b"]),
        (1, [("a", 1), ("b", 1)], ["a"]),
        # No smaller job overtakes the next one.
        (3, [("a", 2), ("b", 2), ("c", 1)], ["a"]),
        # A job of more rows than the cap runs alone, when it is next: the device decides.
        (1, [("a", 2), ("b", 1)], ["a"]),
        (2, [("a", 1), ("b", 3), ("c", 1)], ["a"]),
        (8, [], []),
    ],
)
def test_jobs_are_scheduled_first_come_first_served_within_the_cap(
    max_rows: int, jobs: list[tuple[str, int]], batch: list[str]
) -> None:
    assert batcher_with(max_rows, *jobs).next_batch(0.0) == batch


def test_a_new_job_joins_at_the_next_step_and_a_finished_one_leaves_at_once() -> None:
    batcher = batcher_with(4, ("a", 2))
    assert batcher.next_batch(0.0) == ["a"]
    batcher.add("b", lane="lane", rows=2, priority=5, now_s=0.1)
    assert batcher.next_batch(0.1) == ["a", "b"]
    batcher.add("c", lane="lane", rows=2, priority=5, now_s=0.2)
    assert batcher.next_batch(0.2) == ["a", "b"]
    batcher.remove("a")
    assert batcher.next_batch(0.3) == ["b", "c"]


def test_the_higher_priority_is_scheduled_first() -> None:
    batcher = batcher_with(2, ("low", 2), priority=1)
    batcher.add("high", lane="lane", rows=2, priority=8, now_s=1.0)
    assert batcher.next_batch(1.0) == ["high"]


def test_no_job_of_equal_priority_preempts_another() -> None:
    batcher = batcher_with(2, ("first", 2))
    for now_s in (0.0, 1.0, 1e6):
        batcher.add(f"at {now_s}", lane="lane", rows=2, priority=5, now_s=now_s)
        assert batcher.next_batch(now_s) == ["first"]


def test_a_job_preempts_the_lowest_effective_priority_which_is_scheduled_again_later() -> None:
    batcher = batcher_with(6, ("a", 2), ("b", 2), ("c", 2), priority=3, fixed=100.0)
    assert batcher.next_batch(0.0) == ["a", "b", "c"]
    batcher.add("live", lane="lane", rows=2, priority=5, now_s=1.0)
    assert batcher.next_batch(1.0) == ["live", "a", "b"]
    batcher.remove("live")
    assert sorted(batcher.next_batch(2.0)) == ["a", "b", "c"]


def test_no_job_is_preempted_in_vain() -> None:
    batcher = batcher_with(4, ("equal", 2), fixed=100.0)
    batcher.add("low", lane="lane", rows=2, priority=3, now_s=0.0)
    assert batcher.next_batch(0.0) == ["equal", "low"]
    # Its four rows do not fit beside its equal, whichever jobs it preempts.
    batcher.add("wide", lane="lane", rows=4, priority=5, now_s=0.0)
    assert batcher.next_batch(0.0) == ["equal", "low"]


@pytest.mark.parametrize(
    ("later_s", "batch"),
    [(29.0, ["live"]), (31.0, ["old"]), (1e6, ["old"])],
    ids=["soon", "late", "much later"],
)
def test_no_new_job_preempts_one_that_has_waited_long_enough(later_s: float, batch: list[str]) -> None:
    batcher = batcher_with(2, ("old", 2), priority=3)
    batcher.next_batch(0.0)
    batcher.add("live", lane="lane", rows=2, priority=5, now_s=later_s)
    assert batcher.next_batch(later_s) == batch


@pytest.mark.parametrize(
    ("fixed", "batch"),
    [
        # Each row costs the same: any other job would slow the live one down.
        (0.0, ["live"]),
        # 10 + 2 rows alone, 10 + 4 with one of them: 1.17 times; 10 + 6 with both: 1.33 times.
        (10.0, ["live", "a"]),
        # A row costs next to nothing.
        (1000.0, ["live", "a", "b"]),
    ],
)
def test_preemptible_jobs_join_a_step_only_while_it_costs_little_more(fixed: float, batch: list[str]) -> None:
    assert MAX_SLOWDOWN == 1.3
    batcher = batcher_with(8, ("a", 2), ("b", 2), priority=3, fixed=fixed)
    batcher.next_batch(0.0)
    batcher.add("live", lane="lane", rows=2, priority=5, now_s=0.0)
    assert batcher.next_batch(0.0) == batch


def test_a_job_that_needs_more_rows_than_before_gets_them() -> None:
    batcher = batcher_with(4, ("a", 1), ("b", 2), ("c", 1))
    assert batcher.next_batch(0.0) == ["a", "b", "c"]
    batcher.resize("a", 2)
    assert batcher.next_batch(0.0) == ["a", "b"]
    batcher.resize("b", 1)
    assert batcher.next_batch(0.0) == ["a", "b", "c"]


@pytest.mark.parametrize(("waited_s", "first"), [(209.0, "high"), (211.0, "low")])
def test_waiting_raises_effective_priority_by_one_every_thirty_seconds(waited_s: float, first: str) -> None:
    assert AGEING_S == 30
    batcher = batcher_with(2, ("low", 2), priority=1)
    batcher.add("high", lane="lane", rows=2, priority=8, now_s=waited_s)
    assert batcher.next_batch(waited_s) == [first]


def test_a_job_is_added_once() -> None:
    batcher = batcher_with(2, ("a", 1))
    with pytest.raises(ValueError, match="'a' is in lane 'lane' already: remove it first"):
        batcher.add("a", lane="elsewhere", rows=1, priority=5, now_s=0.0)


def test_one_lane_at_a_time() -> None:
    batcher = batcher_with(8, ("a", 2), lane="one")
    batcher.add("b", lane="other", rows=2, priority=5, now_s=0.0)
    assert sorted([batcher.next_batch(0.0), batcher.next_batch(0.0)]) == [["a"], ["b"]]


def steps_of(batcher: Batcher[str], turns: int, now_s: float = 0.0) -> Counter[str]:
    """How many of the next `turns` steps each job is in."""
    return Counter(item for _ in range(turns) for item in batcher.next_batch(now_s))


def test_lanes_of_equal_weight_share_the_time() -> None:
    batcher = batcher_with(8, ("small", 1), lane="one")
    batcher.add("large", lane="other", rows=2, priority=5, now_s=0.0)
    assert steps_of(batcher, 300) == {"small": 200, "large": 100}


def test_a_lane_of_two_priorities_more_gets_twice_the_time() -> None:
    batcher = batcher_with(8, ("normal", 2), priority=5, lane="one")
    batcher.add("urgent", lane="other", rows=2, priority=7, now_s=0.0)
    steps = steps_of(batcher, 300)
    assert steps["urgent"] == pytest.approx(200, abs=2)


def test_ageing_ends_at_the_highest_priority() -> None:
    """Otherwise an old job's weight would grow until no other lane ran, and past the range of a float."""
    batcher = batcher_with(8, ("old", 2), priority=9, lane="one")
    batcher.add("new", lane="other", rows=2, priority=9, now_s=1e9)
    assert steps_of(batcher, 100, now_s=1e9) == {"old": 50, "new": 50}


def test_an_idle_lane_does_not_catch_up() -> None:
    batcher = batcher_with(8, ("busy", 2), lane="one")
    steps_of(batcher, 1_000)
    batcher.add("late", lane="other", rows=2, priority=5, now_s=0.0)
    assert steps_of(batcher, 100)["busy"] == pytest.approx(50, abs=1)


def test_a_full_lane_does_not_hold_up_another_one() -> None:
    batcher = batcher_with(2, *((f"queued {n}", 2) for n in range(50)), lane="one")
    batcher.add("other", lane="other", rows=2, priority=5, now_s=0.0)
    assert steps_of(batcher, 4)["other"] == 2


def test_a_lowered_cap_is_half_and_is_kept() -> None:
    batcher = batcher_with(8, *((name, 2) for name in "abcd"))
    assert batcher.next_batch(0.0) == ["a", "b", "c", "d"]
    batcher.lower_cap("lane", 8)
    assert batcher.cap("lane") == 4
    assert batcher.next_batch(0.0) == ["a", "b"]
    for name in "abcd":
        batcher.remove(name)
    batcher.add("e", lane="lane", rows=2, priority=5, now_s=1.0)
    assert batcher.cap("lane") == 4
    assert batcher.cap("another") == 8


def test_a_preempted_job_is_the_next_to_be_scheduled() -> None:
    batcher = batcher_with(4, ("a", 2), ("b", 2))
    batcher.next_batch(0.0)
    batcher.lower_cap("lane", 4)
    batcher.add("c", lane="lane", rows=2, priority=5, now_s=1.0)
    assert batcher.next_batch(1.0) == ["a"]
    batcher.remove("a")
    assert batcher.next_batch(1.0) == ["b"]


def test_a_cap_never_rises_and_never_falls_below_one_row() -> None:
    batcher = batcher_with(8, ("a", 2))
    for rows in (3, 8, 1, 1):
        batcher.lower_cap("lane", rows)
    assert batcher.cap("lane") == 1
    assert batcher.next_batch(0.0) == ["a"]


def crowd(jobs: int, *, cap: int = 4, most: int = 8) -> Batcher[int]:
    """So many jobs of two rows in a lane whose cap follows how many there are."""
    batcher: Batcher[int] = Batcher(Device(cap, most_rows=most))
    for number in range(jobs):
        batcher.add(number, lane="lane", rows=2, priority=5, now_s=0.0)
    return batcher


@pytest.mark.parametrize(("jobs", "rows"), [(1, 2), (2, 4), (3, 4), (5, 4), (6, 8), (50, 8)])
def test_where_many_jobs_wait_a_batch_has_the_rows_of_least_time_a_row(jobs: int, rows: int) -> None:
    """1.5 batches of that size are many."""
    assert 2 * len(crowd(jobs).next_batch(0.0)) == rows


def test_a_crowded_lane_stays_so_until_its_jobs_no_longer_fill_a_batch() -> None:
    batcher, sizes = crowd(8), list[int]()
    for number in range(8):
        sizes.append(len(batcher.next_batch(0.0)))
        batcher.remove(number)
    # Nobody who was scheduled is preempted when it ends: with three jobs all three take the step.
    assert sizes == [4, 4, 4, 4, 4, 3, 2, 1]


def test_a_lane_that_is_no_longer_crowded_admits_none_beyond_its_cap() -> None:
    batcher = crowd(7)
    assert batcher.next_batch(0.0) == [0, 1, 2, 3]
    for number in (0, 4, 5, 6):
        batcher.remove(number)
    assert batcher.next_batch(0.0) == [1, 2, 3]
    batcher.add(7, lane="lane", rows=2, priority=5, now_s=0.0)
    batcher.remove(1)
    assert batcher.next_batch(0.0) == [2, 3]
    batcher.remove(2)
    assert batcher.next_batch(0.0) == [3, 7]


def test_one_that_arrives_and_one_that_leaves_do_not_change_the_cap_each_step() -> None:
    batcher, sizes, number = crowd(6), list[int](), 6
    for step in range(40):
        sizes.append(len(batcher.next_batch(0.0)))
        if step % 2:
            batcher.add(number, lane="lane", rows=2, priority=5, now_s=0.0)
            number += 1
        else:
            batcher.remove(next(iter(batcher)))
    assert sizes == [4] * 40


def test_what_did_not_fit_in_memory_is_never_tried_again_however_many_wait() -> None:
    batcher = crowd(20)
    assert len(batcher.next_batch(0.0)) == 4
    batcher.lower_cap("lane", 8)
    assert (batcher.cap("lane"), batcher.most("lane")) == (4, 4)
    assert len(batcher.next_batch(0.0)) == 2
    batcher.lower_cap("lane", 4)
    assert len(batcher.next_batch(0.0)) == 1


def test_a_crowd_waits_in_order_and_nobody_is_overtaken() -> None:
    batcher, done = crowd(30), list[int]()
    while len(batcher):
        batch = batcher.next_batch(0.0)
        done.append(batch[0])
        batcher.remove(batch[0])
    assert done == sorted(done)


@dataclass
class Known:
    """What the test's model knows of a job."""

    lane: str
    rows: int
    priority: int
    arrived_s: float
    number: int


class AnyOrderOfEvents(RuleBasedStateMachine):
    """In any order of events: no job is lost, caps and order are kept."""

    @initialize(max_rows=st.integers(1, 6), more=st.integers(0, 6))
    def begin(self, max_rows: int, more: int) -> None:
        self.batcher: Batcher[int] = Batcher(Device(max_rows, most_rows=max_rows + more))
        self.known: dict[int, Known] = {}
        self.usual = max_rows
        self.caps = dict.fromkeys("xyz", max_rows + more)
        self.now_s = 0.0
        self.arrivals = 0

    @rule(lane=st.sampled_from("xyz"), rows=st.integers(1, 3), priority=st.integers(0, 9))
    def add(self, lane: str, rows: int, priority: int) -> None:
        self.arrivals += 1
        self.known[self.arrivals] = Known(lane, rows, priority, self.now_s, self.arrivals)
        self.batcher.add(self.arrivals, lane=lane, rows=rows, priority=priority, now_s=self.now_s)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(sorted(self.known)))
        del self.known[item]
        self.batcher.remove(item)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), rows=st.integers(1, 3))
    def resize(self, data: st.DataObject, rows: int) -> None:
        item = data.draw(st.sampled_from(sorted(self.known)))
        self.known[item].rows = rows
        self.batcher.resize(item, rows)

    @rule(lane=st.sampled_from("xyz"), rows=st.integers(1, 6))
    def lower_cap(self, lane: str, rows: int) -> None:
        self.caps[lane] = max(1, min(self.caps[lane], rows // 2))
        self.batcher.lower_cap(lane, rows)

    @rule(seconds=st.sampled_from([0.1, 9.0, 1_000.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    def order(self, item: int) -> tuple[float, int]:
        job = self.known[item]
        return job.priority + (self.now_s - job.arrived_s) / AGEING_S, -job.number

    def may_preempt(self, high: int, low: int) -> bool:
        difference = self.order(high)[0] - self.order(low)[0]
        return self.known[high].priority > self.known[low].priority and difference >= 1 - 1e-6

    @rule()
    def step(self) -> None:
        batch = self.batcher.next_batch(self.now_s)
        assert bool(batch) == bool(self.known), "a step runs whenever there is a job"
        if not batch:
            return
        assert len(set(batch)) == len(batch)
        lane = {self.known[item].lane for item in batch}
        assert len(lane) == 1, "one lane a step"
        (name,) = lane
        rows = sum(self.known[item].rows for item in batch)
        assert rows <= self.caps[name] or len(batch) == 1, "the cap is kept, except by one job"
        waiting = [item for item, job in self.known.items() if job.lane == name and item not in batch]
        if waiting and not any(self.may_preempt(high, low) for low in waiting for high in batch):
            first = max(waiting, key=self.order)
            assert rows + self.known[first].rows > min(self.usual, self.caps[name]), (
                "the next one does not fit"
            )
        for late in batch:
            for early in waiting:
                equals = self.known[late].priority == self.known[early].priority
                assert not (equals and early < late), "order within equal priority is kept"

    @invariant()
    def no_job_is_lost(self) -> None:
        assert len(self.batcher) == len(self.known)
        assert {lane: self.batcher.most(lane) for lane in "xyz"} == self.caps


AnyOrderOfEvents.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase

#: A job that arrives: lane, rows, steps, priority.
Arrival = tuple[str, int, int, int]


def turns_until_done(
    victim: Arrival, arrivals: Callable[[int], Iterable[Arrival]], *, max_rows: int, step_s: float, limit: int
) -> float:
    """In which turn `victim` is done when `arrivals(turn)` come before each; infinity beyond `limit`."""
    batcher: Batcher[int] = Batcher(Device(max_rows))
    left: dict[int, int] = {}

    def add(arrival: Arrival, now_s: float) -> None:
        lane, rows, steps, priority = arrival
        number = len(left)
        left[number] = steps
        batcher.add(number, lane=lane, rows=rows, priority=priority, now_s=now_s)

    for turn in range(limit):
        now_s = turn * step_s
        if turn == 1:
            add(victim, now_s)
            mine = len(left) - 1
        for arrival in arrivals(turn):
            add(arrival, now_s)
        for number in batcher.next_batch(now_s):
            left[number] -= 1
            if left[number] == 0:
                batcher.remove(number)
        if turn >= 1 and left[mine] == 0:
            return turn
    return math.inf


VICTIM: Arrival = ("victim", 2, 20, 0)

ADVERSARIES: dict[str, Callable[[int], list[Arrival]]] = {
    "one long job": lambda turn: [("other", 2, 10_000, 9)] if turn == 0 else [],
    "a lane that is always full": lambda turn: [("other", 2, 4, 9)],
    "one-step jobs, whose lane is new each time": lambda turn: [("other", 1, 1, 9)],
    "a lane of its own for every job": lambda turn: [(f"lane {turn}", 2, 1, 9)],
    "wide jobs of one step each": lambda turn: [("other", 8, 1, 9)],
    "urgent jobs in its own lane, at first": lambda turn: [("victim", 2, 1, 9)] if turn < 2_400 else [],
    "jobs of its own priority in its own lane": lambda turn: [("victim", 2, 4, 0)],
    "narrow jobs that would fit beside it": lambda turn: [("victim", 1, 30, 0)],
}


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("victim", [VICTIM, ("victim", 8, 20, 0)], ids=["narrow", "as wide as the cap"])
def test_a_job_is_done_in_bounded_time_whatever_else_arrives(adversary: str, victim: Arrival) -> None:
    # 270 s of ageing are 2,700 turns; the rest is what a share of 1 : 2^4.5 of the time leaves.
    turns = turns_until_done(victim, ADVERSARIES[adversary], max_rows=8, step_s=0.1, limit=6_000)
    assert turns < 6_000


def test_a_batcher_that_has_been_busy_for_weeks_still_shares_the_time() -> None:
    """Passes stay small enough that adding a stride to them is not lost in rounding."""
    batcher = batcher_with(8, ("old", 1), priority=9, lane="one")
    batcher._pass = 1e7
    batcher._lanes["one"].pass_ = 1e7
    batcher.add("new", lane="other", rows=1, priority=9, now_s=0.0)
    assert steps_of(batcher, 100) == {"old": 50, "new": 50}


@settings(max_examples=40, deadline=None)
@given(
    pattern=st.lists(
        st.lists(
            st.tuples(
                st.sampled_from(["victim", "x", "y"]), st.integers(1, 4), st.integers(1, 9), st.integers(0, 9)
            ),
            max_size=2,
        ),
        min_size=1,
        max_size=6,
    ),
    victim=st.tuples(st.just("victim"), st.integers(1, 4), st.integers(1, 10), st.integers(0, 9)),
)
def test_no_repeating_pattern_of_arrivals_starves_a_job(
    pattern: list[list[Arrival]], victim: Arrival
) -> None:
    turns = turns_until_done(
        victim, lambda turn: pattern[turn % len(pattern)], max_rows=4, step_s=2.0, limit=4_000
    )
    assert turns < 4_000


class LoraDevice(Device):
    """Rows with LoRAs cost twice as much."""

    def step_s(self, lane: Hashable, rows: int, text_tokens: int = 0, lora_rows: int = 0) -> float:
        return float(rows + lora_rows)


def test_a_lane_is_charged_for_its_rows_with_loras() -> None:
    batcher: Batcher[str] = Batcher(LoraDevice(4))
    batcher.add("plain", lane="small", rows=2, priority=5, now_s=0.0)
    batcher.add("styled", lane="large", rows=2, lora_rows=2, priority=5, now_s=0.0)
    assert (batcher.step_s(["plain"]), batcher.step_s(["styled"])) == (2.0, 4.0)
    turns = Counter(batcher.next_batch(0.0)[0] for _ in range(30))
    assert turns == {"plain": 20, "styled": 10}


def test_jobs_with_loras_and_without_are_company_in_the_order_of_their_arrival() -> None:
    batcher: Batcher[str] = Batcher(LoraDevice(4))
    for number, lora_rows in enumerate((2, 0, 2, 0)):
        batcher.add(f"{number}", lane="lane", rows=2, lora_rows=lora_rows, priority=5, now_s=float(number))
    assert batcher.next_batch(4.0) == ["0", "1"]
