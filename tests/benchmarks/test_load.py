"""The benchmark of latency under load: arrivals, policies, simulation, and one small run of all of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.benchmarks import load, load_tables
from tests.benchmarks.policies import (
    EARLY,
    MIX,
    ONE,
    OTHERS,
    PADDED,
    POLICIES,
    SMALLCAT,
    STATIC,
    Device,
    Static,
)
from tests.benchmarks.simulation import (
    Arrival,
    Finished,
    Point,
    arrivals,
    capacity,
    runs,
    simulate,
    simulated,
    together,
)
from tests.tiny_models import tiny_sd1
from tests.worker.engine.fake_runner import FakeRunner

#: A step is 1 s for any rows up to 8; a picture is decoded in 0.5 s.
FLAT = Device(((2, 1.0), (8, 1.0)), ((1, 0.5), (4, 2.0)), rows=8)
#: Like a GPU: the first rows cost more.
CURVED = Device(((2, 0.007), (8, 0.019), (32, 0.066)), ((1, 0.01), (8, 0.06)), rows=32)
ALL = {**POLICIES, **OTHERS}


def latencies(policy: str, arriving: list[Arrival], device: Device = FLAT) -> list[float]:
    done = simulate(ALL[policy](device), arriving, device)
    return [round(job.left_s - job.arrived_s, 6) for job in done]


def test_arrivals_are_poisson_in_equal_parts_and_a_seed_gives_the_same_at_any_rate() -> None:
    some = arrivals(3_000, 2.0, seed=1)
    assert Counter(each.steps for each in some) == dict.fromkeys(MIX, 1_000)
    gaps = [later.at_s - earlier.at_s for earlier, later in pairwise(some)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.5, rel=0.05)
    # Exponential: the deviation is the mean, and 63% are below it.
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(mean, rel=0.1)
    assert sum(gap < mean for gap in gaps) / len(gaps) == pytest.approx(1 - math.exp(-1), abs=0.03)
    faster = arrivals(3_000, 4.0, seed=1)
    assert [each.steps for each in faster] == [each.steps for each in some]
    assert [2 * each.at_s for each in faster] == pytest.approx([each.at_s for each in some])
    assert arrivals(9, 2.0, seed=2) != arrivals(9, 2.0, seed=1)
    assert {each.at_s for each in arrivals(5, math.inf, seed=1)} == {0.0}


def test_each_policy_by_hand() -> None:
    """Two jobs, of 20 and of 50 steps, the second after 5 s; all steps cost the same."""
    two = [Arrival(0.0, 20), Arrival(5.0, 50)]
    assert latencies(ONE, two) == [20.5, 65.5 + 0.5]
    # Joins at the next step; the other's picture is decoded between two of its steps.
    assert latencies(SMALLCAT, two) == [20.5, 50 + 0.5 + 0.5]
    assert latencies("all-at-once", two) == latencies("shortest-first", two) == latencies(SMALLCAT, two)
    # The window is a tenth of the 33.3 s of a batch, and the second one came in the first one's batch.
    window_s = FLAT.window_s
    assert window_s == pytest.approx(100 / 30)
    assert latencies(STATIC, two) == pytest.approx([window_s + 20.5, window_s + 20.5 - 5 + 50.5])


def test_static_batches_start_when_they_are_full_or_their_window_is_over() -> None:
    full = [Arrival(0.0, 20), Arrival(1.0, 20), Arrival(2.0, 30), Arrival(2.5, 50), Arrival(2.6, 20)]
    batcher = ALL[STATIC](FLAT)
    assert isinstance(batcher, Static)
    done = simulate(batcher, full, FLAT)
    # Four slots: full at 2.5 s. The fifth job has waited for longer than the window when they are finished.
    assert batcher.batches == [["0", "1", "2", "3"], ["4"]]
    assert [job.left_s for job in done] == [23.5, 23.5, 34.0, 54.5, 75.0]
    assert [job.left_s for job in together(done, batcher.batches)] == [54.5] * 4 + [75.0]
    assert runs(STATIC, batcher, done).keys() == {STATIC, EARLY}


def test_a_padded_batch_costs_all_its_rows_to_the_end() -> None:
    linear = Device(((2, 1.0), (8, 4.0)), ((1, 0.0), (4, 0.0)), rows=4)
    two = [Arrival(0.0, 20), Arrival(0.0, 50)]
    assert latencies(STATIC, two, linear) == [40.0, 40.0 + 30.0]
    assert latencies(PADDED, two, linear) == [40.0, 40.0 + 60.0]


@pytest.mark.parametrize("policy", ALL)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), per_s=st.sampled_from([0.5, 2.0, 6.0, math.inf]))
def test_no_policy_loses_a_job_or_is_faster_than_an_idle_device(policy: str, seed: int, per_s: float) -> None:
    arriving = arrivals(40, per_s, seed)
    done = simulate(ALL[policy](CURVED), arriving, CURVED)
    assert [(job.steps, job.arrived_s) for job in done] == [(each.steps, each.at_s) for each in arriving]
    for job in done:
        assert job.left_s - job.arrived_s >= job.steps * 0.007 + 0.01 - 1e-9


def test_capacity_follows_from_the_costs() -> None:
    assert capacity(POLICIES[ONE], FLAT) == pytest.approx(1 / (100 / 3 + 0.5), rel=1e-6)
    # Four slots, always taken: 100/3 steps of a quarter each, and a picture.
    assert capacity(POLICIES[SMALLCAT], FLAT) == pytest.approx(1 / (100 / 12 + 0.5), rel=0.03)
    rising = [capacity(ALL[policy], CURVED) for policy in (ONE, PADDED, STATIC, SMALLCAT)]
    assert rising == sorted(rising)


def test_a_policy_is_not_run_above_its_capacity() -> None:
    capacities, points = simulated(CURVED, [0.2, 0.7], jobs=60, seed=1)
    at = {(point.load, point.policy): point for point in points}
    assert capacities[ONE] < 0.7 * capacities[SMALLCAT]
    assert at[0.7, ONE] == Point.past_capacity(0.7, ONE)
    assert at[0.2, ONE].per_s is not None
    assert at[0.7, EARLY].latency["all"].mean < at[0.7, STATIC].latency["all"].mean
    assert at[0.7, "alone"].latency["50"].p99 == pytest.approx(50 * 0.007 + 0.01)


def test_a_point_has_figures_over_all_jobs_and_by_steps() -> None:
    done = [Finished(20, 0.0, 1.0), Finished(20, 1.0, 4.0), Finished(50, 1.0, 9.0)]
    point = Point.of(0.5, SMALLCAT, done)
    assert (point.jobs, point.per_s) == (3, pytest.approx(3 / 9))
    assert point.latency.keys() == {"all", "20", "50"}
    assert point.latency["all"].mean == pytest.approx(4.0)
    assert (point.latency["20"].mean, point.latency["20"].p50) == (2.0, 2.0)
    assert point.latency["50"].p95 == 8.0


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_the_engine_runs_every_policy(name: str, beside: bool) -> None:
    """With a runner that takes no time, all jobs are done, in the policy's own batches."""
    runner: Any = FakeRunner(max_rows=8, decodes_beside=beside)
    batcher = load._policy(name, FLAT)
    done, steps = load.serve(runner, batcher, arrivals(12, math.inf, seed=1), "a test", at_once=True)
    assert [job.steps for job in done] == [each.steps for each in arrivals(12, math.inf, seed=1)]
    assert sum(step.rows for step in steps) == 2 * sum(job.steps for job in done)
    most = max(len(batch) for batch in runner.batches)
    assert most == (1 if name == ONE else 4)
    if isinstance(batcher, Static):
        assert [len(batch) for batch in batcher.batches] == [4, 4, 4]
    # In order of arrival, a step at a time.
    assert runner.batches[0][0] == 0
    paced, _ = load.serve(runner, load._policy(name, CURVED), arrivals(6, 500.0, seed=1), "a test")
    assert all(job.left_s > job.arrived_s for job in paced)


