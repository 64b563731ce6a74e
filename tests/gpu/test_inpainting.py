"""Models made for inpainting on a real GPU: compiled steps of mixed jobs, beside those of a plain worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch._dynamo.utils import counters

from tests.benchmarks.mates import psnr
from tests.inpainting_model import bundled_for_inpainting
from worker.contract.choices import Scheduler
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.model_runner import ModelRunner
from worker.engine.runner import JobInputs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

#: Least PSNR in decibels of a picture of a compiled batch beside that of the plain worker.
TOLERANCE_DB = 40.0
SIDE = 128
REFERENCE = f"sha256:{'0' * 64}:{SIDE}x{SIDE}"
#: Text alone, an image, and masks; guided and not; a scheduler that is no weights of a step.
KINDS: Sequence[dict[str, Any]] = (
    {},
    {"guidance_scale": 1.0},
    {"image": REFERENCE, "strength": 0.6},
    {"image": REFERENCE, "mask": REFERENCE, "strength": 0.6},
    {"image": REFERENCE, "mask": REFERENCE, "preserve_unmasked": False},
    {"image": REFERENCE, "mask": REFERENCE, "scheduler": Scheduler.EULER_ANCESTRAL},
    {"image": REFERENCE, "mask": REFERENCE, "scheduler": Scheduler.DPMPP_SDE, "guidance_scale": 1.0},
)


def job_of(seed: int, kind: dict[str, Any]) -> Job:
    return Job.parse(
        {"prompt": "a small cat", "seed": seed, "steps": 12, "width": SIDE, "height": SIDE, **kind}
    )


JOBS = [job_of(seed, kind) for seed, kind in enumerate(KINDS)]


def inputs_of(job: Job) -> JobInputs | None:
    if not job.image:
        return None
    across, down = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    image = np.stack([across * 2, down * 2, across + down], axis=-1).astype(np.uint8)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    # Another one for each job: what a step holds of masks is each job's own.
    mask[24 : 96 - 4 * job.seed, 32:120] = 255
    return JobInputs(image, mask if job.mask else None)


def finish(runner: ModelRunner, jobs: Sequence[Job]) -> list[Any]:
    """The pixels of jobs that start together."""
    states = [runner.prepare(job, inputs_of(job)) for job in jobs]
    while running := [state for state in states if state.step < state.steps]:
        assert runner.step(running) == [None] * len(running)
    return [picture.pixels for picture in runner.decode(states)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundled_for_inpainting(tmp_path_factory.mktemp("models") / "inpainting")


@pytest.fixture(scope="module")
def runners(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelRunner, ModelRunner]:
    """The model compiled and plain."""
    cache = str(tmp_path_factory.mktemp("cache"))
    both = tuple(
        ModelRunner(WorkerSettings(model=str(model), cache_dir=cache, compile=asked, compile_first=True))
        for asked in (True, False)
    )
    for runner in both:
        chosen = {choice.what: choice.choice for choice in runner.warm_up()}
        assert chosen["compile"] == ("yes" if runner is both[0] else "no")
    return both[0], both[1]


def test_every_kind_of_job_in_one_compiled_batch_and_nothing_is_compiled_again(
    runners: tuple[ModelRunner, ModelRunner],
) -> None:
    compiled, plain = runners
    before = counters["stats"]["unique_graphs"]
    found = zip(KINDS, finish(compiled, JOBS), finish(plain, JOBS), strict=True)
    values = {str(kind): psnr(one, other) for kind, one, other in found}
    assert min(values.values()) >= TOLERANCE_DB, values
    for count in (1, 3, 5):
        for one, other in zip(finish(compiled, JOBS[-count:]), finish(plain, JOBS[-count:]), strict=True):
            assert psnr(one, other) >= TOLERANCE_DB
    assert counters["stats"]["unique_graphs"] == before


def test_a_picture_depends_on_its_mask(runners: tuple[ModelRunner, ModelRunner]) -> None:
    """A graph's input for masks is filled anew for each batch."""
    compiled, _ = runners
    [masked] = finish(compiled, [job_of(1, {**KINDS[4]})])
    [text] = finish(compiled, [job_of(1, {})])
    [again] = finish(compiled, [job_of(1, {**KINDS[4]})])
    assert psnr(masked, text) < TOLERANCE_DB
    assert np.array_equal(masked, again)


def test_exact_mode_gives_the_same_bits_alone_and_in_a_batch(model: Path, tmp_path: Path) -> None:
    runner = ModelRunner(WorkerSettings(model=str(model), cache_dir=str(tmp_path), exact=True))
    runner.warm_up()
    together = finish(runner, JOBS)
    for job, pixels in zip(JOBS, together, strict=True):
        [alone] = finish(runner, [job])
        assert np.array_equal(alone, pixels), job
