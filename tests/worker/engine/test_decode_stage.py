"""Pictures are decoded beside the steps, several in a call, and a job that cannot be decoded fails alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

import pytest

from tests.worker.engine.engine_bench import Bench, bench_of, error_of, picture
from tests.worker.engine.fake_runner import SOON_S, FakeRunner, FakeState, Faults, job_of
from worker.contract.errors import EngineStoppedError, MachineError, RenderError
from worker.engine.decode_stage import MAX_IN_FLIGHT, DecodeStage
from worker.engine.runner import Outcome, Picture
from worker.engine.ticket import Rendered, Ticket


@contextmanager
def bench_in_decode(**options: Any) -> Iterator[tuple[Bench, FakeRunner, Future[Rendered]]]:
    """An engine whose first job is in the decode stage until the runner's `decode_gate` is set."""
    runner = FakeRunner(max_rows=8, decodes_beside=True)
    runner.decode_gate.clear()
    with bench_of(runner, **options) as bench:
        bench.engine.start()
        first = bench.submit(1, steps=1)
        assert runner.decode_entered.wait(SOON_S)
        yield bench, runner, first


def test_steps_go_on_while_pictures_are_decoded_and_jobs_that_finish_meanwhile_are_decoded_together() -> None:
    with bench_in_decode() as (bench, runner, first):
        others = [bench.submit(seed, steps=2) for seed in (2, 3)]
        fiftieth = threading.Event()
        runner.on_step = lambda seeds: fiftieth.set() if runner.steps_done[4] == 49 else None
        others.append(bench.submit(4, steps=50))
        assert fiftieth.wait(SOON_S)
        assert not any(future.done() for future in (first, *others))
        runner.decode_gate.set()
        wait([first, *others], SOON_S)
        assert [seed for seeds in runner.decoded for seed in seeds] == [1, 2, 3, 4]
        assert len(runner.decoded) <= 3


@contextmanager
def bench_with_a_full_decode_stage() -> Iterator[Bench]:
    """An engine of 4 rows with two decode calls in flight, whose pictures come when `picture_gate` is set."""
    runner = FakeRunner(max_rows=4, decodes_beside=True)
    runner.picture_gate.clear()
    second = threading.Event()
    runner.on_decode = lambda count: second.set() if count == MAX_IN_FLIGHT else None
    with bench_of(runner) as bench:
        bench.engine.start()
        for seed in range(MAX_IN_FLIGHT):
            runner.decode_entered.clear()
            bench.submit(seed, steps=1, guidance_scale=1)
            assert runner.decode_entered.wait(SOON_S)
        assert second.wait(SOON_S)
        runner.batches.clear()
        yield bench


def test_a_step_that_would_only_finish_jobs_waits_for_the_decode_stage_or_for_more_rows() -> None:
    with bench_with_a_full_decode_stage() as bench:
        stepped = threading.Event()
        bench.runner.on_step = lambda seeds: stepped.set()
        futures = [bench.submit(seed, steps=1, guidance_scale=1) for seed in range(10, 14)]
        # The fourth makes the batch full.
        assert stepped.wait(SOON_S)
        assert not any(future.done() for future in futures)
        bench.runner.picture_gate.set()
        wait(futures, SOON_S)
        assert bench.runner.batches == [[10, 11, 12, 13]]
        # Jobs that were added while two calls were in flight are decoded together.
        assert bench.runner.decoded[MAX_IN_FLIGHT:] == [[10, 11, 12, 13]]


def test_a_job_with_more_than_one_step_left_does_not_wait_for_the_decode_stage() -> None:
    with bench_with_a_full_decode_stage() as bench:
        first = bench.submit(10, steps=1, guidance_scale=1)
        longer = bench.submit(11, steps=3, guidance_scale=1)
        second_step = threading.Event()
        bench.runner.on_step = lambda seeds: second_step.set() if bench.runner.steps_done[11] else None
        assert second_step.wait(SOON_S)
        assert not longer.done()
        bench.runner.picture_gate.set()
        wait([first, longer], SOON_S)
        assert bench.runner.batches == [[10, 11], [11], [11]]