def test_capacity_counts_steps_while_all_slots_are_taken() -> None:
    runner: Any = FakeRunner(max_rows=8)
    per_s, slow = load.saturated(runner, SMALLCAT, FLAT, jobs=24)
    # The fake takes no time; a step of FLAT takes a second.
    assert per_s > capacity(POLICIES[SMALLCAT], FLAT)
    assert 0 < slow < 1
    done = sum(len(batch) for batch in runner.batches)
    assert done == sum(each.steps for each in arrivals(24, math.inf, seed=0))


def test_the_load_of_the_targets_gets_more_of_the_time() -> None:
    jobs_at = load.planned({ONE: 1.0, STATIC: 9.0, SMALLCAT: 10.0}, [0.05, 0.7, 0.95], seconds=100.0)
    # Runs: three at 5%, two at 70% that count three times, one at 95%, which static batches cannot do.
    share_s = 100.0 / (3 + 2 * 3 + 1)
    assert jobs_at(0.95) == int(9.5 * share_s)
    assert jobs_at(0.7) == int(7.0 * 3 * share_s)
    assert jobs_at(0.05) == 6


def test_simulation_from_the_costs_of_an_earlier_run(tmp_path: Path) -> None:
    costs = tmp_path / "load.json"
    costs.write_text(json.dumps({"conditions": {"device": "a test"}, "device": asdict(CURVED)}))
    out = tmp_path / "again.json"
    arguments = ["--costs", str(costs), "--loads", "70,95", "--simulated-jobs", "60", "--json", str(out)]
    result = CliRunner().invoke(load.main, arguments)
    assert result.exit_code == 0, result.output
    assert "one: above its capacity of" in result.output
    assert "mean, 20 steps, delivered together" in result.output
    assert result.output.rstrip().endswith("┘")
    written = json.loads(out.read_text())
    assert Device.read(written["device"]) == CURVED
    assert written["conditions"] == {"device": "a test"}
    assert written["measured"] == {"capacity": {}, "points": []}
    assert {point["policy"] for point in written["simulated"]["points"]} == {*ALL, EARLY, "alone"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--loads", "30,100"], "a load must be above 0% and below 100%"),
        (["--loads", "some"], "is not a list of percents"),
        (["--policies", "one,lifo"], "lifo: choose from one, static, smallcat"),
        (["--policies", "one"], "smallcat must be among them"),
    ],
)
def test_options_that_are_not_valid(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(load.main, arguments)
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.replace("│", " ").split())


