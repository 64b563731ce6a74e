"""The loop: a job fails alone, no step is lost, and every future is resolved, whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.engine.engine_bench import Bench, bench_of, error_of, picture
from tests.worker.engine.fake_runner import SOON_S, FakeRunner, Faults, job_of, picture_of
from worker.contract.errors import (
    EngineFailedError,
    EngineStoppedError,
    JobCancelledError,
    JobTimeoutError,
    JobTooLargeError,
    MachineError,
    NotFiniteError,
    OutOfMemoryError,
    RenderError,
    SmallcatError,
)


def test_a_job_becomes_its_picture(bench: Bench, runner: FakeRunner) -> None:
    runner.warnings[3] = ("cut",)
    bench.engine.start()
    rendered = bench.submit(3, steps=5).result(SOON_S)
    assert np.array_equal(rendered.picture.pixels, picture_of(job_of(3)).pixels)
    assert rendered.warnings == ("cut",)
    assert runner.steps_done[3] == 5
    assert bench.steps == [2] * 5


def test_jobs_that_wait_together_are_rendered_together_whatever_their_steps(
    bench: Bench, runner: FakeRunner
) -> None:
    futures = [bench.submit(1, steps=1), bench.submit(2, steps=3), bench.submit(3, guidance_scale=1, steps=2)]
    bench.engine.start()
    wait(futures, SOON_S)
    assert runner.batches == [[1, 2, 3], [2, 3], [2]]


def test_a_job_joins_at_the_next_step(bench: Bench, runner: FakeRunner) -> None:
    runner.gate.clear()
    bench.engine.start()
    first = bench.submit(1, steps=3)
    assert runner.entered.wait(SOON_S)
    second = bench.submit(2, steps=1)
    runner.gate.set()
    wait([first, second], SOON_S)
    assert runner.batches == [[1], [1, 2], [1]]


def test_a_job_that_needs_fewer_rows_for_a_while_leaves_them_to_others(runner: FakeRunner) -> None:
    """As with a guidance interval: 1, 2, 1 rows of the three."""
    runner.max_rows = 3
    runner.rows[1] = [1, 2, 1]
    with bench_of(runner) as bench:
        futures = [
            bench.submit(1, steps=3),
            *(bench.submit(seed, guidance_scale=1, steps=2) for seed in (2, 3)),
        ]
        bench.engine.start()
        wait(futures, SOON_S)
        assert runner.batches == [[1, 2, 3], [1, 2], [1, 3]]


def test_jobs_of_equal_ids_share_one_picture(bench: Bench, runner: FakeRunner) -> None:
    one, other = bench.submit(1), bench.submit(1)
    bench.engine.start()
    assert picture(one) is picture(other)
    assert runner.prepared == [1]
    # After its end, the same job is a new one.
    assert picture(bench.submit(1)) is not picture(one)


# --- a job fails alone ------------------------------------------------------------------------------------

FAILURES: dict[str, tuple[Faults, type[SmallcatError], int]] = {
    "prepare fails": (Faults(prepare=RuntimeError("tokenizer")), RenderError, 0),
    "prepare fails by name": (Faults(prepare=NotFiniteError("noise")), NotFiniteError, 0),
    "prepare does not fit": (Faults(prepare=OutOfMemoryError("2 GiB")), JobTooLargeError, 0),
    "a step reports it": (Faults(outcome={2: NotFiniteError("NaN")}), NotFiniteError, 2),
    "its first step reports it": (Faults(outcome={0: NotFiniteError("NaN")}), NotFiniteError, 0),
    "a whole step raises": (Faults(batch={2: RuntimeError("shape")}), RenderError, 2),
    "the first step raises": (Faults(batch={0: ValueError("shape")}), RenderError, 0),
    "decoding raises": (Faults(decode=RuntimeError("vae")), RenderError, 4),
    "decoding does not fit": (Faults(decode=OutOfMemoryError("vae")), JobTooLargeError, 4),
    "the picture is not finite": (Faults(nan=True), NotFiniteError, 4),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("index", range(4))
def test_a_job_fails_alone_and_the_others_run_every_step_once(
    bench: Bench, runner: FakeRunner, failure: str, index: int
) -> None:
    faults, kind, steps = FAILURES[failure]
    runner.faults[index] = faults
    futures = bench.submit_together(0, 1, 2, 3)
    bench.engine.start()
    assert type(error_of(futures[index])) is kind
    for seed in {0, 1, 2, 3} - {index}:
        assert np.array_equal(picture(futures[seed]), picture_of(job_of(seed)).pixels)
        assert runner.steps_done[seed] == 4
    assert runner.steps_done[index] == steps
    assert not bench.failures


def test_an_unknown_error_becomes_a_render_error_that_quotes_it(bench: Bench, runner: FakeRunner) -> None:
    runner.faults[1] = Faults(batch={0: ValueError("mat1 and mat2")})
    bench.engine.start()
    error = error_of(bench.submit(1))
    assert str(error) == "The model failed on this job alone: ValueError: mat1 and mat2"
    assert isinstance(error.__cause__, ValueError)


def test_all_jobs_may_fail_and_the_engine_goes_on(bench: Bench, runner: FakeRunner) -> None:
    for seed in range(4):
        runner.faults[seed] = Faults(batch={seed: RuntimeError("each")})
    futures = bench.submit_together(0, 1, 2, 3)
    bench.engine.start()
    assert all(isinstance(error_of(future), RenderError) for future in futures)
    assert picture(bench.submit(9)) is not None


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [{1}, {0, 1, 2, 3}], ids=["one of four", "all"])
def test_what_does_not_fit_beside_a_step_is_tried_again_with_nothing_beside_it(
    bench: Bench, runner: FakeRunner, seeds: set[int]
) -> None:
    runner.out_of_memory_beside = seeds
    bench.engine.start()
    futures = bench.submit_together(0, 1, 2, 3)
    for seed, future in enumerate(futures):
        assert np.array_equal(picture(future), picture_of(job_of(seed)).pixels)
    assert all(runner.prepared.count(seed) == 2 for seed in seeds)
    assert set(runner.steps_done.values()) == {4}


@pytest.mark.parametrize("memory_rows", [2, 3, 4, 6])
def test_out_of_memory_lowers_the_cap_and_loses_no_step(memory_rows: int) -> None:
    runner = FakeRunner(max_rows=8, memory_rows=memory_rows)
    with bench_of(runner) as bench:
        futures = bench.submit_together(0, 1, 2, 3, steps=6)
        bench.engine.start()
        wait(futures, SOON_S)
        assert all(not future.exception() for future in futures)
        assert runner.steps_done == dict.fromkeys(range(4), 6)
        # The cap is kept: a batch size that did not fit is not tried again.
        assert max(bench.steps) <= memory_rows
        assert runner._calls <= len(runner.batches) + 3


@pytest.mark.parametrize("call", range(8))
def test_out_of_memory_at_any_step_loses_no_step(call: int, runner: FakeRunner, bench: Bench) -> None:
    runner.oom_calls = {call}
    futures = bench.submit_together(0, 1, 2, 3)
    bench.engine.start()
    wait(futures, SOON_S)
    assert all(not future.exception() for future in futures)
    assert runner.steps_done == dict.fromkeys(range(4), 4)


def test_a_job_that_does_not_fit_alone_fails_and_the_others_go_on(bench: Bench, runner: FakeRunner) -> None:
    runner.memory_rows = 1
    futures = [bench.submit(1, guidance_scale=1), bench.submit(2), bench.submit(3, guidance_scale=1)]
    bench.engine.start()
    error = error_of(futures[1])
    assert isinstance(error, JobTooLargeError)
    assert "64x64" in str(error)
    assert picture(futures[0]) is not None
    assert picture(futures[2]) is not None


# --- cancelled or late ------------------------------------------------------------------------------------


def test_a_running_job_is_cancelled_at_its_next_step(bench: Bench, runner: FakeRunner) -> None:
    futures = bench.submit_together(1, 2)
    runner.gate.clear()
    bench.engine.start()
    assert runner.entered.wait(SOON_S)
    bench.cancel(1)
    runner.gate.set()
    assert isinstance(error_of(futures[0]), JobCancelledError)
    assert picture(futures[1]) is not None
    assert (runner.steps_done[1], runner.steps_done[2]) == (1, 4)


def test_a_waiting_job_can_be_cancelled() -> None:
    with bench_of(FakeRunner(max_rows=2)) as bench:
        futures = bench.submit_together(1, 2)
        bench.runner.gate.clear()
        bench.engine.start()
        assert bench.runner.entered.wait(SOON_S)
        bench.cancel(2)
        bench.runner.gate.set()
        assert isinstance(error_of(futures[1]), JobCancelledError)
        assert picture(futures[0]) is not None
        assert bench.runner.steps_done[2] == 0


def test_a_job_that_is_not_in_the_batcher_yet_can_be_cancelled(bench: Bench, runner: FakeRunner) -> None:
    future = bench.submit(1)
    bench.cancel(1)
    bench.engine.start()
    assert isinstance(error_of(future), JobCancelledError)
    assert runner.steps_done[1] == 0


def test_cancelling_a_job_that_is_not_in_flight_does_nothing(bench: Bench) -> None:
    bench.engine.start()
    bench.cancel(7)
    assert picture(bench.submit(7)) is not None


def test_a_job_that_is_submitted_again_after_its_cancellation_goes_on(bench: Bench) -> None:
    first = bench.submit(1)
    bench.cancel(1)
    second = bench.submit(1)
    bench.engine.start()
    assert picture(second) is not None
    assert picture(first) is picture(second)


def test_a_job_past_its_deadline_fails_and_its_error_names_its_last_step(runner: FakeRunner) -> None:
    with bench_of(runner, job_timeout_s=10.0) as bench:
        late = bench.submit(1, steps=4)
        bench.now_s = 5.0
        punctual = bench.submit(2, steps=4)

        def tick(seeds: list[int]) -> None:
            bench.now_s = 10.5 if runner.steps_done[1] == 1 else 6.0

        runner.on_step = tick
        bench.engine.start()
        error = error_of(late)
        assert isinstance(error, JobTimeoutError)
        assert str(error) == "The job was at step 2 of 4 after its limit of 10 s (SMALLCAT_JOB_TIMEOUT_S)."
        assert picture(punctual) is not None


def test_a_jobs_share_of_the_devices_time_is_that_of_its_rows_in_each_step(
    bench: Bench, runner: FakeRunner
) -> None:
    """Each step takes 8 s; the second job has two rows at first, and one in its last two steps."""
    runner.rows = {1: [2] * 4, 2: [2, 2, 1, 1]}

    def tick(seeds: list[int]) -> None:
        bench.now_s += 8

    runner.on_step = tick
    one, two = bench.submit_together(1, 2, steps=4)
    bench.engine.start()
    shares = [future.result(SOON_S).device_s for future in (one, two)]
    assert shares == pytest.approx([4 + 4 + 16 / 3 + 16 / 3, 4 + 4 + 8 / 3 + 8 / 3])
    assert sum(shares) == pytest.approx(bench.now_s)
    runner.rows = {}
    alone = bench.submit(3, steps=2)
    assert alone.result(SOON_S).device_s == pytest.approx(16)


# --- the end ----------------------------------------------------------------------------------------------


def test_draining_finishes_the_jobs_in_flight(bench: Bench, runner: FakeRunner) -> None:
    futures = bench.submit_together(*range(20))
    bench.engine.start()
    bench.engine.drain(SOON_S)
    assert all(future.done() and not future.exception() for future in futures)


def test_draining_gives_back_jobs_that_are_not_done_in_time(bench: Bench, runner: FakeRunner) -> None:
    futures = bench.submit_together(*range(20))
    runner.gate.clear()
    bench.engine.start()
    assert runner.entered.wait(SOON_S)
    drain = threading.Thread(target=bench.engine.drain, args=(0.0,))
    drain.start()
    # They are given back although a step still runs.
    assert all(isinstance(error_of(future), EngineStoppedError) for future in futures)
    runner.gate.set()
    drain.join(SOON_S)
    assert not drain.is_alive()
    assert len(runner.batches) == 1


def test_a_stopped_engine_takes_no_job(bench: Bench) -> None:
    bench.engine.start()
    bench.engine.stop()
    assert isinstance(error_of(bench.submit(1)), EngineStoppedError)
    assert bench.engine.progress() == {}


def test_an_engine_that_never_started_can_be_stopped(bench: Bench) -> None:
    future = bench.submit(1)
    bench.engine.stop()
    assert isinstance(error_of(future), EngineStoppedError)


#: Where an error is raised in one of the jobs.
RAISE_IN: dict[str, Callable[[Bench, BaseException], None]] = {
    "prepare": lambda bench, error: bench.runner.faults.update({2: Faults(prepare=error)}),
    "step": lambda bench, error: bench.runner.faults.update({2: Faults(batch={1: error})}),
    "decode": lambda bench, error: bench.runner.faults.update({2: Faults(decode=error)}),
}


@pytest.mark.parametrize("where", RAISE_IN)
def test_a_machine_fault_ends_the_loop_gives_all_jobs_back_and_is_reported(bench: Bench, where: str) -> None:
    fault = MachineError("the GPU has fallen off the bus")
    RAISE_IN[where](bench, fault)
    futures = bench.submit_together(*range(12))
    bench.engine.start()
    assert bench.failed.wait(SOON_S)
    assert bench.failures == [fault]
    # All have been given back by the time it is reported: a machine fault is no job's error.
    assert all(future.done() for future in futures)
    errors = [error for future in futures if (error := future.exception())]
    assert errors
    assert all(isinstance(error, EngineFailedError) and error.by_machine for error in errors)
    assert not bench.engine.is_alive()
    assert isinstance(error_of(bench.submit(99)), EngineStoppedError)


def test_a_bug_in_the_loop_itself_gives_all_jobs_back_and_is_reported(runner: FakeRunner) -> None:
    with bench_of(runner) as bench:
        bench.steps = None  # type: ignore[assignment]  # what it reports to
        futures = bench.submit_together(1, 2)
        bench.engine.start()
        assert bench.failed.wait(SOON_S)
        errors = [error_of(future) for future in futures]
        assert all(isinstance(error, EngineFailedError) and not error.by_machine for error in errors)


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("where", RAISE_IN)
def test_an_exception_of_a_library_in_one_job_ends_neither_loop_nor_process(
    bench: Bench, where: str, error: BaseException
) -> None:
    RAISE_IN[where](bench, error)
    futures = bench.submit_together(*range(4))
    bench.engine.start()
    assert isinstance(error_of(futures[2]), RenderError)
    assert all(picture(futures[seed]) is not None for seed in (0, 1, 3))
    assert not bench.failures


def test_an_engine_is_alive_before_its_start_and_while_it_works(bench: Bench) -> None:
    assert bench.engine.is_alive()
    bench.engine.start()
    assert picture(bench.submit(1)) is not None
    assert bench.engine.is_alive()


def test_an_engine_whose_step_takes_longer_than_a_job_may_is_not_alive(runner: FakeRunner) -> None:
    with bench_of(runner, job_timeout_s=10.0) as bench:
        runner.gate.clear()
        bench.engine.start()
        future = bench.submit(1)
        assert runner.entered.wait(SOON_S)
        bench.now_s = 9.0
        assert bench.engine.is_alive()
        bench.now_s = 11.0
        assert not bench.engine.is_alive()
        runner.gate.set()
        wait([future], SOON_S)


def test_progress_is_reported_for_all_jobs_in_flight() -> None:
    with bench_of(FakeRunner(max_rows=2)) as bench:
        bench.submit_together(1, 2)
        assert bench.engine.progress() == {job_of(1).id: (0, 4), job_of(2).id: (0, 4)}
        bench.runner.gate.clear()
        bench.engine.start()
        assert bench.runner.entered.wait(SOON_S)
        assert bench.engine.progress() == {job_of(1).id: (0, 4), job_of(2).id: (0, 4)}


def test_progress_counts_the_steps_that_a_job_asks_for_and_not_evaluations_of_the_model() -> None:
    runner, seen = FakeRunner(), []
    runner.order = 2
    with bench_of(runner) as bench:
        runner.on_step = lambda seeds: seen.append(bench.engine.progress()[job_of(1).id])
        future = bench.submit(1)
        bench.engine.start()
        wait([future], SOON_S)
    assert seen == [(step // 2, 4) for step in range(8)]


# --- any order of events ----------------------------------------------------------------------------------

FAULTS = st.one_of(
    st.builds(Faults),
    st.builds(Faults),
    st.builds(Faults),
    st.builds(Faults, prepare=st.just(RuntimeError("prepare"))),
    st.builds(
        Faults, outcome=st.dictionaries(st.integers(0, 3), st.just(NotFiniteError("step")), max_size=1)
    ),
    st.builds(Faults, batch=st.dictionaries(st.integers(0, 3), st.just(RuntimeError("batch")), max_size=1)),
    st.builds(Faults, decode=st.just(RuntimeError("decode"))),
    st.builds(Faults, nan=st.just(True)),
)


@dataclass(frozen=True)
class Script:
    """What happens in one life of an engine."""

    jobs: list[tuple[Faults, int, int, float]]
    cancelled: set[int]
    max_rows: int
    memory_rows: int
    oom_calls: set[int]
    #: At which call of `step` the machine fails; None: it does not.
    fails_at: int | None
    stop: bool


SCRIPTS = st.builds(
    Script,
    jobs=st.lists(
        st.tuples(FAULTS, st.integers(1, 4), st.sampled_from([64, 72]), st.sampled_from([1.0, 7.5])),
        min_size=1,
        max_size=8,
    ),
    cancelled=st.sets(st.integers(0, 7), max_size=2),
    max_rows=st.integers(1, 8),
    memory_rows=st.integers(1, 8),
    oom_calls=st.sets(st.integers(0, 12), max_size=3),
    fails_at=st.none() | st.integers(0, 12),
    stop=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(SCRIPTS)
def test_every_future_is_resolved_whatever_happens(script: Script) -> None:
    runner = FakeRunner(script.max_rows, script.memory_rows)
    runner.oom_calls = script.oom_calls
    runner.faults = dict(enumerate(faults for faults, *_ in script.jobs))
    calls = 0

    def on_step(seeds: list[int]) -> None:
        nonlocal calls
        calls += 1
        if script.fails_at is not None and calls > script.fails_at:
            raise MachineError

    runner.on_step = on_step
    with bench_of(runner) as bench:
        futures = []
        for seed, (_, steps, width, guidance) in enumerate(script.jobs):
            fields: dict[str, object] = {"steps": steps, "width": width, "guidance_scale": guidance}
            futures.append(bench.submit(seed, **fields))
            if seed == len(script.jobs) // 2:
                bench.engine.start()
            if seed in script.cancelled:
                bench.cancel(seed, **fields)
        if script.stop:
            bench.engine.stop()
        assert not wait(futures, SOON_S).not_done
        for seed, (future, (faults, steps, _, guidance)) in enumerate(zip(futures, script.jobs, strict=True)):
            error = future.exception()
            assert error is None or isinstance(error, SmallcatError)
            assert not isinstance(error, OutOfMemoryError)
            in_time = [step for step in (*faults.outcome, *faults.batch) if step < steps]
            harmless = not (in_time or faults.prepare or faults.decode or faults.nan)
            fits = script.memory_rows >= (2 if guidance > 1 else 1) and not script.oom_calls
            ends = script.stop or script.fails_at is not None
            if harmless and fits and not ends and seed not in script.cancelled:
                assert error is None
            if error is None:
                assert runner.steps_done[seed] == steps
            if isinstance(error, EngineStoppedError):
                assert ends
