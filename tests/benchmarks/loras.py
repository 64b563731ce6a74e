"""What LoRAs cost: the steps of jobs with different ones beside the same steps without, on one GPU.

    python -m worker.bench.shapes sdxl /tmp/sdxl
    python -m tests.benchmarks.loras /tmp/sdxl --rows 16 --rank 32 [--convolutions] [--engine]

Each job has a LoRA of its own, at every layer of attention and feed-forward. The steps without and those with
LoRAs are compiled by two processes at the same time, and measured one after the other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from typing import Any

import torch

from tests.lora_sets import random_set
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.model_runner import ModelRunner

#: Seconds of work before a measurement: a GPU is slower when it is warm.
WARM_S, MEASURE_S = 5.0, 5.0


def states_of(runner: ModelRunner, rows: int, ranks: list[int], *, wide: bool) -> list[Any]:
    """Guided jobs, two rows each."""
    states = []
    for number in range(rows // 2):
        state = runner.prepare(Job(prompt="a small cat", seed=number, steps=30))
        if ranks and (rank := ranks[number % len(ranks)]):
            state.loras = random_set(runner._family.adaptable(), number, rank, wide=wide)
        states.append(state)
    return states


def step_ms(runner: ModelRunner, states: list[Any]) -> tuple[float, float]:
    """Median and least milliseconds of a step, at steady state."""
    times: list[float] = []
    started = time.monotonic()
    with torch.no_grad():
        while (now := time.monotonic() - started) < WARM_S + MEASURE_S or len(times) < 5:
            took = runner._seconds(states)
            if now > WARM_S:
                times.append(took * 1e3)
    return statistics.median(times), min(times)


def work(options: argparse.Namespace, loras: bool, ready: Any, turn: Any, results: Any) -> None:
    """Compile one kind of step, and measure it in its turn."""
    try:
        started = time.monotonic()
        runner = ModelRunner(WorkerSettings(model=options.model, cache_dir=options.cache))
        loaded_s = time.monotonic() - started
        assert runner.compile(Job(prompt="a small cat", seed=0), loras=loras)
        compiled_s = time.monotonic() - started - loaded_s
        ready.release()
        turn.acquire()
        found: dict[str, Any] = {"load s": loaded_s, "compile s": compiled_s}
        for label, ranks in cases(options, loras).items():
            states = states_of(runner, options.rows, ranks, wide=False)
            median, least = step_ms(runner, states)
            found[label] = {"step ms": median, "least ms": least}
            del states
        if options.profile:
            found["profile"] = profile(
                runner, states_of(runner, options.rows, [options.rank] if loras else [], wide=False)
            )
        found["GPU GiB"] = torch.cuda.max_memory_reserved() / 2**30
        results.put((loras, found))
    except BaseException as error:
        ready.release()
        results.put((loras, {"error": f"{type(error).__name__}: {error}"[:2000]}))
        raise


def cases(options: argparse.Namespace, loras: bool) -> dict[str, list[int]]:
    if not loras:
        return {"without": []}
    rank = options.rank
    return {
        f"rank {rank}": [rank],
        f"every second of rank {rank}": [rank, 0],
        "one of them": [rank, *[0] * (options.rows // 2 - 1)],
        "mixed, 4 to 128": [4, 8, 16, 32, 64, 128, 16, 32],
    }


def profile(runner: ModelRunner, states: list[Any]) -> list[str]:
    """The kernels that took most of a step."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            runner._seconds(states)
    rows = sorted(seen.key_averages(), key=lambda each: -each.device_time_total)[:24]
    return [f"{each.device_time_total / 3e3:8.2f} ms {each.count // 3:5} x {each.key[:90]}" for each in rows]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--cache", default="loras-cache")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ready, results = context.Semaphore(0), context.Queue()
    turns = {loras: context.Semaphore(0) for loras in (False, True)}
    workers = {
        loras: context.Process(target=work, args=(options, loras, ready, turns[loras], results))
        for loras in (False, True)
    }
    for each in workers.values():
        each.start()
    for _ in workers:
        ready.acquire()
    found = {}
    for loras in (False, True):
        turns[loras].release()
        kind, result = results.get()
        found[kind] = result
        print(json.dumps({"loras": kind, **{k: v for k, v in result.items() if k != "profile"}}), flush=True)
        for line in result.get("profile", ()):
            print("   ", line)
    for each in workers.values():
        each.join()
    own = found[False].get("without", {}).get("step ms")
    print(f"\n{options.model}, {options.rows} rows, each job another LoRA")
    print("| case | ms a step | of the speed without |\n|---|---|---|")
    for kind in found.values():
        for label, result in kind.items():
            if isinstance(result, dict) and own:
                print(f"| {label} | {result['step ms']:.1f} | {own / result['step ms']:.1%} |")


if __name__ == "__main__":
    main()
