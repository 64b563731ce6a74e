"""Jobs with a second pass against diffusers done by hand: two pipelines, and what is between, on a CPU."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests import tiny_models
from tests.worker.device.beside_diffusers import assert_drawn
from worker.contract.choices import Scheduler
from worker.contract.errors import InvalidJobError
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.beginnings import FirstLatents
from worker.device.model_runner import ModelRunner
from worker.device.schedulers.samplers import CLASSES, class_of
from worker.engine.engine import Engine
from worker.engine.runner import FirstPass, JobInputs, Picture

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor:FutureWarning"),
]

SIDE = 64


def tiny_v(folder: Path) -> Path:
    """One that predicts v, of 4 channels, which diffusers takes as latents: the other one has 8."""
    path = tiny_models.tiny_sd1(folder)
    config = path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    return path


MODELS = {"sd1": tiny_models.tiny_sd1, "v": tiny_v, "sdxl": tiny_models.tiny_sdxl}
REFERENCE = f"sha256:{'0' * 64}:{SIDE}x{SIDE}"
#: Each keeps other tensors, draws noise, or begins in another way.
A_FEW = [Scheduler.EULER_ANCESTRAL, Scheduler.PNDM, Scheduler.HEUN, Scheduler.DPMPP_SDE]


def a_picture() -> NDArray[np.uint8]:
    across, down = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    channels = [across * 4 % 256, down * 4 % 256, (across * down) % 256]
    return np.stack(channels, axis=-1).astype(np.uint8)


def a_job(**fields: Any) -> Job:
    defaults = {"prompt": "a small dog", "seed": 7, "steps": 4, "guidance_scale": 5.0}
    return Job.parse({**defaults, "width": SIDE, "height": SIDE, **fields})


def upscaled(**fields: Any) -> Job:
    return a_job(**{"upscale": 1.5, "upscale_steps": 6, "upscale_strength": 0.7, **fields})


class Model:
    """A tiny model behind a runner, and diffusers' pipelines with the same modules."""

    def __init__(self, name: str, folder: Path) -> None:
        path = self.folder = MODELS[name](folder / name)
        self.runner = ModelRunner(WorkerSettings(model=str(path)))
        self.own: Any = diffusers.DiffusionPipeline.from_pretrained(path)
        # diffusers 0.42.1 looks for the last norm where transformers had it before version 5.
        object.__setattr__(self.own.text_encoder, "text_model", self.own.text_encoder)
        self.is_xl = name == "sdxl"

    def _run(self, job: Job, steps: int, pipeline_class: str, **more: Any) -> Any:
        """One pipeline, with a generator of the job's seed of its own."""
        kind, options = CLASSES.get(job.scheduler, (type(self.own.scheduler).__name__, {}))
        if kind == "DPMSolverSDEScheduler":
            options = {**options, "noise_sampler_seed": job.seed}
        name = f"StableDiffusion{'XL' if self.is_xl else ''}{pipeline_class}Pipeline"
        pipeline = getattr(diffusers, name)(**self.own.components)
        pipeline.scheduler = class_of(kind).from_config(self.own.scheduler.config, **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            job.prompt,
            num_inference_steps=steps,
            guidance_scale=job.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(job.seed),
            **more,
        ).images

    def expected(self, job: Job) -> NDArray[np.uint8]:
        """By hand: a first pipeline, its latents or its picture made larger, and image to image."""
        second = job.second_pass
        assert second is not None
        assert job.steps is not None
        given: dict[str, Any] = {"output_type": "latent" if job.upscaler == "latent" else "pil"}
        if job.image:
            given |= {"image": Image.fromarray(a_picture()), "strength": job.strength}
            [first] = self._run(job, job.steps, "Img2Img", **given)
        else:
            [first] = self._run(job, job.steps, "", width=job.width, height=job.height, **given)
        size = (second.width, second.height)
        if isinstance(first, Image.Image):
            larger: Any = first.resize(size, Image.Resampling.LANCZOS)
        else:
            factor = self.own.vae_scale_factor
            shape = (size[1] // factor, size[0] // factor)
            larger = torch.nn.functional.interpolate(first[None], size=shape, mode="bilinear")
        [last] = self._run(job, second.steps, "Img2Img", image=larger, strength=second.strength)
        return np.asarray(last)

    def together(self, jobs: list[Job]) -> list[Any]:
        """The runner's pictures of jobs that share their steps, as an engine runs them: lane by lane."""
        pictures: dict[int, Any] = {}
        states = {n: self.runner.prepare(job, inputs_of(job)) for n, job in enumerate(jobs)}
        while states:
            lane = next(iter(states.values())).lane
            batch = {n: state for n, state in states.items() if state.lane == lane}
            assert self.runner.step(list(batch.values())) == [None] * len(batch)
            for n in [n for n, state in batch.items() if state.step == state.steps]:
                [outcome] = self.runner.decode([states.pop(n)])
                if isinstance(outcome, FirstPass):
                    states[n] = self.runner.prepare(jobs[n], outcome)
                else:
                    pictures[n] = outcome
        return [pictures[n] for n in range(len(jobs))]

    def check(self, *jobs: Job) -> None:
        """Those of `jobs` that have a second pass are what diffusers gives by hand, within 1 of 255."""
        for job, picture in zip(jobs, self.together(list(jobs)), strict=True):
            if job.second_pass is None:
                continue
            assert isinstance(picture, Picture), picture
            assert picture.pixels.shape[:2] == (job.second_pass.height, job.second_pass.width)
            assert_drawn(picture, self.expected(job), job)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: Model(name, folder))


