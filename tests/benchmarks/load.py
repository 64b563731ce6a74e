"""Measures latency and throughput under load, against one job at a time and against static batches.

    python -m tests.benchmarks.load                      the bundled model
    python -m tests.benchmarks.load --model FOLDER       another model, for instance on a GPU
    python -m tests.benchmarks.load --costs LOAD.json    only simulates, with the costs of an earlier --json

Jobs of 20, 30 and 50 steps in equal parts arrive at random (Poisson). The loads are percents of smallcat's
own capacity. Every policy gets the same arrivals, process, model and cap, and the worker's whole engine: for
all of them, texts are encoded and pictures decoded beside the steps. Only the choice of the jobs that share a
step differs, see `tests.benchmarks.policies`. Static batches have two results: all pictures are delivered
with the last one of the batch ("static"), or each when it is finished ("static-early").

"slowdown" is the time of a run's steps over that of the same steps measured alone. On a GPU, decoding beside
steps is part of it. If it is far above 1 for another reason, other programs used the machine, and the run is
not reliable.

A run of minutes has few jobs. So each policy is also simulated for long with the measured costs, and with it
some policies that no engine could run, for comparison with the best one.
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
from worker.contract.choices import Scheduler
from worker.contract.errors import SmallcatError
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings, worker_settings
from worker.device.job_state import JobState
from worker.device.model_runner import ModelRunner
from worker.engine.batcher import Batcher
from worker.engine.engine import Engine
from worker.engine.ticket import Rendered

#: The load of the targets gets so many times the time of other loads.
TARGET_WEIGHT = 3
#: Seconds after which the benchmark fails if a job is not finished.
JOB_TIMEOUT_S = 600.0
#: Shares of the time for the capacities, and of the rest for the points, which end late.
CAPACITY_SHARE, POINTS_SHARE = 0.2, 0.85
#: Times that each capacity is measured.
CAPACITY_TURNS = 2


class _Waiting(Static):
    """Static batches in an engine, which asks for a batch again and again while jobs wait."""

    def next_batch(self, now_s: float) -> list[Any]:
        batch = super().next_batch(now_s)
        if not batch and len(self):
            time.sleep(1e-3)
        return batch


def _policy(name: str, device: Device) -> Batcher[Any]:
    return _Waiting(device, device.window_s) if name == STATIC else POLICIES[name](device)


def job_of(number: int, steps: int, of: str) -> Job:
    """A job of the model's default size, with a prompt of its own."""
    # Euler takes one forward a step, whatever the model.
    return Job(
        prompt=f"a small cat, {of}, picture {number}",
        seed=number,
        steps=steps,
        guidance_scale=7.5,
        scheduler=Scheduler.EULER,
    )


def measure(runner: ModelRunner) -> Device:
    """Measure the costs of steps and of decoding. Each batch size is warmed up first."""
    lane = runner.prepare(job_of(0, 50, "measured")).lane
    slots = max(1, runner.cap(lane) // ROWS)
    steps, decoding = [], []
    # Every batch size that a GPU captures, so that none is captured in a run.
    for jobs in [n for n in range(1, slots + 1) if n <= 16 or n % 4 == 0 or n == slots]:
        states = [runner.prepare(job_of(number, 50, "measured")) for number in range(jobs)]
        if sum(state.rows for state in states) != ROWS * jobs:
            raise click.ClickException(
                "This model takes no guidance, which the jobs of this benchmark have: use another one."
            )
        steps.append((ROWS * jobs, _seconds(partial(runner.step, states))))
        if jobs in (1, min(8, slots)):
            decoding.append((jobs, _seconds(partial(_decode, runner, states))))
    return Device(tuple(steps), tuple(decoding), ROWS * slots)


def _decode(runner: ModelRunner, states: Sequence[JobState]) -> None:
    for picture in runner.decode(states):
        if isinstance(picture, SmallcatError):
            raise picture


def _seconds(work: Callable[[], object]) -> float:
    """The fastest of five calls, after two to warm up, so that other load of the machine does not count."""
    seconds = []
    for _ in range(7):
        started_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds[2:])


