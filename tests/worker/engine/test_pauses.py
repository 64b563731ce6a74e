"""The longest pause at the change to compiled steps: what counts, and that the engine says it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.worker.engine.fake_runner import FakeRunner, job_of
from worker.engine.engine import Engine
from worker.engine.pauses import AROUND_S, MOST_TURNS, Pauses

LANE = (4, 64, 64)


class Loop:
    """Turns of an engine, at times of the test's own."""

    def __init__(self) -> None:
        self.now_s, self.is_compiled = 100.0, False
        self.said: list[float] = []
        self.pauses = Pauses(lambda: self.is_compiled, self.said.append, lambda: self.now_s)

    def turn(
        self, seconds: float, rows: int = 8, *, goes_on: bool = True, lane: object = LANE, count: int = 1
    ) -> None:
        batch: Any = [SimpleNamespace(state=SimpleNamespace(lane=lane, rows=rows))]
        for _ in range(count):
            self.now_s += seconds
            self.pauses.turn(batch, goes_on)

    def run_for(self, seconds: float, step_s: float, rows: int = 8) -> None:
        self.turn(step_s, rows, count=int(seconds / step_s))


@pytest.fixture
def loop() -> Loop:
    return Loop()


def test_the_longest_pause_is_said_once_after_the_change(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    loop.run_for(20, 0.1)
    # Loading holds the steps up a little, and the first compiled step is captured.
    loop.turn(0.13)
    loop.is_compiled = True
    loop.turn(0.18)
    with caplog.at_level(logging.INFO):
        loop.run_for(AROUND_S - 1, 0.05)
        assert loop.said == []
        loop.run_for(60, 0.05)
    # The usual compiled step takes 50 ms, and that one took 180.
    assert loop.said == [pytest.approx(0.13)]
    assert caplog.messages == [
        "Steps of 4x64x64 run compiled now; the longest pause at the change was 130 ms."
    ]


def test_a_batch_of_more_rows_is_no_pause(loop: Loop) -> None:
    for is_compiled in (False, True):
        loop.is_compiled = is_compiled
        for _ in range(60):
            loop.turn(0.05, rows=2)
            loop.turn(0.4, rows=16)
    loop.run_for(AROUND_S, 0.05, rows=2)
    assert loop.said == [pytest.approx(0.0, abs=1e-6)]


def test_waiting_for_jobs_is_no_pause(loop: Loop) -> None:
    loop.run_for(5, 0.1)
    loop.is_compiled = True
    loop.turn(0.1)
    loop.turn(0.05, count=20)
    loop.turn(0.05, goes_on=False)
    loop.turn(5.0)
    loop.run_for(20, 0.05)
    assert loop.said == [pytest.approx(0.05)]


def test_what_was_long_before_or_after_the_change_does_not_count(loop: Loop) -> None:
    loop.turn(3.0, count=2)
    loop.run_for(AROUND_S + 1, 0.1)
    loop.is_compiled = True
    loop.run_for(AROUND_S + 1, 0.1)
    loop.turn(3.0)
    assert loop.said == [pytest.approx(0.0, abs=1e-6)]


def test_each_size_changes_over_for_itself_and_one_that_was_never_uncompiled_says_nothing(loop: Loop) -> None:
    loop.turn(0.1, count=5)
    loop.turn(0.1, count=5, lane=(4, 96, 96))
    loop.is_compiled = True
    loop.turn(0.1, count=5)
    loop.turn(0.1, count=5, lane=(4, 32, 32))
    loop.run_for(AROUND_S + 1, 0.1)
    assert len(loop.said) == 1
    loop.turn(0.1, count=5, lane=(4, 96, 96))
    loop.run_for(AROUND_S + 1, 0.1)
    assert len(loop.said) == 2


def test_what_is_remembered_is_bounded(loop: Loop) -> None:
    loop.turn(0.001, count=MOST_TURNS + 100)
    assert len(loop.pauses._turns) == MOST_TURNS


@pytest.fixture
def changing() -> Iterator[tuple[FakeRunner, list[float], Engine[Any]]]:
    """An engine whose runner changes over at its sixth step; 16 s pass in each step after that."""
    runner, said = FakeRunner(), list[float]()
    now_s = [0.0]

    def is_compiled() -> bool:
        return len(runner.batches) > 6

    def step(seeds: list[int]) -> None:
        now_s[0] += AROUND_S + 1 if is_compiled() else 0.1

    runner.on_step = step
    pauses = Pauses(is_compiled, said.append, lambda: now_s[0])
    engine: Engine[Any] = Engine(
        runner, job_timeout_s=1e6, on_failure=lambda _: None, on_turn=pauses.turn, clock=lambda: now_s[0]
    )
    yield runner, said, engine
    engine.stop()


def test_an_engine_says_it_of_the_steps_of_its_jobs(
    changing: tuple[FakeRunner, list[float], Engine[Any]],
) -> None:
    _, said, engine = changing
    engine.start()
    engine.submit("job", job_of(1, steps=12)).result(20)
    assert len(said) == 1