def test_a_step_that_waited_runs_when_the_decode_stage_has_a_free_slot() -> None:
    with bench_with_a_full_decode_stage() as bench:
        future = bench.submit(10, steps=1, guidance_scale=1)
        bench.runner.picture_gate.set()
        assert picture(future).any()


def test_a_decode_thread_that_cannot_start_ends_the_loop_and_leaves_no_job_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    with bench_of(FakeRunner(decodes_beside=True)) as bench:
        monkeypatch.setattr(bench.engine._decode_stage._decode_thread, "submit", refuse)
        future = bench.submit(1)
        bench.engine.start()
        assert isinstance(error_of(future), EngineStoppedError)
        assert bench.failed.wait(SOON_S)


def test_an_engine_whose_decode_call_hangs_is_not_alive() -> None:
    with bench_in_decode(job_timeout_s=10.0) as (bench, runner, future):
        assert bench.engine.is_alive()
        bench.now_s = 11.0
        assert not bench.engine.is_alive()
        runner.decode_gate.set()
        wait([future], SOON_S)


def test_a_step_of_one_job_that_is_out_of_memory_waits_for_the_decode_stage() -> None:
    with bench_in_decode() as (bench, runner, first):
        runner.oom_calls = {1}
        second = bench.submit(2, steps=1)
        runner.decode_gate.set()
        assert picture(first) is not None
        assert picture(second) is not None
        assert runner.batches == [[1], [2]]


def stage_of(
    runner: FakeRunner, delivered: list[tuple[int, Outcome]] | None = None
) -> DecodeStage[FakeState]:
    """A decode stage without an engine. `delivered` gets the seed and the outcome of each job."""
    delivered = [] if delivered is None else delivered
    return DecodeStage(
        runner,
        lambda ticket, outcome: delivered.append((ticket.job.seed, outcome)),
        lambda error: pytest.fail(repr(error)),
        lambda: None,
        clock=lambda: 0.0,
    )


def tickets_of(runner: FakeRunner, *seeds: int) -> list[Ticket[FakeState]]:
    jobs = [job_of(seed) for seed in seeds]
    return [Ticket(job.id, job, deadline_s=1.0, state=runner.prepare(job)) for job in jobs]


def test_a_decode_call_that_fails_is_halved_down_to_the_job_that_fails_alone() -> None:
    runner = FakeRunner()
    runner.faults[2] = Faults(decode=RuntimeError("vae"))
    outcomes = list(stage_of(runner).decode(tickets_of(runner, 0, 1, 2, 3)))
    assert [type(outcome) for outcome in outcomes] == [Picture, Picture, RenderError, Picture]
    assert runner.decoded == [[0, 1, 2, 3], [0, 1], [2, 3], [2], [3]]


def test_a_machine_fault_is_raised_and_no_half_is_tried() -> None:
    runner = FakeRunner()
    runner.faults[2] = Faults(decode=MachineError("the GPU has fallen off the bus"))
    with pytest.raises(MachineError, match="fallen off the bus"):
        stage_of(runner).decode(tickets_of(runner, 0, 1, 2, 3))
    assert runner.decoded == [[0, 1, 2, 3]]


@pytest.mark.parametrize("beside", [False, True], ids=["between steps", "beside steps"])
def test_outcomes_are_delivered_in_order_and_then_the_stage_is_idle(beside: bool) -> None:
    runner = FakeRunner(decodes_beside=beside)
    delivered: list[tuple[int, Outcome]] = []
    stage = stage_of(runner, delivered)
    stage.add(tickets_of(runner, 0, 1))
    stage.add(tickets_of(runner, 2))
    stage.wait_until_idle()
    assert [seed for seed, _ in delivered] == [0, 1, 2]
    assert all(isinstance(outcome, Picture) for _, outcome in delivered)
    assert stage.started_s == ()
    stage.stop()


@pytest.mark.parametrize("beside", [False, True], ids=["between steps", "beside steps"])
def test_after_a_stop_jobs_are_ignored(beside: bool) -> None:
    runner = FakeRunner(decodes_beside=beside)
    delivered: list[tuple[int, Outcome]] = []
    stage = stage_of(runner, delivered)
    stage.stop()
    stage.add(tickets_of(runner, 0))
    stage.wait_until_idle()
    assert delivered == []
    assert runner.decoded == []
