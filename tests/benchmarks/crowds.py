"""Simulates what the batch size gains that follows how many jobs wait, on costs measured on an H200.

    python -m tests.benchmarks.crowds --jobs 2000

For each model three rules: the usual cap alone, that of least time a row alone, and the first until a lane is
crowded (`worker.engine.batcher`). Jobs of 20, 30 and 50 steps in equal parts, guided, arrive at random.
"""

from __future__ import annotations

import json
from dataclasses import replace

import click

from tests.benchmarks.policies import Device
from tests.benchmarks.simulation import Point, arrivals, capacity, simulate
from worker.engine.batcher import Batcher
from worker.engine.step_cost import choose_most

#: The usual cap, milliseconds a row of a step by its rows, and of decoding by pictures (docs/performance.md).
MEASURED: dict[str, tuple[int, dict[int, float], dict[int, float]]] = {
    "SD 1.x": (16, {2: 3.3, 4: 2.5, 8: 2.28, 16: 2.16, 32: 2.09}, {1: 9.0, 2: 7.7, 4: 7.4, 8: 7.25}),
    "SDXL": (8, {2: 17.7, 8: 15.9, 16: 15.5, 32: 15.6}, {1: 35.0, 8: 35.0}),
}
LOADS = (0.3, 0.7, 0.95)


def devices(model: str) -> dict[str, Device]:
    """The device of a model by rule."""
    rows, step_ms, decode_ms = MEASURED[model]
    curve, decoding = (
        tuple((size, size * each / 1e3) for size, each in ms.items()) for ms in (step_ms, decode_ms)
    )
    usual, most = Device(curve, decoding, rows), choose_most(curve, rows)
    return {
        f"at most {rows} rows": usual,
        f"at most {most} rows": replace(usual, rows=most),
        f"{rows}, or {most} where many wait": replace(usual, most_rows=most),
    }


@click.command(help=__doc__)
@click.option("--jobs", default=2000, show_default=True, help="Jobs of each run.")
@click.option("--seeds", default=2, show_default=True, help="Runs of each rule and load.")
def main(jobs: int, seeds: int) -> None:
    for model in MEASURED:
        rules = devices(model)
        capacities = {rule: capacity(Batcher, device) for rule, device in rules.items()}
        usual = next(iter(capacities.values()))
        for rule, device in rules.items():
            line: dict[str, object] = {"model": model, "rule": rule, "images_s": capacities[rule]}
            for load in LOADS:
                done = [
                    job
                    for seed in range(1, 1 + seeds)
                    for job in simulate(Batcher(device), arrivals(jobs, load * usual, seed), device)
                ]
                found = Point.of(load, rule, done).latency["all"]
                line[f"{load:.0%}"] = {"mean": found.mean, "p50": found.p50, "p95": found.p95}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
