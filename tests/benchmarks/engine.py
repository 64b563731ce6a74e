"""The engine alone, at saturation: pictures a second, decoding included, and the time in which no step runs.

    python -m tests.benchmarks.engine --model FOLDER --job "steps=50" --job "steps=1 guidance_scale=1"

There are always as many jobs in flight as in a worker, without those that a worker uploads. Nothing is
queued, encoded or stored: `tests.benchmarks.system` measures that. `--trace` records the GPU's timeline for
some seconds.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from worker.bench.saturation import saturate
from worker.bench.steady import Gauges
from worker.contract.job import Job
from worker.contract.settings import worker_settings
from worker.device.model_runner import ModelRunner

#: Seconds of load before it is measured, within which a GPU becomes warm.
WARM_S = 5.0


def _traced(turn: Any, seconds: float) -> dict[str, float]:
    """The GPU's timeline while `turn` is called again and again: the share of it in which nothing ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        begun_s = time.perf_counter()
        while time.perf_counter() - begun_s < seconds:
            turn()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return {"traced_ms": (reached - spans[0][0]) / 1e3, "gpu_idle_share": 1 - busy / (reached - spans[0][0])}


def fields_of(text: str) -> dict[str, Any]:
    """Job fields from words like "steps=50 guidance_scale=1 scheduler=lcm size=768"."""
    fields = dict(word.split("=", 1) for word in text.split())
    if size := fields.pop("size", None):
        fields |= {"width": size, "height": size}
    return {name: value if name == "scheduler" else json.loads(value) for name, value in fields.items()}


@click.command(help=__doc__)
@click.option("--model", default="", help="Folder; the bundled model when not given.")
@click.option("--job", "jobs", multiple=True, help='A workload: job fields as in "steps=50 size=768".')
@click.option("--seconds", default=20.0, show_default=True, help="For each; 0 only compiles and measures.")
@click.option("--trace", "trace_s", default=0.0, help="Seconds of the GPU's timeline to record.")
@click.option("--name", default="engine", help="What the lines are called.")
def main(model: str, jobs: tuple[str, ...], seconds: float, trace_s: float, name: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s", stream=sys.stderr)
    settings = worker_settings().model_copy(
        update={"compile_first": True} | ({"model": model} if model else {})
    )
    started_s = time.perf_counter()
    runner = ModelRunner(settings)
    choices = {choice.what: choice for choice in (*runner.choices, *runner.warm_up())}
    ready_s = time.perf_counter() - started_s
    where = {"torch": torch.__version__, **{what: choices[what].choice for what in ("device", "attention")}}
    print(json.dumps({"name": name, "ready_s": ready_s, "max rows": choices["max rows"].reason}), flush=True)
    for text in jobs:
        fields = fields_of(text)
        compiled = runner.compile(Job.parse({"prompt": "a small cat", **fields}))
        if seconds:
            after = (lambda turn: _traced(turn, trace_s)) if trace_s else None
            gauges = Gauges()
            result = saturate(runner, seconds, warm_s=WARM_S, during=gauges, after=after, **fields)
            line = {"name": name, "model": Path(model).name, "job": text, **result, "compiled": compiled}
            line |= dict(zip(("mhz", "watts"), gauges.medians, strict=True))
            print(json.dumps({**line, **where}), flush=True)


if __name__ == "__main__":
    main()
