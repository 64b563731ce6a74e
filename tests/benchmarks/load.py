"""Latency and throughput under load: smallcat against one job at a time and against static batches.

    python -m tests.benchmarks.load                      the bundled model
    python -m tests.benchmarks.load --model FOLDER       any other, for instance on a GPU
    python -m tests.benchmarks.load --costs LOAD.json    no model: simulates on the costs of an earlier --json

Jobs of 20, 30 and 50 steps in equal parts arrive at random (Poisson), as many a second as the given percents
of smallcat's own capacity. Every policy gets the same arrivals, the same process, model and cap, and the
worker's whole engine: texts are encoded and pictures decoded beside the steps for all of them. What differs
is who shares a step; see `tests.benchmarks.policies`. Of the static batches both ends are told: all pictures
leave with the batch's last one, or each when it is finished.

"slowed" is how much longer a run's steps took than such steps did when they were measured alone. A GPU that
decodes beside them makes some of it; else, where it is not near 1, something else used the machine, and the
run says little.

Since a run of minutes has few jobs, each policy is also simulated for long on the costs that were measured
here, and with it some that no engine could run, to see what the best one would give.
"""

from __future__ import annotations

import json
import os
import queue
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from tests.benchmarks.load_tables import TARGET_LOAD, shown, targets
from tests.benchmarks.policies import MEAN_STEPS, MIX, ONE, POLICIES, ROWS, SMALLCAT, STATIC, Device, Static
from tests.benchmarks.simulation import Arrival, Finished, Point, arrivals, runs, simulate, simulated
from worker.contract.errors import SmallcatError
from worker.contract.job import Job, Scheduler
from worker.contract.settings import WorkerSettings, worker_settings
from worker.device.job_state import JobState
from worker.device.model_runner import ModelRunner
from worker.engine.batcher import Batcher
from worker.engine.engine import Engine
from worker.engine.ticket import Rendered

#: How much more of the time the load of the targets gets than others.
TARGET_WEIGHT = 3
#: Seconds after which a job that has not come is a failure of the benchmark.
PATIENCE_S = 600.0
#: Parts of the time for measuring capacities; what is planned for points, for they end late.
CAPACITY_SHARE, POINTS_SHARE = 0.2, 0.85
#: Times that each capacity is measured.
CAPACITY_TURNS = 2


class _Waiting(Static):
    """Static batches in an engine, which asks again at once as long as somebody waits."""

    def next_batch(self, now_s: float) -> list[Any]:
        batch = super().next_batch(now_s)
        if not batch and len(self):
            time.sleep(1e-3)
        return batch


def _policy(name: str, device: Device) -> Batcher[Any]:
    return _Waiting(device, device.window_s) if name == STATIC else POLICIES[name](device)


def job_of(number: int, steps: int, of: str) -> Job:
    """A job of the model's own size, whose prompt nobody has asked for before."""
    # Euler takes as many forwards as there are steps, whatever the model.
    return Job(
        prompt=f"a small cat, {of}, picture {number}",
        seed=number,
        steps=steps,
        guidance_scale=7.5,
        scheduler=Scheduler.EULER,
    )


def measure(runner: ModelRunner) -> Device:
    """The costs of steps and of decoding, each number of rows warmed up first."""
    lane = runner.prepare(job_of(0, 50, "measured")).lane
    seats = max(1, runner.cap(lane) // ROWS)
    steps, decoding = [], []
    # Every bucket of rows that a GPU captures, so that none is captured in a run.
    for jobs in [n for n in range(1, seats + 1) if n <= 16 or n % 4 == 0 or n == seats]:
        renders = [runner.prepare(job_of(number, 50, "measured")) for number in range(jobs)]
        if sum(render.rows for render in renders) != ROWS * jobs:
            raise click.ClickException("This model takes no guidance: the mix of jobs needs two rows a job.")
        steps.append((ROWS * jobs, _seconds(partial(runner.step, renders))))
        if jobs in (1, min(8, seats)):
            decoding.append((jobs, _seconds(partial(_decode, runner, renders))))
    return Device(tuple(steps), tuple(decoding), ROWS * seats)


def _decode(runner: ModelRunner, renders: Sequence[JobState]) -> None:
    for picture in runner.decode(renders):
        if isinstance(picture, SmallcatError):
            raise picture


def _seconds(work: Callable[[], object]) -> float:
    """The fastest of five, after two to warm up: what else the machine does is not part of the cost."""
    seconds = []
    for _ in range(7):
        started_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds[2:])


@dataclass(frozen=True)
class Step:
    """A step that an engine ran."""

    #: When it was over, seconds after the start.
    at_s: float
    rows: int
    seconds: float


def slowness(steps: Sequence[Step], device: Device) -> float:
    """Seconds of the steps over what they cost: much above 1, the machine had other things to do as well."""
    return sum(step.seconds for step in steps) / sum(device.step_s(None, step.rows) for step in steps)


