"""Measuring what steps cost, with functions in the place of steps. test_model_runner.py has real ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from worker.contract.job import Job
from worker.device import warm_up
from worker.engine import step_cost


def test_the_fastest_of_several_steps_counts_and_rows_that_gain_nothing_end_it() -> None:
    """Up to 8 rows a step takes the same time; from there on, each row costs the same."""
    slow = itertools.cycle([3.0, 1.0, 2.0])
    asked: list[int] = []

    def step_s(rows: int) -> float:
        asked.append(rows)
        return max(8, rows) * next(slow)

    curve, choice = warm_up.measure_steps(step_s, on_gpu=True, max_batch=None)
    assert curve == [(1, 8.0), (2, 8.0), (4, 8.0), (8, 8.0), (16, 16.0), (32, 32.0)]
    assert (choice.what, choice.choice) == ("max rows", "8")
    assert len(asked) == warm_up.TIMES * len(curve)


def test_rows_that_do_not_fit_in_memory_end_it() -> None:
    def step_s(rows: int) -> float:
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    curve, choice = warm_up.measure_steps(step_s, on_gpu=True, max_batch=None)
    assert [rows for rows, _ in curve] == [1, 2, 4]
    assert choice.choice == "4"


def test_no_more_rows_are_measured_than_the_settings_ask_for() -> None:
    curve, choice = warm_up.measure_steps(lambda rows: 1.0, on_gpu=True, max_batch=3)
    assert [rows for rows, _ in curve] == [1, 2]
    assert (choice.choice, choice.reason) == ("3", "SMALLCAT_MAX_BATCH asks for it")


@pytest.mark.parametrize(
    ("asked", "cap", "why"), [(None, "2", "gain less"), (3, "3", "MAX_BATCH"), (32, "6", "by its plan")]
)
def test_no_more_rows_are_measured_than_were_planned(asked: int | None, cap: str, why: str) -> None:
    curve, choice = warm_up.measure_steps(lambda rows: float(rows), on_gpu=True, max_batch=asked, planned=6)
    assert [rows for rows, _ in curve] == [1, 2, 4][: 2 if asked == 3 else 3]
    assert choice.choice == cap
    assert why in choice.reason


def test_a_slow_device_is_measured_at_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(step=10.0)
    monkeypatch.setattr(warm_up.time, "monotonic", lambda: next(seconds))
    curve, _ = warm_up.measure_steps(lambda rows: 1.0, on_gpu=False, max_batch=None)
    assert [rows for rows, _ in curve] == list(step_cost.BATCH_SIZES[: warm_up.MIN_SIZES])


def test_whether_steps_are_compiled_is_a_choice_with_its_reason() -> None:
    asked: list[Job] = []

    def compile_for(job: Job) -> bool:
        asked.append(job)
        return len(asked) == 1

    worked, failed = (warm_up.compile_default(compile_for, on_gpu=True) for _ in range(2))
    assert (worked.choice, failed.choice) == ("yes", "no")
    assert failed.reason == "it failed, see above"
    assert {(job.width, job.height, job.steps) for job in asked} == {(None, None, None)}
    assert warm_up.compile_default(None, on_gpu=True).reason == "SMALLCAT_COMPILE=0"
    assert warm_up.compile_default(None, on_gpu=False).reason == "the CPU runs the plain step"
