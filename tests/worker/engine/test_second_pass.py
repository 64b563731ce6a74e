"""A job with a second pass changes its lane in the middle, and fails, ends and counts as any other."""

from __future__ import annotations

import threading
from concurrent.futures import wait

import numpy as np

from tests.worker.engine.engine_bench import Bench, bench_of, error_of, picture
from tests.worker.engine.fake_runner import SOON_S, FakeRunner, Faults, job_of, picture_of
from worker.contract.errors import (
    EngineStoppedError,
    JobCancelledError,
    JobTimeoutError,
    JobTooLargeError,
    MachineError,
    OutOfMemoryError,
    RenderError,
)
from worker.engine.runner import FirstPass

#: Of three steps at 64 x 64 px, then two at 128 x 128.
TWICE = {"steps": 3, "upscale": 2, "upscale_steps": 4, "upscale_strength": 0.5}
LARGE = {"width": 128, "height": 128}


def wait_for_second(bench: Bench, job_id: str) -> None:
    """Within a step: wait until a job's second pass is prepared, so that it is there for the next step."""
    engine = bench.engine
    ticket = engine.tickets()[job_id]
    with engine._changed:
        assert engine._changed.wait_for(
            lambda: (
                isinstance(ticket.inputs, FirstPass)
                and (ticket in engine._prepared or ticket in engine._batcher)
            ),
            SOON_S,
        )


def test_it_shares_the_steps_of_both_lanes(bench: Bench, runner: FakeRunner) -> None:
    def hold(seeds: list[int]) -> None:
        if seeds == [3] and runner.steps_done[1] == 3:
            wait_for_second(bench, job_of(1, **TWICE).id)

    runner.on_step = hold
    futures = [bench.submit(1, **TWICE), bench.submit(2, steps=2), bench.submit(3, steps=40, **LARGE)]
    bench.engine.start()
    assert np.array_equal(picture(futures[0]), picture_of(job_of(1)).pixels)
    assert [future.exception(SOON_S) for future in futures] == [None] * 3
    assert runner.batches.count([1, 2]) == 2
    assert runner.batches.count([3, 1]) == 2
    assert isinstance(runner.inputs[1], FirstPass)
    assert runner.steps_done[1] == 5


def test_its_steps_are_those_of_both_passes(bench: Bench, runner: FakeRunner) -> None:
    seen: list[tuple[int, int]] = []
    job_id = job_of(1, **TWICE).id
    look = lambda _: seen.append(bench.engine.progress()[job_id])  # noqa: E731
    runner.on_step = runner.on_second = look
    future = bench.submit(1, **TWICE)
    bench.engine.start()
    assert future.result(SOON_S).device_s == 0.0
    assert seen == [(0, 5), (1, 5), (2, 5), (3, 5), (3, 5), (4, 5)]


def test_it_keeps_its_age(runner: FakeRunner) -> None:
    """Two rows are one job's: 3 came to the larger lane before it, but is younger, and so waits."""
    runner.max_rows = 2
    with bench_of(runner) as bench:
        futures = [bench.submit(1, **TWICE), bench.submit(2, steps=40, **LARGE)]

        def on_step(seeds: list[int]) -> None:
            bench.now_s += 1.0
            if seeds == [1] and runner.steps_done[1] == 1:
                futures.append(bench.submit(3, steps=1, **LARGE))
            if seeds == [2] and runner.steps_done[1] == 3:
                wait_for_second(bench, job_of(1, **TWICE).id)

        runner.on_step = on_step
        bench.engine.start()
        wait(futures, SOON_S)
        assert [future.exception(SOON_S) for future in futures] == [None] * 3
        assert runner.batches[-3:] == [[1], [1], [3]]


def test_cancelled_between_its_passes_it_ends(bench: Bench, runner: FakeRunner) -> None:
    runner.on_second = lambda seed: bench.cancel(1, **TWICE)
    future = bench.submit(1, **TWICE)
    bench.engine.start()
    assert isinstance(error_of(future), JobCancelledError)
    assert runner.steps_done[1] == 3


def test_its_deadline_is_that_of_both_passes(runner: FakeRunner) -> None:
    with bench_of(runner, job_timeout_s=100.0) as bench:

        def late(seed: int) -> None:
            bench.now_s = 101.0

        runner.on_second = late
        future = bench.submit(1, **TWICE)
        bench.engine.start()
        error = error_of(future)
        assert isinstance(error, JobTimeoutError)
        assert "step 3 of 5" in str(error)


def test_what_its_second_pass_fails_with_is_its_own(bench: Bench, runner: FakeRunner) -> None:
    runner.faults[1] = Faults(second=RuntimeError("resize"))
    runner.faults[2] = Faults(second=OutOfMemoryError("encode"))
    futures = [bench.submit(seed, **TWICE) for seed in (1, 2, 3)]
    bench.engine.start()
    assert isinstance(error_of(futures[0]), RenderError)
    too_large = error_of(futures[1])
    assert isinstance(too_large, JobTooLargeError)
    assert "A job of 128x128 does not fit" in str(too_large)
    picture(futures[2])


def test_what_does_not_fit_beside_the_steps_is_prepared_alone(bench: Bench, runner: FakeRunner) -> None:
    runner.on_second = lambda seed: runner.out_of_memory_beside.add(seed)
    future = bench.submit(1, **TWICE)
    bench.engine.start()
    picture(future)
    assert runner.prepared.count(1) == 3


def test_a_machine_fault_in_between_gives_it_back(bench: Bench, runner: FakeRunner) -> None:
    runner.faults[1] = Faults(second=MachineError("gone"))
    future = bench.submit(1, **TWICE)
    bench.engine.start()
    assert isinstance(error_of(future), EngineStoppedError)
    assert bench.failed.wait(SOON_S)


def test_stopping_in_between_gives_it_back(bench: Bench, runner: FakeRunner) -> None:
    entered, go = threading.Event(), threading.Event()

    def hold(seed: int) -> None:
        entered.set()
        assert go.wait(SOON_S)

    runner.on_second = hold
    future = bench.submit(1, **TWICE)
    bench.engine.start()
    assert entered.wait(SOON_S)
    bench.engine.stop()
    go.set()
    assert isinstance(error_of(future), EngineStoppedError)


def test_a_turn_may_end_with_a_job_between_its_passes(runner: FakeRunner) -> None:
    """Whoever looks at a step's jobs afterwards finds their states, also of one whose lane changes."""
    seen: list[bool] = []
    bench = Bench(runner)
    bench.engine._on_turn = lambda batch, more: seen.append(all(each.state for each in batch))
    future = bench.submit(1, **TWICE)
    bench.engine.start()
    picture(future)
    bench.engine.stop()
    assert seen
    assert all(seen)
