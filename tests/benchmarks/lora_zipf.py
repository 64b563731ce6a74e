"""Many LoRAs on disk, and jobs that name them by Zipf's law: rates, hits, and how long jobs wait for them.

    python -m tests.benchmarks.lora_zipf --model FOLDER --files 1000 --rank 16 --kept 1000,300,100,30

There are always as many jobs in flight as in a worker, each with one LoRA of weight 1: the n-th file in
proportion to 1 / n. `--kept` is how many fit into the device's memory; the host's holds four times as many.
What counts as read from disk may lie in the system's own cache.
"""

from __future__ import annotations

import json
import logging
import queue
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from tests.benchmarks.engine import fields_of
from worker.bench.saturation import SUBMITTERS
from worker.contract.file_index import Kind
from worker.contract.job import Job
from worker.contract.job_files import with_files
from worker.contract.settings import worker_settings
from worker.device.loras import cache as device_loras
from worker.device.model_runner import ModelRunner
from worker.engine.capacity import JOBS_PER_ROW
from worker.engine.engine import Engine
from worker.engine.ticket import Rendered
from worker.model.beside import lora_files
from worker.model.beside.file_store import FileStore

#: Layers that the files change: those of attention, as most files that are shared do.
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def write_files(folder: Path, weights: Mapping[str, torch.Tensor], count: int, rank: int) -> int:
    """`count` files for these layers that differ in their first tensor. Returns the bytes of one."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if weight.ndim == 2 and name.endswith(LAYERS):
            outputs, inputs = weight.shape
            down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            up = torch.randn(outputs, rank, generator=generator) * 0.02
            tensors[f"unet.{name}.lora_A.weight"] = down.half()
            tensors[f"unet.{name}.lora_B.weight"] = up.half()
    first = next(iter(tensors))
    for number in range(count):
        tensors[first] = torch.full_like(tensors[first], 1e-3 * (number + 1) / count)
        save_file(tensors, folder / f"l{number:05}.safetensors")
    return sum(each.nbytes for each in tensors.values())


class Counts:
    """What became of each question for a LoRA, and how long it took."""

    def __init__(self, loras: Any) -> None:
        self.calls: Counter[str] = Counter()
        self.seconds: list[float] = []
        self._loras = loras

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count while inside."""
        loras, load = self._loras, lora_files.load
        names = ("of", "_read")
        for name in names:
            setattr(loras, name, self._counted(name, getattr(loras, name)))
        lora_files.load = self._counted("load", load)
        try:
            yield
        finally:
            for name in names:
                delattr(loras, name)
            lora_files.load = load

    def _counted(self, name: str, ask: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            begun_s = time.perf_counter()
            self.calls[name] += 1
            found = ask(*args)
            if name == "of":
                self.seconds.append(time.perf_counter() - begun_s)
            return found

        return counted

    def shares(self) -> dict[str, float]:
        """Which share of the jobs found its LoRA where."""
        asked, read, loaded = (self.calls[name] for name in ("of", "_read", "load"))
        return {
            "device": (asked - read) / asked,
            "host": (read - loaded) / asked,
            "disk": loaded / asked,
        }


def fill(runner: ModelRunner, files: FileStore, **fields: Any) -> None:
    """Use each LoRA once, those that are named most last: what is kept then are those."""
    for entry in reversed(files.index.files):
        job = Job.parse({"prompt": "a small cat", "loras": entry.name, **fields})
        runner._loras.of(with_files(job.resolved(runner.served), files.index))


def measure(runner: ModelRunner, files: FileStore, seconds: float, **fields: Any) -> dict[str, float]:
    """Keep `runner` busy for some seconds, after a batch to warm up. Returns rates, hits and times."""
    steps: list[tuple[float, int, float]] = []
    engine = Engine(
        runner,
        job_timeout_s=600,
        on_failure=_die,
        on_step=lambda rows, took_s: steps.append((time.perf_counter(), rows, took_s)),
    )
    done: queue.SimpleQueue[float] = queue.SimpleQueue()
    threads = ThreadPoolExecutor(SUBMITTERS)
    names = [each.name for each in files.index.files]
    weights = [1 / (rank + 1) for rank in range(len(names))]
    drawn = random.Random(1)
    number = 0

    def send(job: Job, begun_s: float) -> None:
        def finish(future: Future[Rendered]) -> None:
            if future.exception() is None:
                done.put(time.perf_counter() - begun_s)

        engine.submit(job.id, job).add_done_callback(finish)

    def submit() -> None:
        nonlocal number
        number += 1
        [name] = drawn.choices(names, weights)
        job = Job.parse(
            {"prompt": f"a small cat, number {number % 50}", "seed": number, "loras": name, **fields}
        )
        job = with_files(job.resolved(runner.served), files.index)
        threads.submit(send, job, time.perf_counter())

    one = runner.prepare(Job.parse({"prompt": "a small cat", **fields}).resolved(runner.served))
    in_flight = JOBS_PER_ROW * runner.cap(one.lane)
    counts = Counts(runner._loras)
    engine.start()
    for _ in range(in_flight):
        submit()
    for _ in range(in_flight):
        done.get(timeout=600)
        submit()
    with counts.counting():
        begun_s = ended_s = time.perf_counter()
        took: list[float] = []
        while ended_s - begun_s < seconds:
            took.append(done.get(timeout=600))
            ended_s = time.perf_counter()
            submit()
    threads.shutdown()
    engine.stop()
    rows = sum(each for at_s, each, _ in steps if begun_s <= at_s <= ended_s)
    return {
        "images/s": rows / (one.rows * one.steps) / (ended_s - begun_s),
        **counts.shares(),
        "LoRA p50 ms": 1e3 * _at(counts.seconds, 0.5),
        "LoRA p95 ms": 1e3 * _at(counts.seconds, 0.95),
        "job p95 s": _at(took, 0.95),
    }


def _at(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def _die(error: BaseException) -> None:
    logging.getLogger("smallcat.engine").critical("lost: %r", error)
    sys.exit(1)


@click.command(help=__doc__)
@click.option("--model", default="", help="Folder; the bundled model when not given.")
@click.option("--files", "count", default=1_000, show_default=True, help="LoRAs on disk.")
@click.option("--rank", default=16, show_default=True)
@click.option("--kept", default="1000,300,100,30", show_default=True, help="LoRAs that fit on the device.")
@click.option("--job", default="steps=20", show_default=True, help='Job fields as in "steps=50 size=768".')
@click.option("--seconds", default=30.0, show_default=True, help="For each number of --kept.")
@click.option("--folder", default="", help="For the files; not given: one that is deleted at the end.")
def main(model: str, count: int, rank: int, kept: str, job: str, seconds: float, folder: str) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(name)s %(message)s", stream=sys.stderr)
    settings = worker_settings().model_copy(update={"model": model} if model else {})
    fields = fields_of(job)
    runner = ModelRunner(settings)
    adaptable = runner._family.adaptable()
    assert adaptable is not None
    dtype = next(iter(adaptable.weights.values())).dtype
    with tempfile.TemporaryDirectory() as made:
        place = Path(folder or made) / "loras"
        place.mkdir(parents=True, exist_ok=True)
        begun_s = time.perf_counter()
        size = write_files(place, adaptable.weights, count, rank)
        written_s = time.perf_counter()
        files = FileStore({Kind.LORA: [str(place)]}, Path(made))
        indexed_s = time.perf_counter()
        said = {"files": count, "MB each": size / 1e6, "write s": written_s - begun_s}
        print(json.dumps(said | {"index s": indexed_s - written_s}), flush=True)
        runner.warm_up()
        runner.compile(Job.parse({"prompt": "a small cat", **fields}), loras=True)
        for number in map(int, kept.split(",")):
            # On the device they have the model's own type, and a few bytes more.
            limit = int(number * size * 1.1 * dtype.itemsize / 2)
            runner._loras = device_loras.Loras(files, runner._family, runner._device, limit)
            fill(runner, files, **fields)
            found = measure(runner, files, seconds, **fields)
            print(
                json.dumps({"kept": number} | {name: round(each, 3) for name, each in found.items()}),
                flush=True,
            )


if __name__ == "__main__":
    main()