def serve(
    runner: ModelRunner, batcher: Batcher[Any], arriving: Sequence[Arrival], of: str, *, at_once: bool = False
) -> tuple[list[Finished], list[Step]]:
    """Run jobs through an engine with `batcher`, in real time.

    Returns the jobs in the order of arrival, and the engine's steps. With `at_once`, all jobs are there
    before the start.
    """
    steps: list[Step] = []
    over: queue.Queue[tuple[int, float, Future[Rendered]]] = queue.Queue()
    engine = Engine(
        runner,
        job_timeout_s=PATIENCE_S,
        on_death=lambda error: None,  # All futures have been given back by then, and say it.
        on_step=lambda rows, seconds: steps.append(Step(time.monotonic() - start_s, rows, seconds)),
    )
    engine._batcher = batcher
    left_s, start_s = [0.0] * len(arriving), time.monotonic()

    def send(number: int) -> None:
        future = engine.submit(str(number), job_of(number, arriving[number].steps, of))
        future.add_done_callback(lambda future: over.put((number, time.monotonic(), future)))

    # As many threads as a worker has for its jobs, or more: their texts are encoded there.
    with ThreadPoolExecutor(8) as pool:
        if at_once:
            list(pool.map(send, range(len(arriving))))
        start_s = time.monotonic()
        engine.start()
        try:
            for number, arrival in enumerate(arriving):
                if not at_once:
                    time.sleep(max(0.0, start_s + arrival.at_s - time.monotonic()))
                    pool.submit(send, number)
            for _ in arriving:
                number, now_s, future = over.get(timeout=PATIENCE_S)
                future.result()
                left_s[number] = now_s - start_s
        finally:
            engine.stop()
    done = [Finished(each.steps, each.at_s, end) for each, end in zip(arriving, left_s, strict=True)]
    return done, steps


def saturated(runner: ModelRunner, name: str, device: Device, jobs: int) -> tuple[float, float]:
    """Jobs a second of a policy with `jobs` waiting from the start, until its first seat stays empty.

    And how slow the machine was.
    """
    seats = 1 if name == ONE else device.seats
    arriving = arrivals(jobs, float("inf"), seed=0)
    done, steps = serve(runner, _policy(name, device), arriving, f"capacity of {name}", at_once=True)
    until_s = sorted(job.left_s for job in done)[-seats - 1]
    rows = sum(step.rows for step in steps if step.at_s <= until_s)
    return rows / (ROWS * MEAN_STEPS) / until_s, slowness(steps, device)


def capacities_of(
    runner: ModelRunner, device: Device, names: Sequence[str], seconds: float, say: Callable[[str], None]
) -> dict[str, float]:
    """Jobs a second of each policy, in about `seconds`; at least the time of two full batches each.

    Measured in turns, and the most counts: what else the machine does is not part of it.
    """
    found, (expected, _) = dict.fromkeys(names, 0.0), simulated(device, [], 0, seed=0)
    for name in [*names] * CAPACITY_TURNS:
        seats = 1 if name == ONE else device.seats
        batches = round(expected[name] * seconds / len(names) / CAPACITY_TURNS / seats)
        per_s, slow = saturated(runner, name, device, seats * max(2, batches))
        found[name] = max(found[name], per_s)
        say(f"capacity, {name}: {per_s:.3g} images/s, slowed {slow:.2f}; simulated {expected[name]:.3g}")
    return found


def points_of(
    runner: ModelRunner,
    device: Device,
    capacities: dict[str, float],
    loads: Sequence[float],
    jobs_at: Callable[[float], int],
    seed: int,
    say: Callable[[str], None],
) -> list[Point]:
    """What each policy gives with `jobs_at(load)` jobs, where that is not past its capacity."""
    points = []
    for load in loads:
        per_s = load * capacities[SMALLCAT]
        arriving = arrivals(jobs_at(load), per_s, seed)
        for name in capacities:
            if per_s >= capacities[name]:
                points.append(Point.past_capacity(load, name))
                continue
            batcher, expected = _policy(name, device), POLICIES[name](device)
            done, steps = serve(runner, batcher, arriving, f"{name} at {load:.0%}")
            slow = slowness(steps, device)
            foreseen = runs(name, expected, simulate(expected, arriving, device))
            for policy, jobs in runs(name, batcher, done).items():
                points.append(Point.of(load, policy, jobs, slowed=slow))
                mean_s, expected_s = (
                    statistics.mean(map(_latency_s, each)) for each in (jobs, foreseen[policy])
                )
                say(
                    f"{load:.0%}, {policy}: mean {mean_s:.3g} s, slowed {slow:.2f}; "
                    f"the same jobs simulated {expected_s:.3g} s"
                )
    return points


def _latency_s(job: Finished) -> float:
    return job.left_s - job.arrived_s