@dataclass(frozen=True)
class Step:
    """A step that an engine ran."""

    #: When it ended, seconds after the start.
    at_s: float
    rows: int
    seconds: float


def slowdown(steps: Sequence[Step], device: Device) -> float:
    """Seconds of the steps over their measured costs; far above 1 if the machine had other load."""
    return sum(step.seconds for step in steps) / sum(device.step_s(None, step.rows) for step in steps)


def serve(
    runner: ModelRunner, batcher: Batcher[Any], arriving: Sequence[Arrival], of: str, *, at_once: bool = False
) -> tuple[list[Finished], list[Step]]:
    """Run jobs through an engine with `batcher`, in real time.

    Returns the jobs in the order of arrival, and the engine's steps. With `at_once`, all jobs arrive before
    the start.
    """
    steps: list[Step] = []
    ended: queue.Queue[tuple[int, float, Future[Rendered]]] = queue.Queue()
    engine = Engine(
        runner,
        job_timeout_s=JOB_TIMEOUT_S,
        on_failure=lambda error: None,  # All futures have the error by then.
        on_step=lambda rows, seconds: steps.append(Step(time.monotonic() - start_s, rows, seconds)),
    )
    engine._batcher = batcher
    left_s, start_s = [0.0] * len(arriving), time.monotonic()

    def send(number: int) -> None:
        future = engine.submit(str(number), job_of(number, arriving[number].steps, of))
        future.add_done_callback(lambda future: ended.put((number, time.monotonic(), future)))

    # The texts are encoded on these threads, as on those of a worker.
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
                number, now_s, future = ended.get(timeout=JOB_TIMEOUT_S)
                future.result()
                left_s[number] = now_s - start_s
        finally:
            engine.stop()
    done = [Finished(each.steps, each.at_s, end) for each, end in zip(arriving, left_s, strict=True)]
    return done, steps


def saturated(runner: ModelRunner, name: str, device: Device, jobs: int) -> tuple[float, float]:
    """The throughput of a policy in jobs/s with `jobs` waiting from the start, and the slowdown.

    It counts until there are fewer jobs left than slots.
    """
    slots = 1 if name == ONE else device.slots
    arriving = arrivals(jobs, float("inf"), seed=0)
    done, steps = serve(runner, _policy(name, device), arriving, f"capacity of {name}", at_once=True)
    until_s = sorted(job.left_s for job in done)[-slots - 1]
    rows = sum(step.rows for step in steps if step.at_s <= until_s)
    return rows / (ROWS * MEAN_STEPS) / until_s, slowdown(steps, device)


def capacities_of(
    runner: ModelRunner, device: Device, names: Sequence[str], seconds: float, log: Callable[[str], None]
) -> dict[str, float]:
    """Measure the throughput of each policy in jobs/s, in about `seconds`; at least two full batches each.

    The policies take turns, and the best turn counts, so that other load of the machine does not.
    """
    capacities, (expected, _) = dict.fromkeys(names, 0.0), simulated(device, [], 0, seed=0)
    for name in [*names] * CAPACITY_TURNS:
        slots = 1 if name == ONE else device.slots
        batches = round(expected[name] * seconds / len(names) / CAPACITY_TURNS / slots)
        per_s, slow = saturated(runner, name, device, slots * max(2, batches))
        capacities[name] = max(capacities[name], per_s)
        log(f"capacity, {name}: {per_s:.3g} images/s, slowdown {slow:.2f}; simulated {expected[name]:.3g}")
    return capacities


