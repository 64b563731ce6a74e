"""What steps cost, before and after they are compiled; the GPU's clock is the test's own."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from worker.contract.served_model import Defaults
from worker.device.costs import Costs
from worker.device.step_times import StepTimes
from worker.engine.step_cost import choose_cap

UNCOMPILED = [(2, 0.070), (4, 0.100), (8, 0.150)]


def ms(rows: int) -> float:
    """Milliseconds of a compiled step: larger ones gain up to 16 rows."""
    return {2: 36.0, 4: 64.0, 8: 120.0, 16: 224.0, 32: 446.0, 64: 890.0}[rows]


@pytest.fixture
def costs() -> Costs:
    family: Any = SimpleNamespace(
        lane=lambda width, height: (4, height // 8, width // 8),
        area=lambda lane: lane[1] * lane[2],
        rows=lambda guidance: 2 if guidance > 1 else 1,
    )
    made = Costs(family, Defaults(width=512, height=512, steps=50, guidance_scale=7.5), None)
    made.window = 77
    made.measured(UNCOMPILED, 8)
    return made


class Gpu:
    """Runs steps of jobs, compiled ones, and says what each took."""

    def __init__(self, costs: Costs) -> None:
        self.costs, self.is_compiled = costs, True
        self.clock_ms, self.ran = 0.0, list[int]()
        self.times = StepTimes(costs, lambda: self.is_compiled, self.event)

    def event(self) -> Any:
        event = SimpleNamespace(at_ms=0.0, query=lambda: True)
        event.record = lambda: setattr(event, "at_ms", self.clock_ms)
        event.elapsed_time = lambda other: other.at_ms - event.at_ms
        return event

    def step(self, rows: int, *, tokens: int = 77, loras: int = 0, lane: Any = (4, 64, 64)) -> None:
        def run(groups: Any) -> Any:
            self.clock_ms += ms(rows)
            self.ran.append(rows)
            return groups

        state = SimpleNamespace(lane=lane, rows=rows, text_tokens=tokens, lora_rows=loras)
        groups: Any = [[state]]
        assert self.times.run(run, groups) is groups


def test_after_the_change_batches_follow_what_compiled_steps_cost(
    costs: Costs, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, lane = Gpu(costs), (4, 64, 64)
    before_s = costs.job_s
    costs.search()
    with caplog.at_level(logging.INFO):
        for _ in range(100):
            gpu.step(costs.cap(lane))
    assert not costs.is_searching
    cap, _ = choose_cap([(rows, ms(rows) / 1e3) for rows in (2, 4, 8, 16, 32)])
    assert costs.cap(lane) == costs.max_rows == cap == 16
    assert costs.step_s(lane, 8) == pytest.approx(0.120)
    assert costs.job_s < before_s
    # Another size's cap follows by its area.
    assert costs.cap((4, 128, 64)) == 8
    assert [line.split(":")[0] for line in caplog.messages] == ["max rows"]


def test_steps_of_another_kind_say_nothing(costs: Costs) -> None:
    gpu = Gpu(costs)
    costs.search()
    gpu.step(8)
    for _ in range(100):
        gpu.step(2, tokens=154)
        gpu.step(2, loras=2)
        gpu.step(2, lane=(4, 96, 96))
    gpu.is_compiled = False
    gpu.step(2)
    assert costs.is_searching
    assert costs.cap((4, 64, 64)) == 2
    assert costs.cap((4, 96, 64)) == 5


def test_where_the_settings_say_how_many_nothing_is_searched() -> None:
    family: Any = SimpleNamespace(lane=lambda width, height: (4, 8, 8), area=lambda lane: 64)
    costs = Costs(family, Defaults(width=64, height=64, steps=1, guidance_scale=1), 6)
    costs.search()
    assert not costs.is_searching
    assert costs.cap((4, 8, 8)) == 6


@pytest.mark.parametrize(("asked", "caps"), [(None, [8, 16, 5, 2, 1]), (32, [8, 20, 6, 2, 1])])
def test_no_step_has_more_latents_than_was_planned(costs: Costs, asked: int | None, caps: list[int]) -> None:
    planned = Costs(costs._family, costs._defaults, asked, 10)
    planned.measured(UNCOMPILED, 8 if asked is None else 10)
    lanes = [(4, 64, 64), (4, 32, 64), (4, 64, 96), (4, 128, 128), (4, 512, 512)]
    assert [planned.cap(lane) for lane in lanes] == caps


def test_no_more_rows_are_tried_than_were_planned(costs: Costs) -> None:
    planned = Costs(costs._family, costs._defaults, None, 10)
    planned.window = 77
    planned.measured(UNCOMPILED, 8)
    planned.search()
    gpu = Gpu(planned)
    for _ in range(100):
        gpu.step(planned.cap((4, 64, 64)))
    assert max(gpu.ran) == planned.max_rows == 8
    assert not planned.is_searching


@pytest.mark.parametrize(
    ("asked", "planned", "usual", "most"),
    [(None, None, 16, 32), (None, 24, 16, 24), (None, 8, 8, 8), (16, None, 16, 16), (6, 24, 6, 6)],
)
def test_where_many_jobs_wait_steps_have_the_rows_of_least_time_a_row_that_fit_and_are_allowed(
    costs: Costs, asked: int | None, planned: int | None, usual: int, most: int
) -> None:
    bounded = Costs(costs._family, costs._defaults, asked, planned)
    bounded.measured([(8, 8 * 0.00228), (16, 16 * 0.00216), (32, 32 * 0.00209)], asked or 16)
    lane = (4, 64, 64)
    assert (bounded.cap(lane), bounded.most(lane), bounded.most_rows) == (usual, most, most)


def test_while_sizes_are_tried_no_other_is_taken(costs: Costs) -> None:
    gpu, lane = Gpu(costs), (4, 64, 64)
    costs.search()
    gpu.step(8)
    for _ in range(6):
        assert costs.cap(lane) == costs.most(lane)
        gpu.step(costs.cap(lane))
