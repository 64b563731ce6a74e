"""The main job, end to end: real processes, real Valkey, real S3; a tiny model with random weights."""

from __future__ import annotations

import json
import math
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from deploy.embedded.stack import Stack
from producer import JobHandle, JobResult, job_from_image, submit_job
from producer.session import session
from tests.tiny_models import tiny_sd1
from worker.contract.errors import InvalidJobError, JobCancelledError
from worker.contract.record import JobRecord, State
from worker.engine.capacity import jobs_in_flight

#: Steps and pixels of a job that runs longer than any test checks it.
LONG = {"steps": 150, "width": 256, "height": 256}
#: Rows in a step of the worker, at most. It has more jobs of prompt files in flight.
ROWS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd1(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def stack(model: Path, servers: Stack) -> Iterator[Stack]:
    with Stack(workers=0) as stack:
        settings = {"SMALLCAT_DEFAULT_STEPS": "4", "SMALLCAT_MAX_BATCH": f"{ROWS}"}
        worker = stack.new_worker({"SMALLCAT_MODEL": str(model), **settings})
        worker.start()
        yield stack


@pytest.fixture(autouse=True)
def producer_environment(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in stack.variables.items():
        monkeypatch.setenv(name, value)


def wait_until_running(handle: JobHandle) -> None:
    """Return when the job has left the queue."""
    with session().records.listen(f"smallcat:job:{handle.id}") as wait_for_event:
        while handle.state() is State.QUEUED:
            wait_for_event(1.0)


def test_a_prompt_becomes_a_picture_and_a_record(model: Path) -> None:
    result = submit_job("a small cat", seed=7).result(timeout=30)
    assert result.state is State.DONE
    assert (result.seed, result.width, result.height, result.job.steps) == (7, 64, 64, 4)
    assert result.attempts == 1
    assert result.uri is not None
    assert result.uri.endswith(f"/images/{result.id[:2]}/{result.id}.png")
    assert result.timings.queued is not None
    assert result.timings.rendered is not None
    assert result.timings.uploaded is not None
    with urllib.request.urlopen(result.url(), timeout=10) as answer:  # noqa: S310 - our own link
        assert answer.read() == result.data()
        assert answer.headers["Content-Type"] == "image/png"


def test_the_picture_is_the_one_that_diffusers_draws(model: Path) -> None:
    job = {"seed": 11, "steps": 6, "guidance_scale": 5.0, "negative_prompt": "blurry", "scheduler": "euler"}
    image = submit_job("two cats", **job).image(timeout=30)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "two cats",
        negative_prompt="blurry",
        num_inference_steps=6,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(11),
    ).images[0]
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1


def test_a_picture_becomes_another_one_and_a_part_of_it(model: Path) -> None:
    """Of image to image by diffusers, and of a mask all that it keeps."""
    photo = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 64, 48))
    job = {"seed": 11, "steps": 6, "guidance_scale": 5.0, "scheduler": "euler", "strength": 0.6}
    drawn, part = submit_job("two cats", image=photo, **job), submit_job("a", image=photo, mask=mask, **job)
    pipeline = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(model, safety_checker=None)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "two cats",
        image=photo,
        strength=0.6,
        num_inference_steps=6,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(11),
    ).images[0]
    image = np.asarray(drawn.image(timeout=30)).astype(int)
    assert np.abs(image - np.asarray(expected).astype(int)).max() <= 1
    result = part.result(timeout=30)
    assert any("preserve_unmasked=no" in warning for warning in result.warnings)
    black = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(part.image(timeout=30))[black], np.asarray(photo)[black])


def test_the_record_beside_the_picture_is_the_whole_job(stack: Stack) -> None:
    result = submit_job("a record", seed=1, metadata={"order": 5}).result(timeout=30)
    stored = stack.s3.folder / "smallcat" / "images" / result.id[:2] / f"{result.id}.json"
    record = JobRecord.model_validate_json(stored.read_text())
    assert record.job == result.job
    assert record.job.metadata == {"order": 5}
    assert record.job.id == result.id
    assert record.uri == result.uri


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_a_picture_s_infotext_gives_an_equal_job(image_format: str) -> None:
    text = 'a cat,\nsaid "Steps: 5" — 猫'
    result = submit_job(text, negative_prompt="dogs: none", seed=3, format=image_format).result(timeout=30)
    again = submit_job(job_from_image(result.data()))
    assert again.id == result.id
    assert again.result(timeout=30).cached


def test_a_picture_that_is_there_is_not_rendered_again() -> None:
    first = submit_job("twice", seed=5, metadata={"n": 1}).result(timeout=30)
    second = submit_job("twice", seed=5, metadata={"n": 2}, priority=9).result(timeout=30)
    assert (first.cached, second.cached) == (False, True)
    assert second.id == first.id
    assert second.data() == first.data()
    assert second.job.metadata == {"n": 2}


def test_two_equal_jobs_at_once_render_once() -> None:
    handles = [submit_job("at once", seed=6, **LONG) for _ in range(4)]
    assert len({handle.id for handle in handles}) == 1
    results = [handle.result(timeout=60) for handle in handles]
    assert {result.attempts for result in results} == {1}
    assert not any(result.cached for result in results)