@pytest.mark.services
def test_the_whole_benchmark_on_a_tiny_model(tmp_path: Path) -> None:
    model, out = tiny_sd1(tmp_path / "tiny"), tmp_path / "load.json"
    arguments = ["--model", str(model), "--max-batch", "4", "--loads", "70", "--jobs", "6", "--seconds", "1"]
    result = CliRunner().invoke(load.main, [*arguments, "--simulated-jobs", "30", "--json", str(out)])
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert [rows for rows, _ in written["device"]["step_curve"]] == [2, 4]
    assert written["measured"]["capacity"].keys() == set(POLICIES)
    assert all(per_s > 0 for per_s in written["measured"]["capacity"].values())
    points = {point["policy"]: point for point in written["measured"]["points"]}
    assert points[SMALLCAT]["jobs"] == 6
    assert points[SMALLCAT]["latency"]["20"]["mean"] > 0


def test_the_targets_are_compared_with_the_measured_and_the_best_simulated_ratios() -> None:
    def points(smallcat_s: float, best_s: float) -> list[Point]:
        latencies = {STATIC: 10.0, EARLY: 8.0, SMALLCAT: smallcat_s, "shortest-first": best_s}
        return [
            Point.of(0.7, policy, [Finished(steps, 0.0, seconds) for steps in MIX])
            for policy, seconds in latencies.items()
        ]

    capacities = {STATIC: 2.0, PADDED: 1.0, SMALLCAT: 3.0}
    table = load_tables.targets(
        ({SMALLCAT: 1.9, STATIC: 2.0}, points(5.0, 5.0)), (capacities, points(7.0, 4.0))
    )
    rows = [list(cells) for cells in zip(*(column.cells for column in table.columns), strict=True)]
    assert rows[0] == ["mean, all jobs, delivered together", "<= 0.6", "0.50 met", "0.70 MISSED", "0.40"]
    assert rows[7] == ["p95, 20 steps, delivered early", "<= 0.6", "0.62 MISSED", "0.88 MISSED", "0.50"]
    assert rows[8:] == [
        ["throughput at saturation, over static", ">= 1", "0.95 MISSED", "1.50 met", ""],
        ["throughput at saturation, over static-padded", ">= 1", "", "3.00 met", ""],
    ]
    assert len(rows) == 10