def points_of(
    runner: ModelRunner,
    device: Device,
    capacities: dict[str, float],
    loads: Sequence[float],
    jobs_at: Callable[[float], int],
    seed: int,
    log: Callable[[str], None],
) -> list[Point]:
    """Measure each policy with `jobs_at(load)` jobs at each load that is below its capacity."""
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
            slow = slowdown(steps, device)
            simulated_runs = runs(name, expected, simulate(expected, arriving, device))
            for policy, jobs in runs(name, batcher, done).items():
                points.append(Point.of(load, policy, jobs, slowed=slow))
                mean_s, expected_s = (
                    statistics.mean(map(_latency_s, each)) for each in (jobs, simulated_runs[policy])
                )
                log(
                    f"{load:.0%}, {policy}: mean {mean_s:.3g} s, slowdown {slow:.2f}; "
                    f"the same jobs simulated {expected_s:.3g} s"
                )
    return points


def _latency_s(job: Finished) -> float:
    return job.left_s - job.arrived_s


def planned(capacities: dict[str, float], loads: Sequence[float], seconds: float) -> Callable[[float], int]:
    """The number of jobs for each load, so that all runs together take about `seconds`."""
    per_s = {load: load * capacities[SMALLCAT] for load in loads}
    weight = {load: TARGET_WEIGHT if load == TARGET_LOAD else 1 for load in loads}
    able = {load: sum(each > per_s[load] for each in capacities.values()) for load in loads}
    share_s = seconds / sum(weight[load] * able[load] for load in loads)
    return lambda load: max(2 * len(MIX), int(per_s[load] * weight[load] * share_s))


def _percents(context: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    try:
        loads = [float(part) / 100 for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of percents, like 30,50,70") from None
    if not all(0 < load < 1 for load in loads):
        raise click.BadParameter(f"{value!r}: a load must be above 0% and below 100%")
    return loads


def _names(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",")]
    if unknown := set(names) - set(POLICIES):
        raise click.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(POLICIES)}")
    if SMALLCAT not in names:
        raise click.BadParameter(f"{SMALLCAT} must be among them: loads are percents of its capacity")
    return names


def _settings(model: str, max_batch: int | None) -> WorkerSettings:
    asked = {
        "SMALLCAT_MODEL": model,
        "SMALLCAT_MAX_BATCH": str(max_batch or ""),
        "SMALLCAT_COMPILE_FIRST": "1",
    }
    return worker_settings({**os.environ, **{name: value for name, value in asked.items() if value}})


@click.command()
@click.option(
    "--model", default="", help="Folder, file or hub id. Not given: SMALLCAT_MODEL, or the bundled one."
)
@click.option("--max-batch", type=int, help="Rows in a step, at most. Not given: measured.")
@click.option(
    "--loads", default="30,50,70,85,95", show_default=True, callback=_percents, help="Percents of capacity."
)
@click.option(
    "--policies", default=",".join(POLICIES), show_default=True, callback=_names, help="Policies to run."
)
@click.option("--seconds", default=240.0, show_default=True, help="Time for the whole benchmark, about.")
@click.option("--jobs", type=int, help="Jobs in a run. Not given: as many as fit in the time.")
@click.option("--simulated-jobs", default=3_000, show_default=True, help="Jobs in a simulated run.")
@click.option(
    "--costs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Only simulate, with the costs of an earlier --json.",
)
@click.option("--seed", default=1, show_default=True, help="Seed of the arrivals.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="File for all figures.")
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
    # In a file the tables are not cut.
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
        for what, choice in conditions.items():
            console.print(f"{what}: {choice}", highlight=False, soft_wrap=True)
        device = measure(runner)
        # At least a quarter of the time is for the runs, however long the start took.
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
    console.print(f"ms/step by rows: {step_ms}\nms to decode by pictures: {decode_ms}", highlight=False)
    console.print(
        f"at most {device.rows} rows in a step; static batches wait {device.window_s:.3g} s at most"
    )
    if real[1]:
        console.print(shown("Measured: seconds from arrival to picture", *real))
    console.print(shown(f"Simulated with these costs, {simulated_jobs} jobs in a run", *simulation))
    console.print(targets(real, simulation))


if __name__ == "__main__":
    main()