def test_mixed_jobs_render_together_and_each_gets_its_own_picture() -> None:
    jobs = [
        {"prompt": f"cat {n}", "seed": n, "steps": 3 + n % 5, "guidance_scale": (1.0, 7.5)[n % 2]}
        for n in range(12)
    ]
    handles = [submit_job(**job) for job in jobs]
    results = [handle.result(timeout=60) for handle in handles]
    for job, result in zip(jobs, results, strict=True):
        assert result.job.prompt == job["prompt"]
    alone = submit_job(**jobs[3], metadata={"alone": True}, format="webp").image(timeout=30)
    together = np.asarray(results[3].image(), dtype=int)
    assert np.abs(together - np.asarray(alone, dtype=int)).max() <= 1
    assert len({result.data() for result in results}) == 12


def test_a_live_job_is_next_while_a_prompt_file_fills_the_worker() -> None:
    least, most = (jobs_in_flight(ROWS, job_s)[0] for job_s in (math.inf, 1e-9))
    filling = [submit_job(f"line {n}", seed=n, priority=3, **LONG) for n in range(most + ROWS)]
    for handle in filling[:least]:
        wait_until_running(handle)
    assert submit_job("live", seed=1).result(timeout=30).state is State.DONE
    states = [handle.state() for handle in filling]
    assert states[:least] == [State.RUNNING] * least
    assert states[most:] == [State.QUEUED] * ROWS
    for handle in filling:
        handle.cancel()


def test_a_job_that_fails_fails_alone() -> None:
    # LCM takes at most as many steps as the model was distilled for: 50 here.
    bad = submit_job("bad", seed=1, scheduler="lcm", steps=150)
    others = [submit_job(f"other {n}", seed=n) for n in range(3)]
    with pytest.raises(InvalidJobError, match="150"):
        bad.result(timeout=30)
    assert bad.record().error_type == "InvalidJobError"
    assert [other.result(timeout=30).state for other in others] == [State.DONE] * 3


def test_a_running_job_reports_its_steps_and_stops_when_cancelled() -> None:
    # Long enough for a test that is held up while it runs.
    handle = submit_job("long", **{**LONG, "width": 512, "height": 512})
    wait_until_running(handle)
    while not (progress := handle.progress()).step:
        pass
    assert 0 < progress.step <= progress.steps
    assert progress.fraction <= 1
    assert handle.cancel() is State.RUNNING
    with pytest.raises(JobCancelledError):
        handle.result(timeout=10)
    assert handle.record().step < 150
    with pytest.raises(JobCancelledError):
        JobHandle(handle.id).result(timeout=1)


def test_a_cancelled_job_can_be_submitted_again() -> None:
    handle = submit_job("again", seed=9)
    handle.cancel()
    assert submit_job("again", seed=9).result(timeout=30).state is State.DONE


def test_a_long_prompt_is_cut_with_a_warning() -> None:
    result = submit_job("cat " * 200, seed=1).result(timeout=30)
    assert any("77" in warning for warning in result.warnings)


def test_a_job_for_a_model_that_no_worker_serves_waits_with_a_note() -> None:
    handle = submit_job("a cat", model="another/model")
    assert handle.state() is State.QUEUED
    progress = handle.progress()
    assert progress.workers == 0
    assert "another/model" in progress.note
    assert "start" in progress.note
    with pytest.raises(TimeoutError):
        handle.result(timeout=0.2)
    assert handle.cancel() is State.CANCELLED


def test_a_handle_works_in_another_process_by_its_id(stack: Stack) -> None:
    import subprocess
    import sys

    handle = submit_job("elsewhere", seed=2)
    code = f"from producer import JobHandle; print(JobHandle({handle.id!r}).result(30).uri)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=stack.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == handle.result(timeout=30).uri


def test_all_waiting_threads_get_the_result() -> None:
    handle = submit_job("for all threads", steps=20)
    results: list[JobResult] = []
    threads = [threading.Thread(target=lambda: results.append(handle.result(timeout=30))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8


@pytest.mark.services  # It starts another worker with torch. The id of each revision is in test_job.py.
def test_a_changed_model_does_not_answer_with_the_old_one_s_pictures(
    stack: Stack, model: Path, tmp_path: Path
) -> None:
    old = submit_job("which revision", seed=4).result(timeout=30)
    changed = tiny_sd1(tmp_path / "tiny", safety_checker="nothing")
    worker = stack.new_worker({"SMALLCAT_MODEL": str(changed), "SMALLCAT_DEFAULT_STEPS": "4"})
    worker.start()
    try:
        new = submit_job("which revision", seed=4).result(timeout=30)
        assert new.id != old.id
        assert new.job.revision != old.job.revision
        assert not new.cached
        assert new.nsfw is False
        # The old revision is still there for those who ask for it.
        assert submit_job("which revision", seed=4, revision=old.job.revision).id == old.id
    finally:
        worker.stop()
        stack.workers.remove(worker)


def test_the_command_line_submits_shows_and_saves(stack: Stack, tmp_path: Path) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "producer",
            "submit",
            "a small cat",
            "--seed",
            "8",
            "--output",
            str(tmp_path),
            "--json",
        ],
        env=stack.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    printed = json.loads(done.stdout)
    with Image.open(printed["path"]) as image:
        assert image.size == (64, 64)
    assert printed["url"].startswith("http://")
