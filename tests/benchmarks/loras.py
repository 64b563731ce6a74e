"""What LoRAs cost: the steps of jobs with different ones beside the same steps without, on one GPU.

    python -m worker.bench.shapes sdxl /tmp/sdxl
    python -m tests.benchmarks.loras /tmp/sdxl --rows 16 --rank 32

Each job has a LoRA of its own, at every layer of attention and feed-forward. The steps without and those with
LoRAs are compiled by two processes at the same time, and measured one after the other. Meanwhile a third one
times how long a LoRA takes to be in use, and runs diffusers, which changes its LoRA between jobs of one
picture each. `--only-compile` compiles the steps with LoRAs into the cache, and ends.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests import lora_files
from tests.benchmarks.power import line
from tests.lora_sets import random_set
from worker.contract.file_index import Kind
from worker.contract.job import Job
from worker.contract.job_files import with_files
from worker.contract.settings import WorkerSettings, worker_settings
from worker.device.model_runner import ModelRunner
from worker.device.step import batch_of, denoise
from worker.model.beside.file_store import FileStore

#: Seconds of work before the first measurement, since a GPU is slower when it is warm; and of each.
WARM_S, MEASURE_S = 5.0, 4.0
STEPS = 30
#: Bytes of the file whose loading is timed.
FILE_BYTES = 200 << 20
#: The largest rank that is read.
MAX_RANK = 256


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def settings_of(options: argparse.Namespace) -> WorkerSettings:
    """Those of the environment, for the model that is measured."""
    return worker_settings().model_copy(update={"model": options.model, "cache_dir": options.cache})


def states_of(runner: ModelRunner, rows: int, ranks: list[int]) -> list[Any]:
    """Guided jobs, two rows each."""
    states = []
    for number in range(rows // 2):
        state = runner.prepare(Job(prompt="a small cat", seed=number, steps=STEPS))
        if ranks and (rank := ranks[number % len(ranks)]):
            state.loras = random_set(runner._family.adaptable(), number, rank)
        states.append(state)
    return states


def step_s(runner: ModelRunner, states: list[Any], warm_s: float) -> tuple[float, str]:
    """Median seconds of a step, and clock and power meanwhile."""
    times: list[float] = []
    power, started_s = "", time.monotonic()
    with torch.no_grad():
        while (now_s := time.monotonic() - started_s) < warm_s + MEASURE_S or len(times) < 5:
            took = runner._seconds(states)
            if now_s > warm_s:
                times.append(took)
            if not power and now_s > warm_s + MEASURE_S / 2:
                power = line()
    return statistics.median(times), power


def cases(rank: int, rows: int, loras: bool) -> dict[str, list[int]]:
    if not loras:
        return {"without": []}
    return {
        f"each of rank {rank}": [rank],
        f"every second of rank {rank}": [rank, 0],
        f"one of rank {rank}": [rank, *[0] * (rows // 2 - 1)],
        "ranks 4 to 128": [4, 8, 16, 32, 64, 128, 16, 32],
    }


def work(options: argparse.Namespace, loras: bool, ready: Any, turn: Any, results: Any) -> None:
    """Compile one kind of step, and measure it in its turn."""
    try:
        started_s = time.monotonic()
        runner = ModelRunner(settings_of(options))
        say(f"loras={loras}: loaded in {time.monotonic() - started_s:.0f} s")
        started_s = time.monotonic()
        job = Job(prompt="a small cat", seed=0)
        if loras:
            with torch.no_grad():
                state = runner.prepare(job)
                state.loras = runner._loras.none()
                graphs: Any = runner._graphs
                assert graphs.compile(state.lane, batch_of([state.next_inputs()]))
        else:
            assert runner.compile(job)
        say(f"loras={loras}: compiled in {time.monotonic() - started_s:.0f} s")
        ready.release()
        if not turn.get():
            return
        warm_s = WARM_S
        for label, ranks in cases(options.rank, options.rows, loras).items():
            states = states_of(runner, options.rows, ranks)
            took, power = step_s(runner, states, warm_s)
            warm_s = 1.0
            decode_s = decoded_s(runner, states) if not loras else 0.0
            results.put((label, took, decode_s, power))
            if loras and ranks == [options.rank]:
                check(runner, states)
        say(f"loras={loras}: {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB at most")
        results.put(None)
    except BaseException as error:
        ready.release()
        results.put(f"{type(error).__name__}: {error}"[:2000])
        raise


def decoded_s(runner: ModelRunner, states: list[Any]) -> float:
    """Seconds to decode all, the second time."""
    for _ in range(2):
        started_s = time.perf_counter()
        list(runner.decode(states))
        took = time.perf_counter() - started_s
    return took


@torch.no_grad()
def check(runner: ModelRunner, states: list[Any]) -> None:
    """Compare a compiled step by the kernels with an uncompiled one, job by job."""
    runner_any: Any = runner
    batch = batch_of([state.next_inputs() for state in states])
    (step,) = runner_any._graphs.run(states[0].lane, [batch])
    runner_any._family._lora_unet._has_kernels = False
    expected = denoise(runner._family.forward, batch)[1]
    runner_any._family._lora_unet._has_kernels = True
    far = (step.predictions - expected).float().norm() / expected.float().norm()
    say(f"predictions by kernels and by the loop differ by {far:.1e} of their norm")


def beside(options: argparse.Namespace) -> None:
    """Loading, and diffusers, while others compile."""
    for part in (loading, diffusers_alone):
        try:
            part(options)
        except Exception as error:  # noqa: BLE001
            say(f"failed: {error!r}"[:1000])
        torch.cuda.empty_cache()


def write_file(unet: Any, path: Path, seed: int) -> None:
    """A LoRA of diffusers' layout, about `FILE_BYTES`."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = {name: each for name, each in lora_files.modules(unet).items() if ".transformer_blocks." in name}
    rank = min(MAX_RANK, FILE_BYTES // (2 * sum(shape[0] + shape[1] for shape in shapes.values())))
    found = {}
    for name, shape in shapes.items():
        for suffix, size in (("lora_A", (rank, shape[1])), ("lora_B", (shape[0], rank))):
            random = torch.randn(size, device="cuda", dtype=torch.float16, generator=generator)
            found[f"unet.{name}.{suffix}.weight"] = (0.02 * random).cpu()
    save_file(found, path)
    say(f"wrote a LoRA of rank {rank}, {path.stat().st_size / 1e6:.0f} MB")


def loading(options: argparse.Namespace) -> None:
    """Time how long a LoRA takes to be in use: from disk, from the host's memory, from the GPU's."""
    with tempfile.TemporaryDirectory() as folder:
        runner = ModelRunner(settings_of(options).model_copy(update={"compile": False}))
        runner_any: Any = runner
        unet = runner_any._family._pipeline.unet
        for number in range(2):
            write_file(unet, Path(folder, f"lora-{number}.safetensors"), number)
        files = FileStore({Kind.LORA: [folder]}, Path(folder, "cache"))
        runner_any._loras._files = files
        for number in range(2):
            job = Job(prompt="a small cat", seed=0, loras=[{"name": f"lora-{number}"}])
            job = with_files(job.resolved(runner.served), files.index)
            times = []
            for place in ("disk (page cache)", "host memory", "GPU memory"):
                if place == "host memory":
                    runner_any._loras._sets.shrink_to(0)
                    runner_any._loras._on_device.shrink_to(0)
                torch.cuda.synchronize()
                started_s = time.perf_counter()
                with torch.no_grad():
                    runner_any._loras.of(job)
                torch.cuda.synchronize()
                times.append(f"{place} {1e3 * (time.perf_counter() - started_s):.0f} ms")
            say(f"LoRA {number + 1} in use from {', '.join(times)}")


def diffusers_alone(options: argparse.Namespace) -> None:
    """Images a second of diffusers' pipeline, with another LoRA for each picture."""
    import diffusers

    with tempfile.TemporaryDirectory() as folder:
        pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(options.model, torch_dtype=torch.float16)
        pipeline = pipeline.to("cuda")
        pipeline.set_progress_bar_config(disable=True)
        # Before the first is loaded, which changes the modules' names.
        for number in range(2):
            write_file(pipeline.unet, Path(folder, f"{number}.safetensors"), number)
        for number in range(2):
            started_s = time.monotonic()
            pipeline.load_lora_weights(folder, weight_name=f"{number}.safetensors", adapter_name=str(number))
            say(f"diffusers' load_lora_weights took {time.monotonic() - started_s:.1f} s")
        times = []
        started_s = time.monotonic()
        while time.monotonic() - started_s < options.peer_s or len(times) < 2:
            torch.cuda.synchronize()
            begun_s = time.monotonic()
            pipeline.set_adapters([str(len(times) % 2)], [0.8])
            pipeline("a small cat", num_inference_steps=STEPS)
            times.append(time.monotonic() - begun_s)
        say(
            f"diffusers, set_adapters between pictures: {1 / statistics.median(times[1:]):.3f} images/s "
            f"(median of {len(times) - 1}, beside two processes that compile; {line()})"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--cache", default="loras-cache")
    parser.add_argument("--peer-s", type=float, default=20.0)
    parser.add_argument("--most", type=float, default=3600.0, help="seconds in all")
    parser.add_argument("--only-compile", action="store_true")
    options = parser.parse_args()
    ends_s = time.monotonic() + options.most
    context = multiprocessing.get_context("spawn")
    ready = context.Semaphore(0)
    kinds = (True,) if options.only_compile else (False, True)
    turns = {loras: context.Queue() for loras in kinds}
    results = context.Queue()
    processes = [
        context.Process(target=work, args=(options, loras, ready, turns[loras], results)) for loras in turns
    ]
    other = context.Process(target=beside, args=(options,))
    for each in processes:
        each.start()
    try:
        if options.only_compile:
            turns[True].put(False)
            processes[0].join()
            return
        processes.append(other)
        other.start()
        measure(options, ready, turns, results, other, ends_s)
    finally:
        for each in processes:
            each.join(1.0)
            if each.is_alive():
                each.kill()


def measure(
    options: argparse.Namespace,
    ready: Any,
    turns: dict[bool, Any],
    results: Any,
    other: Any,
    ends_s: float,
) -> None:
    for _ in turns:
        if not ready.acquire(timeout=max(1.0, ends_s - time.monotonic())):
            say("not compiled in time")
            return
    # It has been at work since long, and must not be there when steps are timed.
    other.join(max(0.0, min(60.0, ends_s - time.monotonic() - 60.0)))
    if other.is_alive():
        say("what ran beside is not done, and ends here")
        other.kill()
    own_s = decode_s = 0.0
    jobs = options.rows // 2
    say(f"{options.model}, {options.rows} rows, {jobs} jobs with different LoRAs")
    print("| case | ms a step | images/s | share | clock, power |\n|---|---|---|---|---|", flush=True)
    for loras in turns:
        turns[loras].put(True)
        while True:
            try:
                found = results.get(timeout=max(1.0, ends_s - time.monotonic()))
            except queue.Empty:
                say("out of time")
                return
            if found is None or isinstance(found, str):
                if found:
                    say(found)
                break
            label, took_s, decoded, power = found
            if not loras:
                own_s, decode_s = took_s, decoded
            rate = jobs / (STEPS * took_s + decode_s)
            own = jobs / (STEPS * own_s + decode_s) if own_s else rate
            print(f"| {label} | {1e3 * took_s:.1f} | {rate:.3f} | {rate / own:.1%} | {power} |", flush=True)
    print(f"decoding {jobs} pictures: {1e3 * decode_s:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
