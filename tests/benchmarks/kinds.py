"""Text-to-image, image-to-image and inpainting in one batch, beside the same steps as text-to-image alone.

    python -m worker.bench.shapes sdxl /tmp/sdxl
    python -m tests.benchmarks.kinds --model /tmp/sdxl --steps 30 --seconds 30

A third of the jobs is of each kind. As in a worker, another process unpacks and resizes their images of 4
megapixels, and threads put the images' own pixels back and encode the pictures. The jobs beside have as many
steps each, and no images. The rounds of both alternate.

"waited" is how long the GPU had nothing of a step to do, because the host launched it late: the least that
the time between the end of a step and the launch of the next one can be.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from tests.benchmarks.power import line
from worker.bench.saturation import Load
from worker.contract.choices import ImageFormat
from worker.contract.input_reference import InputReference
from worker.contract.job import Job
from worker.contract.settings import worker_settings
from worker.device.model_runner import ModelRunner
from worker.device.vae.encoder import CALLS_BEFORE_COMPILING
from worker.engine.capacity import JOBS_PER_ROW
from worker.engine.engine import Engine
from worker.engine.ticket import Rendered
from worker.jobs.image_file import encode
from worker.jobs.input_arrays import arrays_of
from worker.jobs.put_back import put_back
from worker.storage.input_pixels import InputPixels, read_pixels

#: Milliseconds that nothing which belongs to an image may hold a step up.
MOST_MS = 5
#: Sides in pixels of the image and of the mask.
IMAGE = 2048, 2048


class Reader:
    """Unpacks and resizes as the bucket's process does. The files are in its memory."""

    def __init__(self) -> None:
        across, down = np.meshgrid(np.arange(IMAGE[0]), np.arange(IMAGE[1]))
        grain = np.random.default_rng(0).integers(0, 8, (*IMAGE, 3))
        smooth = np.stack([across // 9, down // 9, (across + down) // 18], axis=-1)
        mask = np.where((across > IMAGE[0] // 4) & (down > IMAGE[1] // 3), 255, 0)
        files = [_png(pixels.astype(np.uint8)) for pixels in (smooth + grain, mask)]
        self._files = {hashlib.sha256(file).hexdigest(): file for file in files}

    def names(self) -> list[str]:
        """How jobs name the image, and the mask."""
        return [InputReference("sha256", sha256, *IMAGE).encode() for sha256 in self._files]

    def pixels_of(self, job: Job) -> InputPixels:
        return read_pixels(self, job)

    def read_input(self, sha256: str, tenant: str = "") -> bytes | None:
        return self._files[sha256]

    def record(self, job_id: str, tenant: str = "") -> bytes | None:
        return None

    def picture(self, job_id: str, image_format: ImageFormat, tenant: str = "") -> bytes | None:
        return None


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


class Process(BaseManager):
    """The reader's process."""


Process.register("reader", Reader, exposed=("names", "pixels_of"))


class Launches:
    """Notes when each step of a runner was launched, and when it ended."""

    def __init__(self, runner: Any) -> None:
        self._run = runner._run
        runner._run = self
        self._first: Any = torch.cuda.Event(enable_timing=True)
        self._first.record()
        torch.cuda.synchronize()
        self._first_s = time.perf_counter()
        self._launched: deque[tuple[float, int, Any]] = deque()

    def __call__(self, groups: Any) -> Any:
        steps = self._run(groups)
        ended: Any = torch.cuda.Event(enable_timing=True)
        ended.record()
        rows = sum(state.rows for group in groups for state in group)
        self._launched.append((time.perf_counter(), rows, ended))
        return steps

    def between(self, begun_s: float, ended_s: float) -> dict[str, float]:
        """How long the GPU waited for launches, and how long steps of the usual rows took."""
        torch.cuda.synchronize()
        noted = [
            (launched_s, rows, self._first_s + self._first.elapsed_time(ended) / 1e3)
            for launched_s, rows, ended in self._launched
            if begun_s <= launched_s <= ended_s
        ]
        self._launched.clear()
        waits = sorted(max(0.0, next_[0] - last[2]) for last, next_ in itertools.pairwise(noted))
        usual = statistics.mode(rows for _, rows, _ in noted)
        took = sorted(
            next_[2] - last[2] for last, next_ in itertools.pairwise(noted) if last[1] == next_[1] == usual
        )
        return {
            "waited ms, most": 1e3 * waits[-1],
            "waited ms, p99": 1e3 * waits[int(0.99 * len(waits))],
            f"waited more than {MOST_MS} ms": sum(wait > MOST_MS / 1e3 for wait in waits),
            "usual rows": usual,
            "such a step ms, median": 1e3 * statistics.median(took),
            "such a step ms, most": 1e3 * took[-1],
        }


@dataclass
class Host:
    """What a worker does with a job besides its steps."""

    reader: Any
    threads: ThreadPoolExecutor

    def send(self, job: Job, engine: Engine[Any]) -> Future[Rendered]:
        pixels = self.reader.pixels_of(job) if job.image else None
        future = engine.submit(job.id, job, arrays_of(pixels))
        future.add_done_callback(lambda done: self.threads.submit(self._encode, job, pixels, done))
        return future

    @staticmethod
    def _encode(job: Job, pixels: InputPixels | None, done: Future[Rendered]) -> None:
        if done.exception() is None:
            encode(put_back(job, pixels, done.result().picture), job.format, "a small cat")


class Kinds(Load):
    """A load of jobs of several kinds in turn."""

    def __init__(self, runner: Any, kinds: Sequence[dict[str, Any]], host: Host) -> None:
        super().__init__(runner, {})
        self._kinds, self._host = kinds, host

    def job(self, number: int) -> Job:
        kind = self._kinds[number % len(self._kinds)]
        return Job.parse({"prompt": f"a small cat, number {number % 50}", "seed": number, **kind})

    def send(self, job: Job, engine: Engine[Any]) -> Future[Rendered]:
        return self._host.send(job, engine)


def measure(
    runner: ModelRunner, kinds: Sequence[dict[str, Any]], host: Host, warm_s: float, seconds: float
) -> dict[str, Any]:
    """Rates and waits with jobs of these kinds in turn."""
    load = Kinds(runner, kinds, host)
    launches = Launches(runner)
    first = load.job(1).resolved(runner.served)
    assert first.width
    assert first.height
    lane: Any = runner._family.lane(first.width, first.height)
    load.begin(JOBS_PER_ROW * runner.cap(lane))
    load.keep(warm_s)
    power: list[str] = []
    timer = threading.Timer(seconds / 2, lambda: power.append(line()))
    timer.start()
    begun_s, ended_s = load.keep(seconds)
    timer.cancel()
    found = launches.between(begun_s, ended_s)
    load.end()
    runner._run = launches._run  # type: ignore[method-assign]
    inside = [(rows, took_s) for at_s, rows, took_s in load.steps if begun_s <= at_s <= ended_s]
    rows = sum(each for each, _ in inside)
    return {
        "rows/s": rows / (ended_s - begun_s),
        "rows": rows / len(inside),
        "steps": len(inside),
        **found,
        "power": ", ".join(power),
        "compiled": runner.is_compiled,
    }


def wait_for_encoder(runner: ModelRunner, host: Host, begins: dict[str, Any]) -> None:
    """Encode pictures until the encoder is compiled and captured, as in a worker that has been up long."""
    job = Job.parse({"prompt": "a small cat", "seed": 1, **begins}).resolved(runner.served)
    inputs = arrays_of(host.reader.pixels_of(job))
    for _ in range(2):
        for _ in range(CALLS_BEFORE_COMPILING + 4):
            runner.prepare(job, inputs)
        if runner._kernel_compiler is not None:
            # It compiles one function after the other.
            runner._kernel_compiler.submit(lambda: None).result()
    started_s = time.perf_counter()
    runner.prepare(job, inputs)
    torch.cuda.synchronize()
    print(f"a job with an image is prepared in {1e3 * (time.perf_counter() - started_s):.0f} ms", flush=True)


@click.command(help=__doc__)
@click.option("--model", default="", help="Folder; the bundled model when not given.")
@click.option("--steps", default=30, show_default=True)
@click.option("--strength", default=0.75, show_default=True)
@click.option("--seconds", default=30.0, show_default=True, help="For each round, after 5 s of load.")
@click.option("--rounds", default=2, show_default=True, help="Of each.")
def main(model: str, steps: int, strength: float, seconds: float, rounds: int) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(name)s %(message)s", stream=sys.stderr)
    asked = {"compile_first": True} | ({"model": model} if model else {})
    runner = ModelRunner(worker_settings().model_copy(update=asked))
    for choice in runner.warm_up():
        print(f"{choice.what}: {choice.choice} ({choice.reason})", flush=True)
    manager = Process(ctx=multiprocessing.get_context("spawn"))
    manager.start()
    host = Host(manager.reader(), ThreadPoolExecutor(16))  # type: ignore[attr-defined]
    image, mask = host.reader.names()
    defaults = runner.served.defaults
    same = {"scheduler": "euler", "width": defaults.width, "height": defaults.height, "steps": steps}
    begins = {**same, "image": image, "strength": strength}
    mixed: list[dict[str, Any]] = [same, begins, {**begins, "mask": mask}]
    wait_for_encoder(runner, host, begins)
    # As many steps of the model as each of those has.
    counts = []
    for kind in mixed:
        job = Job.parse({"prompt": "a small cat", "seed": 1, **kind}).resolved(runner.served)
        pixels = host.reader.pixels_of(job) if job.image else None
        counts.append(runner.prepare(job, arrays_of(pixels)).steps)
    alike = [{**same, "steps": count} for count in counts]
    rows_of_one = statistics.mean(counts) * runner._family.rows(defaults.guidance_scale)
    rates: dict[str, list[float]] = {"text": [], "mixed": []}
    for number in range(2 * rounds):
        name = ("text", "mixed")[number % 2]
        found = measure(runner, mixed if name == "mixed" else alike, host, 5.0, seconds)
        rates[name].append(found["rows/s"] / rows_of_one)
        print(json.dumps({"jobs": name, "images/s": rates[name][-1], **found}), flush=True)
    text, both = (statistics.median(rates[name]) for name in ("text", "mixed"))
    about = {"model": Path(model).name or "bundled", "steps": counts}
    print(json.dumps({**about, "text": text, "mixed": both, "share": both / text}), flush=True)
    host.threads.shutdown(cancel_futures=True)
    manager.shutdown()


if __name__ == "__main__":
    main()
