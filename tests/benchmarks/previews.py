"""Measures what previews cost: the engine's pictures a second without them, and while all jobs are looked at.

    python -m tests.benchmarks.previews --model FOLDER --job "steps=50" --seconds 10 --rounds 3

Rounds with and without alternate, so that what the machine does besides falls on both. Prints a line of JSON
a round, and one with the medians. Previews are made as a worker makes them, and put nowhere.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from typing import Any

import click

from tests.benchmarks.engine import fields_of
from worker.bench.saturation import saturate
from worker.contract.settings import worker_settings
from worker.device.model_runner import ModelRunner
from worker.engine.engine import Engine
from worker.jobs.previews import PreviewMaker


class _Looked:
    """Looks at all jobs of each engine that is made while it is on, and counts the previews."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.count, self.is_on = 0, False
        self._engine: Engine[Any] | None = None
        began = Engine.start

        def start(engine: Engine[Any]) -> None:
            self._engine = engine
            began(engine)

        Engine.start = start  # type: ignore[method-assign]
        threading.Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        makers: dict[int, PreviewMaker] = {}
        while True:
            if self.is_on and (engine := self._engine) is not None:
                maker = makers.setdefault(
                    id(engine), PreviewMaker(engine.tickets, self._runner.preview, self._put)
                )
                for job_id in engine.tickets():
                    maker.ask(job_id)
            time.sleep(1)

    def _put(self, job_id: str, preview: object) -> None:
        self.count += 1


@click.command(help=__doc__)
@click.option("--model", default="", help="Folder; the bundled model when not given.")
@click.option("--job", default="steps=50", show_default=True, help="Job fields.")
@click.option("--seconds", default=10.0, show_default=True, help="For each round.")
@click.option("--rounds", default=3, show_default=True, help="With previews, and as many without.")
def main(model: str, job: str, seconds: float, rounds: int) -> None:
    asked = {"compile_first": True} | ({"model": model} if model else {})
    runner = ModelRunner(worker_settings().model_copy(update=asked))
    runner.warm_up()
    looked = _Looked(runner)
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * rounds):
        looked.is_on, before = number % 2 == 1, looked.count
        began_s = time.perf_counter()
        images_s = saturate(runner, seconds, **fields_of(job))["images_s"]
        made = (looked.count - before) / (time.perf_counter() - began_s)
        found[looked.is_on].append(images_s)
        print(json.dumps({"previews": looked.is_on, "images_s": images_s, "previews_s": made}), flush=True)
    without, with_them = statistics.median(found[False]), statistics.median(found[True])
    print(json.dumps({"images_s": without, "with_previews": with_them, "cost": 1 - with_them / without}))


if __name__ == "__main__":
    main()
