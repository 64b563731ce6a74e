"""The benchmarks are run by hand; these tests notice when a change elsewhere breaks one."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from click.testing import CliRunner

from producer.ingest.feeder import Ingest
from producer.ingest.run_state import Run
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


def test_the_engine_renders_on_the_emulated_gpu() -> None:
    """Its job states, batches and decode calls are those of the real runner."""
    engine = Engine(EmulatedRunner(rows=4, steps=2), job_timeout_s=600, on_failure=lambda error: None)
    engine.start()
    jobs = [Job(prompt="a small cat", seed=seed, steps=2, guidance_scale=1.0) for seed in range(6)]
    futures = [engine.submit(job.id, job) for job in jobs]
    pixels = [future.result(SOON_S).picture.pixels for future in futures]
    engine.stop()
    assert {(each.shape, each.dtype) for each in pixels} == {((8, 8, 3), np.dtype(np.uint8))}
