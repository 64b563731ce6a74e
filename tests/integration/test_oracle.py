"""Many different jobs at once through the real queue, drawn by the bundled model: each gets its own picture.

The judge of the demo model says what a picture shows. One that it does not take for its own prompt must equal
what diffusers' own pipeline draws for that job alone.
"""

from __future__ import annotations

import itertools
import re
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import diffusers
import numpy as np
import pytest
from PIL import Image

from deploy.embedded.stack import Stack
from producer import submit_job
from worker.contract.choices import Scheduler
from worker.contract.job import Job
from worker.demo.training import classifier, evaluate
from worker.demo.training.subjects import scored_words
from worker.device.schedulers.samplers import CLASSES

pytestmark = pytest.mark.timeout(300)

#: Scheduler, steps and guidance scale under which the model draws well, so that the judge can tell.
WAYS = (
    (Scheduler.DEFAULT, 20, 4.0),
    (Scheduler.DDIM, 18, 3.0),
    (Scheduler.EULER, 20, 4.0),
    (Scheduler.EULER_ANCESTRAL, 22, 4.0),
    (Scheduler.DPMPP_2M, 16, 4.0),
    (Scheduler.DPMPP_2M_KARRAS, 20, 3.0),
    (Scheduler.PNDM, 19, 1.0),
    (Scheduler.UNIPC, 15, 3.5),
    (Scheduler.LCM, 12, 2.0),
    (Scheduler.DEFAULT, 14, 1.0),
    (Scheduler.PNDM, 20, 2.0),
)
#: Width and height in pixels: most jobs share one lane, the others have lanes of their own.
CANVASES = ((128, 128), (128, 128), (160, 160), (128, 128), (128, 128), (128, 160), (128, 128))
#: What the pictures have to show, in the order of `JOBS`.
WORDS = scored_words()[:64]
JOBS = [
    Job(
        prompt=f"a {word}",
        seed=100 + number,
        scheduler=scheduler,
        steps=steps,
        guidance_scale=guidance_scale,
        width=width,
        height=height,
    )
    for number, (word, (scheduler, steps, guidance_scale), (width, height)) in enumerate(
        zip(WORDS, itertools.cycle(WAYS), itertools.cycle(CANVASES), strict=False)
    )
]


class Oracle:
    """Tells whether pictures, of the first ones of `JOBS`, are those of their own jobs."""

    def __init__(self) -> None:
        self._recogniser = evaluate.Recogniser(*classifier.load_classifier())
        self._pipeline = diffusers.StableDiffusionPipeline.from_pretrained(evaluate.MODEL)
        self._own = self._pipeline.scheduler

    def doubted(self, images: Sequence[Image.Image]) -> list[int]:
        """Numbers of the pictures in which the judge does not see what was asked for."""
        names = self._recogniser.names(images)
        words = WORDS[: len(images)]
        return [number for number, (name, word) in enumerate(zip(names, words, strict=True)) if name != word]

    def strangers(self, images: Sequence[Image.Image]) -> list[int]:
        """Numbers of the doubted pictures that are not what the job gives when it is drawn alone, either."""
        return [
            number
            for number in self.doubted(images)
            if _difference(images[number], self._alone(JOBS[number])) > 1
        ]

    def _alone(self, job: Job) -> Image.Image:
        kind, options = CLASSES.get(job.scheduler, (type(self._own).__name__, {}))
        self._pipeline.scheduler = getattr(diffusers, kind).from_config(self._own.config, **options)
        (image,) = evaluate.draw(
            self._pipeline,
            [job.prompt],
            [job.seed or 0],
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            width=job.width,
            height=job.height,
        )
        return image


def _difference(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of a pixel, 0..255; 255 for pictures of unlike size."""
    if one.size != other.size:
        return 255
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


@dataclass(frozen=True)
class Session:
    """What the worker drew, for the first ones of `JOBS`, and how."""

    images: list[Image.Image]
    #: Rows of the UNet in a step, the mean over all steps.
    mean_rows: float


@pytest.fixture(scope="module", params=[24, pytest.param(64, marks=pytest.mark.services)])
def session(servers: Stack, request: pytest.FixtureRequest) -> Iterator[Session]:
    """So many jobs at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Stack(workers=0) as stack, pytest.MonkeyPatch.context() as patch:
        for name, value in stack.variables.items():
            patch.setenv(name, value)
        # No model is named, so it is the bundled one.
        stack.new_worker({"SMALLCAT_MAX_BATCH": "16", "SMALLCAT_METRICS_PORT": str(port)}).start()
        handles = [submit_job(job) for job in JOBS[: request.param]]
        images = [handle.image(timeout=200) for handle in handles]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        yield Session(images, _sample(metrics, "step_rows_sum") / _sample(metrics, "step_rows_count"))


def _sample(metrics: str, name: str) -> float:
    """The value of one of the worker's metrics."""
    found = re.search(rf"^smallcat_{name} (\S+)$", metrics, re.MULTILINE)
    assert found, f"no {name} in {metrics}"
    return float(found[1])


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def test_each_of_many_jobs_in_mixed_batches_gets_its_own_picture(session: Session, oracle: Oracle) -> None:
    assert session.mean_rows > (6 if len(session.images) == len(JOBS) else 4)
    sizes = [(job.width, job.height) for job in JOBS[: len(session.images)]]
    assert [image.size for image in session.images] == sizes
    # The judge itself must know most of them, or it would be the lone drawings that are tested.
    assert len(oracle.doubted(session.images)) <= len(session.images) / 10
    assert [JOBS[number].prompt for number in oracle.strangers(session.images)] == []


def test_two_swapped_pictures_are_found(session: Session, oracle: Oracle) -> None:
    swapped = [session.images[1], session.images[0], *session.images[2:]]
    assert oracle.strangers(swapped) == [0, 1]
