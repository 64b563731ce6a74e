"""What guidance in a part of the steps saves, and how it changes the pictures of the bundled model.

    python -m tests.benchmarks.guidance

For each interval: rows of the UNet and seconds a picture, in batches of 8; the share of the
common subjects that the bundled classifier recognises; and the median PSNR to the pictures with guidance in
all steps.
"""

from __future__ import annotations

import statistics
import time

import click
from PIL import Image
from rich.console import Console
from rich.table import Table

from tests.benchmarks.mates import psnr
from worker.contract.job import Job
from worker.contract.settings import worker_settings
from worker.demo.training import classifier, evaluate
from worker.demo.training.subjects import scored_words
from worker.device.model_runner import ModelRunner
from worker.engine.runner import Picture

#: (guidance_start, guidance_stop); the first is what the others are compared with.
INTERVALS = ((0.0, 1.0), (0.0, 0.8), (0.2, 1.0), (0.2, 0.8), (0.0, 0.5), (0.0, 0.0))
#: Jobs in a batch.
BATCH = 8


def render(runner: ModelRunner, jobs: list[Job]) -> tuple[list[Picture], int]:
    """The pictures of `jobs`, and the rows it took."""
    pictures, rows = [], 0
    for start in range(0, len(jobs), BATCH):
        states = [runner.prepare(job) for job in jobs[start : start + BATCH]]
        while running := [state for state in states if state.step < state.steps]:
            rows += sum(state.rows for state in running)
            assert runner.step(running) == [None] * len(running)
        pictures += runner.decode(states)
    return pictures, rows


@click.command(help=__doc__)
@click.option("--subjects", default=100, show_default=True, help="Of the 200 common ones.")
def main(subjects: int) -> None:
    runner = ModelRunner(worker_settings().model_copy(update={"compile_first": True}))
    runner.warm_up()
    model, names = classifier.load_classifier()
    recogniser = evaluate.Recogniser(model, names)
    words = [word for word in scored_words() if word in set(names)][:subjects]
    table = Table("guidance in", "rows a picture", "s a picture", "recognised", "PSNR, dB")
    reference: list[Picture] = []
    for start, stop in INTERVALS:
        jobs = [
            Job(prompt=f"a {word}", seed=1, steps=20, guidance_start=start, guidance_stop=stop)
            for word in words
        ]
        begun_s = time.perf_counter()
        pictures, rows = render(runner, jobs)
        took_s = time.perf_counter() - begun_s
        reference = reference or pictures
        share = recogniser.share([Image.fromarray(each.pixels) for each in pictures], words)
        near = statistics.median(
            psnr(one.pixels, other.pixels) for one, other in zip(pictures, reference, strict=True)
        )
        table.add_row(
            f"{start:.0%} to {stop:.0%}",
            f"{rows / len(jobs):.0f}",
            f"{took_s / len(jobs):.2f}",
            f"{share:.0%}",
            f"{near:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