def planned(capacities: dict[str, float], loads: Sequence[float], seconds: float) -> Callable[[float], int]:
    """How many jobs each load gets so that all runs together take about `seconds`; more for the targets."""
    per_s = {load: load * capacities[SMALLCAT] for load in loads}
    weight = {load: TARGET_WEIGHT if load == TARGET_LOAD else 1 for load in loads}
    able = {load: sum(each > per_s[load] for each in capacities.values()) for load in loads}
    share_s = seconds / sum(weight[load] * able[load] for load in loads)
    return lambda load: max(2 * len(MIX), int(per_s[load] * weight[load] * share_s))


def _percents(context: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    try:
        loads = [float(part) / 100 for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of percents, like 30,50,70") from None
    if not all(0 < load < 1 for load in loads):
        raise click.BadParameter(f"{value!r}: a load is above 0% and below 100%")
    return loads


def _names(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",")]
    if unknown := set(names) - set(POLICIES):
        raise click.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(POLICIES)}")
    if SMALLCAT not in names:
        raise click.BadParameter(f"{SMALLCAT} must be among them: loads are parts of its capacity")
    return names


def _settings(model: str, max_batch: int | None) -> WorkerSettings:
    asked = {"SMALLCAT_MODEL": model, "SMALLCAT_MAX_BATCH": str(max_batch or "")}
    return worker_settings({**os.environ, **{name: value for name, value in asked.items() if value}})


@click.command()
@click.option(
    "--model", default="", help="Folder, file or hub id. Not given: SMALLCAT_MODEL, or the bundled one."
)
@click.option("--max-batch", type=int, help="Rows of a step, at most. Not given: measured.")
@click.option("--loads", default="30,50,70,85,95", show_default=True, callback=_percents, help="Percents.")
@click.option("--policies", default=",".join(POLICIES), show_default=True, callback=_names)
@click.option("--seconds", default=240.0, show_default=True, help="Time for all, start included, about.")
@click.option("--jobs", type=int, help="Jobs a run, instead of as many as fit in the time.")
@click.option("--simulated-jobs", default=3_000, show_default=True, help="Jobs of a simulated run.")
@click.option("--costs", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--seed", default=1, show_default=True, help="Of the arrivals.")
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here."
)
def main(
    model: str,
    max_batch: int | None,
    loads: list[float],
    policies: list[str],
    seconds: float,
    jobs: int | None,
    simulated_jobs: int,
    costs: Path | None,
    seed: int,
    file: Path | None,
) -> None:
    """Measure and simulate latency under load."""
    # Into a file, too, the tables are as wide as they are.
    console = Console(width=None if sys.stdout.isatty() else 170)
    real: tuple[dict[str, float], list[Point]] = ({}, [])
    conditions: dict[str, str] = {}
    if costs is not None:
        earlier = json.loads(costs.read_text())
        device, conditions = Device.read(earlier["device"]), earlier["conditions"]
    else:
        started_s = time.monotonic()
        runner = ModelRunner(_settings(model, max_batch))
        choices = [*runner.choices, *runner.warm_up()]
        conditions = {each.what: f"{each.choice}: {each.reason}" for each in choices}
        conditions["load of the machine at start"] = f"{os.getloadavg()[0]:.1f}, {os.cpu_count()} cores"
        for what, told in conditions.items():
            console.print(f"{what}: {told}", highlight=False, soft_wrap=True)
        device = measure(runner)
        # Whatever the start took, a quarter of the time is for the runs.
        ends_s = max(started_s + seconds, time.monotonic() + seconds / 4)
        share_s = CAPACITY_SHARE * (ends_s - time.monotonic())
        capacities = capacities_of(runner, device, policies, share_s, console.print)
        share_s = POINTS_SHARE * (ends_s - time.monotonic())
        jobs_at = planned(capacities, loads, share_s) if jobs is None else lambda load: jobs
        real = capacities, points_of(runner, device, capacities, loads, jobs_at, seed, console.print)
    simulation = simulated(device, loads, simulated_jobs, seed)
    if file is not None:
        figures = {"conditions": conditions, "device": asdict(device)}
        for name, (capacities, points) in (("measured", real), ("simulated", simulation)):
            figures[name] = {"capacity": capacities, "points": [asdict(point) for point in points]}
        file.write_text(json.dumps(figures, indent=1) + "\n")
    step_ms = ", ".join(f"{rows}: {1e3 * seconds:.3g}" for rows, seconds in device.step_curve)
    decode_ms = ", ".join(f"{count}: {1e3 * seconds:.3g}" for count, seconds in device.decode_curve)
    console.print(f"ms a step by rows: {step_ms}\nms to decode by pictures: {decode_ms}", highlight=False)
    console.print(f"at most {device.rows} rows; window of static batches {device.window_s:.3g} s")
    if real[1]:
        console.print(shown("Measured: seconds from arrival to picture", *real))
    console.print(shown(f"Simulated on these costs, {simulated_jobs} jobs a run", *simulation))
    console.print(targets(real, simulation))


if __name__ == "__main__":
    main()