def inputs_of(job: Job) -> JobInputs | None:
    return JobInputs(a_picture()) if job.image else None


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_diffusers_by_hand_beside_jobs_of_other_kinds(models: Any, name: str) -> None:
    models(name).check(
        upscaled(),
        a_job(seed=9, steps=3),
        upscaled(upscaler="lanczos", seed=8),
        a_job(width=96, height=96, steps=9, seed=3),
        upscaled(image=REFERENCE, strength=0.5, upscale=2),
    )


def test_equal_to_diffusers_by_hand_with_a_few_schedulers(models: Any) -> None:
    models("sd1").check(*(upscaled(scheduler=scheduler) for scheduler in A_FEW))


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [Scheduler.DEFAULT, *CLASSES])
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_diffusers_by_hand_with_every_scheduler(
    models: Any, name: str, scheduler: Scheduler
) -> None:
    fields = {"scheduler": scheduler, "steps": 8, "upscale_steps": None}
    for strength in (0.3, 1.0):
        for upscaler in ("latent", "lanczos"):
            job = upscaled(**fields, upscale_strength=strength, upscaler=upscaler)
            models(name).check(job)
            models(name).check(a_job(), job, a_job(width=96, height=96))


def test_what_the_second_pass_could_not_do_is_refused_before_the_first(models: Any) -> None:
    with pytest.raises(InvalidJobError, match=r"In the second pass: steps is 60, the limit of scheduler"):
        models("sd1").runner.prepare(upscaled(scheduler="lcm", upscale_steps=60))


def test_a_second_pass_has_the_texts_of_its_steps(models: Any) -> None:
    """A prompt that changes after the first pass's last step is as one that was the other all along."""
    runner = models("sd1").runner
    texts = ("[a small dog:a red cat:4]", "a red cat")
    jobs = [upscaled(prompt=prompt, prompt_syntax="a1111") for prompt in texts]
    first = FirstPass(FirstLatents((4, 8, 8), torch.ones(4, 8, 8)))
    rows = [runner.prepare(job, first).next_inputs().texts[-1] for job in jobs]
    assert all(torch.equal(rows[0][name], rows[1][name]) for name in rows[0])


def test_the_safety_checker_looks_at_the_last_pass_alone(tmp_path: Path) -> None:
    path = tiny_models.tiny_sd1(tmp_path, safety_checker="all")
    runner = ModelRunner(WorkerSettings(model=str(path)))
    state = runner.prepare(upscaled(upscaler="lanczos", steps=1))
    assert runner.step([state]) == [None]
    [first] = runner.decode([state])
    assert isinstance(first, FirstPass)
    assert first.result.pixels.any()
    second = runner.prepare(state.job, first)
    while second.step < second.steps:
        runner.step([second])
    [picture] = runner.decode([second])
    assert picture.nsfw
    assert not picture.pixels.any()


def test_an_engine_draws_it_as_diffusers_does(models: Any) -> None:
    model = models("sd1")
    jobs = [upscaled(), upscaled(upscaler="lanczos", seed=8), a_job(width=96, height=96, steps=9)]
    engine: Engine[Any] = Engine(model.runner, job_timeout_s=60, on_failure=pytest.fail)
    engine.start()
    try:
        futures = [engine.submit(job.id, job.resolved(model.runner.served)) for job in jobs]
        pictures = [future.result(60).picture.pixels for future in futures]
    finally:
        engine.stop()
    for job, pixels in zip(jobs[:2], pictures, strict=False):
        assert np.abs(pixels.astype(int) - model.expected(job).astype(int)).max() <= 1
