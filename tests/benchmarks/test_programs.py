"""The benchmarks are run by hand; these tests notice when a change elsewhere breaks one."""

from __future__ import annotations

import fcntl
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from producer.ingest.feeder import Ingest
from producer.ingest.run_state import Run
from tests.benchmarks import held
from tests.benchmarks.emulated_gpu import EmulatedRunner
from tests.worker.engine.fake_runner import SOON_S
from worker import tasks
from worker.contract.job import Job
from worker.engine.engine import Engine
from worker.jobs import handler

PROGRAMS = (
    "autoscaling",
    "crowds",
    "emulated",
    "encoding",
    "engine",
    "guidance",
    "ingest",
    "live",
    "load",
    "lora_zipf",
    "mates",
    "precision",
    "previews",
    "s3_requests",
    "shares",
    "start_loras",
    "system",
    "text_lengths",
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_can_be_imported_and_has_a_help_text(name: str) -> None:
    result = CliRunner().invoke(importlib.import_module(f"tests.benchmarks.{name}").main, ["--help"])
    assert result.exit_code == 0, result.output
    assert "Show this message and exit." in result.output


def test_the_names_that_programs_replace_are_there() -> None:
    """By `emulated_app` and `ingest`, which run in processes of their own."""
    assert callable(tasks.load_runner)
    assert callable(handler.encode)
    assert callable(Run.feed)
    assert callable(Ingest._feed_until_over)


def test_programs_that_are_held_measure_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(held.Load, "begin", lambda load, jobs: None)
    monkeypatch.setattr(held.warm_up, "measure_steps", lambda: not is_free())
    path = tmp_path / "turn"

    def is_free() -> bool:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    held.hold(held.Turn(path))
    measure: Any = held.warm_up.measure_steps
    assert measure()
    assert is_free()
    begin: Any = held.Load.begin
    begin(None, 1)
    begin(None, 1)
    assert not is_free()
    assert measure()
    assert not is_free()


def test_the_engine_renders_on_the_emulated_gpu() -> None:
    """Its job states, batches and decode calls are those of the real runner."""
    engine = Engine(EmulatedRunner(rows=4, steps=2), job_timeout_s=600, on_failure=lambda error: None)
    engine.start()
    jobs = [Job(prompt="a small cat", seed=seed, steps=2, guidance_scale=1.0) for seed in range(6)]
    futures = [engine.submit(job.id, job) for job in jobs]
    pixels = [future.result(SOON_S).picture.pixels for future in futures]
    engine.stop()
    assert {(each.shape, each.dtype) for each in pixels} == {((8, 8, 3), np.dtype(np.uint8))}
