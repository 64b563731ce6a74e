"""Jobs that begin with an image, with and without a mask, against diffusers' own pipelines, on a CPU."""

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
from tests.worker.device.noise_schedules import IN_DIFFUSERS
from worker.contract.choices import NoiseSchedule, Scheduler
from worker.contract.errors import InvalidJobError, OutOfMemoryError, RenderError, SmallcatError
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.beginnings import NOT_SEEN, drawn_pixels
from worker.device.job_state import JobState
from worker.device.model_runner import ModelRunner
from worker.device.schedulers.noise_schedules import is_offered
from worker.device.schedulers.samplers import CLASSES, class_of
from worker.device.step import batch_of, denoise
from worker.device.unet_family import SEEN
from worker.engine.runner import JobInputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]

SIDE = 64


def tiny_v(folder: Path, **more: Any) -> Path:
    """One that predicts v, of 4 channels, which diffusers' inpainting needs: the other one has 8."""
    path = tiny_models.tiny_sd1(folder, **more)
    config = path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    return path


MODELS = {
    "sd1": tiny_models.tiny_sd1,
    "sd2": tiny_models.tiny_sd2,
    "v": tiny_v,
    "sdxl": tiny_models.tiny_sdxl,
    # Their UNets take 9 channels.
    "sd1 for inpainting": functools.partial(tiny_models.tiny_sd1, attends_first=True, inpainting=True),
    "v for inpainting": functools.partial(tiny_v, inpainting=True),
    "sdxl for inpainting": functools.partial(tiny_models.tiny_sdxl, inpainting=True),
    # By a worker with SMALLCAT_MODEL_VAE.
    "sd1 with a tiny VAE": tiny_models.tiny_sd1,
    "sdxl with a tiny VAE": tiny_models.tiny_sdxl,
}


def tiny_thresholds(folder: Path) -> Path:
    """One whose scheduler is not linear: each job is stepped by a scheduler of its own."""
    path = tiny_models.tiny_sd1(folder)
    config = path / "scheduler" / "scheduler_config.json"
    more = {"thresholding": True, "sample_max_value": 1.5}
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    index = path / "model_index.json"
    scheduler = {"scheduler": ["diffusers", "DDIMScheduler"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | scheduler))
    return path


#: Those of which few schedulers are tried.
OTHERS = {"lcm": tiny_models.tiny_lcm, "thresholds": tiny_thresholds}
PIPELINES: dict[tuple[bool, bool], Any] = {
    (False, False): diffusers.StableDiffusionImg2ImgPipeline,
    (False, True): diffusers.StableDiffusionInpaintPipeline,
    (True, False): diffusers.StableDiffusionXLImg2ImgPipeline,
    (True, True): diffusers.StableDiffusionXLInpaintPipeline,
}
REFERENCE = f"sha256:{'0' * 64}:{SIDE}x{SIDE}"
NAMED = [Scheduler.DEFAULT, *CLASSES]
#: Each keeps other tensors, or begins in another way.
A_FEW = [Scheduler.EULER_ANCESTRAL, Scheduler.PNDM, Scheduler.HEUN, Scheduler.DPMPP_2M_KARRAS]


def a_picture() -> NDArray[np.uint8]:
    across, down = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    channels = [across * 4 % 256, down * 4 % 256, (across * down) % 256]
    return np.stack(channels, axis=-1).astype(np.uint8)


def a_mask() -> NDArray[np.uint8]:
    """White in the middle, with an edge that is neither."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[10:50, 20:64] = 100
    mask[14:44, 24:64] = 255
    return mask


#: Of a job without one, where the model was made for inpainting.
ALL_WHITE = np.full((SIDE, SIDE), 255, np.uint8)
IMAGE_ONLY, WITH_MASK = JobInputs(a_picture()), JobInputs(a_picture(), a_mask())


class Model:
    """A tiny model behind a runner, and diffusers' pipelines for images with the same modules."""

    def __init__(self, name: str, folder: Path) -> None:
        path = (MODELS | OTHERS)[name](folder / name)
        self.own: Any = diffusers.DiffusionPipeline.from_pretrained(path)
        settings = WorkerSettings(model=str(path))
        if name.endswith("with a tiny VAE"):
            self.own.register_modules(vae=tiny_models.tiny_vae())
            self.own.vae.save_pretrained(folder / "taesd")
            settings = settings.model_copy(update={"model_vae": str(folder / "taesd")})
        self.runner = ModelRunner(settings)
        # diffusers 0.42.1 looks for the last norm where transformers had it before version 5.
        object.__setattr__(self.own.text_encoder, "text_model", self.own.text_encoder)
        self.is_xl = name.startswith("sdxl")
        self.sees_masks = name.endswith("for inpainting")

    def expected(
        self, job: Job, image: Image.Image | None = None, mask: Image.Image | None = None
    ) -> NDArray[np.uint8]:
        """What diffusers makes of `job`, of `a_picture` and `a_mask` unless they are given."""
        kind, options = CLASSES.get(job.scheduler, (type(self.own.scheduler).__name__, {}))
        options = {**options, **IN_DIFFUSERS[job.schedule]}
        if kind == "DPMSolverSDEScheduler":
            options["noise_sampler_seed"] = job.seed
        has_mask = bool(job.mask) or self.sees_masks
        pipeline = PIPELINES[self.is_xl, has_mask](**self.own.components)
        pipeline.scheduler = class_of(kind).from_config(self.own.scheduler.config, **options)
        pipeline.set_progress_bar_config(disable=True)
        own_mask = Image.fromarray(a_mask() if job.mask else ALL_WHITE)
        masked = {"mask_image": mask or own_mask, "padding_mask_crop": job.padding}
        masked |= {"width": job.width, "height": job.height}
        return np.asarray(
            pipeline(
                job.prompt,
                image=image or Image.fromarray(a_picture()),
                strength=job.strength or 1.0,
                num_inference_steps=job.steps,
                guidance_scale=job.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(job.seed),
                **(masked if has_mask else {}),
            ).images[0]
        )

    def together(self, jobs: list[Job], inputs: list[JobInputs | None] | None = None) -> list[Any]:
        """The runner's pictures of jobs that share their steps, by `inputs_of` unless these are given."""
        inputs = inputs or [inputs_of(job) for job in jobs]
        states = [self.runner.prepare(job, each) for job, each in zip(jobs, inputs, strict=True)]
        while left := [state for state in states if state.step < state.steps]:
            assert self.runner.step(left) == [None] * len(left)
        return list(self.runner.decode(states))

    def check(self, *jobs: Job) -> None:
        """Those of `jobs` that begin with an image are what diffusers gives, within 1 of 255.

        All are, of a model that was made for inpainting: as with a mask that is all white.
        """
        for job, picture in zip(jobs, self.together(list(jobs)), strict=True):
            if not job.image and not self.sees_masks:
                continue
            assert_drawn(picture, self.expected(job), job)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: Model(name, folder))


def inputs_of(job: Job) -> JobInputs | None:
    if not job.image:
        return None
    return WITH_MASK if job.mask else IMAGE_ONLY


def a_job(**fields: Any) -> Job:
    defaults = {"prompt": "a small dog", "seed": 7, "steps": 5, "guidance_scale": 5.0}
    return Job.parse({**defaults, "width": SIDE, "height": SIDE, **fields})


def of_image(**fields: Any) -> Job:
    return a_job(**{"image": REFERENCE, "strength": 0.7, **fields})


def of_mask(**fields: Any) -> Job:
    return of_image(**{"mask": REFERENCE, "preserve_unmasked": False, **fields})


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_diffusers_beside_jobs_of_text(models: Any, name: str) -> None:
    masked = [] if name == "sd2" else [of_mask(seed=8), of_mask(strength=1.0)]
    models(name).check(of_image(), a_job(seed=9, steps=3), *masked)


def test_a_latent_consistency_model_is_equal_to_the_pipelines_of_other_models(models: Any) -> None:
    """diffusers has one of its own for images, which runs all steps at any strength."""
    models("lcm").check(
        of_image(strength=0.5), a_job(seed=9, steps=3), of_mask(seed=8), of_mask(strength=1.0)
    )


def test_a_step_that_fails_at_one_job_leaves_all_as_they_were(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may run out while the scheduler of a job of its own works: those before it are tried again."""
    runner, jobs = models("thresholds").runner, [of_mask(), of_image(seed=8)]
    states = [runner.prepare(job, inputs_of(job)) for job in jobs]
    step, fails = JobState._sampler_step, True

    def out_of_memory_once(state: JobState, *given: Any) -> Any:
        nonlocal fails
        if state is states[1] and state.step + 1 == state.steps and fails:
            fails = False
            raise MemoryError
        return step(state, *given)

    monkeypatch.setattr(JobState, "_sampler_step", out_of_memory_once)
    while states[0].step + 1 < states[0].steps:
        runner.step(states)
    with pytest.raises(OutOfMemoryError):
        runner.step(states)
    assert [state.steps - state.step for state in states] == [1, 1]
    assert [runner.step([state]) for state in states] == [[None], [None]]
    for job, picture in zip(jobs, runner.decode(states), strict=True):
        assert_drawn(picture, models("thresholds").expected(job), job)


def test_equal_to_diffusers_with_a_few_schedulers(models: Any) -> None:
    for scheduler in A_FEW:
        models("sd1").check(of_image(scheduler=scheduler), of_mask(scheduler=scheduler))


def test_equal_to_diffusers_with_a_tiny_vae_which_draws_nothing_to_encode(models: Any) -> None:
    models("sd1 with a tiny VAE").check(of_image(scheduler="euler_a"), of_mask(scheduler="euler_a"))


def test_a_model_made_for_inpainting_is_equal_to_diffusers_with_a_few_schedulers(models: Any) -> None:
    of_each = [
        each
        for scheduler in (Scheduler.EULER_ANCESTRAL, Scheduler.HEUN, Scheduler.DPMPP_2M_KARRAS)
        for each in (of_mask(scheduler=scheduler, strength=0.6), of_mask(scheduler=scheduler, strength=1.0))
    ]
    models("sd1 for inpainting").check(*of_each, a_job(scheduler="euler_a"), of_image(strength=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", NAMED)
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_diffusers_with_every_scheduler(models: Any, name: str, scheduler: Scheduler) -> None:
    for strength in (0.3, 0.75, 1.0):
        fields = {"scheduler": scheduler, "strength": strength, "steps": 8}
        jobs = [of_image(**fields), *([] if name == "sd2" else [of_mask(**fields)])]
        for job in jobs:
            models(name).check(job)
        models(name).check(a_job(), *jobs, of_image(scheduler="heun"))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [each for each in NoiseSchedule if each != "align_your_steps"])
@pytest.mark.parametrize("scheduler", [Scheduler.EULER, Scheduler.DPMPP_2M, Scheduler.HEUN])
def test_equal_to_diffusers_with_noise_schedules(
    models: Any, scheduler: Scheduler, schedule: NoiseSchedule
) -> None:
    if schedule is NoiseSchedule.SIMPLE or not is_offered(class_of(CLASSES[scheduler][0]), schedule):
        pytest.skip("diffusers' pipelines take no such schedule")
    fields = {"scheduler": scheduler, "schedule": schedule}
    models("sd1").check(of_image(**fields), of_mask(**fields))


def test_a_job_without_a_mask_keeps_its_bits_beside_one_that_has_one(models: Any) -> None:
    runner = models("sd1").runner
    jobs = [a_job(scheduler="euler_a"), of_mask(), of_image()]
    batch = batch_of([runner.prepare(job, inputs_of(job)).next_inputs() for job in jobs])
    unmasked = batch.unmasked()
    assert batch.kind == unmasked.kind, "what is compiled is the same"
    with torch.no_grad():
        [states, *_], [without, *_] = (denoise(runner._family.forward, each) for each in (batch, unmasked))
    assert [torch.equal(*each) for each in zip(states, without, strict=True)] == [True, False, True]


@pytest.mark.parametrize("name", ["sd1", "sd1 for inpainting"])
def test_what_a_model_sees_of_masks_is_a_condition_of_its_rows_alone(models: Any, name: str) -> None:
    """Others take what they took before: their compiled functions and graphs have no input for it."""
    runner = models(name).runner
    composed = of_mask(prompt="a cat AND a dog", prompt_syntax="a1111")
    jobs = [a_job(guidance_scale=1.0), of_mask(strength=1.0), of_image(), composed]
    batch = batch_of([runner.prepare(job, inputs_of(job)).next_inputs() for job in jobs])
    assert batch.states.shape[2:] == (4, 8, 8)
    assert (SEEN in batch.conditions) == ("inpainting" in name)
    assert (batch.kept is None) == ("inpainting" in name)
    if (seen := batch.conditions.get(SEEN)) is not None:
        assert seen.shape == (8, 5, 8, 8)
        assert torch.equal(seen[1], seen[2])
        assert [bool(row[0].all()) for row in seen] == [True, *[False] * 2, *[True] * 2, *[False] * 3]


def test_what_is_drawn_of_a_cut_out_is_not_seen(models: Any) -> None:
    """Nothing white either, which lies behind the cut-out, where a mask ends within a latent."""
    job = of_mask(mask="alpha", preserve_unmasked=True, strength=1.0)
    other = a_picture()
    other[drawn_pixels(job, a_mask())] = 255
    prepare = models("sd1 for inpainting").runner.prepare
    seen = [
        prepare(job, JobInputs(image, a_mask())).next_inputs().conditions[SEEN]
        for image in (a_picture(), other)
    ]
    assert torch.equal(*seen)


def test_an_image_that_is_not_seen_has_a_warning(models: Any) -> None:
    prepare = models("sd1 for inpainting").runner.prepare
    assert prepare(of_image(strength=1.0), IMAGE_ONLY).warnings == (NOT_SEEN,)
    assert prepare(of_image(strength=0.9), IMAGE_ONLY).warnings == ()
    assert prepare(of_mask(strength=1.0), WITH_MASK).warnings == ()


def test_a_job_of_an_image_has_the_steps_of_its_strength(models: Any) -> None:
    runner = models("sd1").runner
    assert runner.prepare(of_image(steps=10, strength=0.3, scheduler="euler"), IMAGE_ONLY).steps == 3
    assert runner.prepare(of_image(steps=10, strength=0.3, scheduler="heun"), IMAGE_ONLY).steps == 5


def test_a_latent_is_drawn_where_any_pixel_of_the_image_is_transparent() -> None:
    mask = np.zeros((16, 24), np.uint8)
    mask[7, 8], mask[12, 0] = 128, 127
    cells = drawn_pixels(of_mask(mask="alpha", preserve_unmasked=True), mask)[::8, ::8]
    assert cells.tolist() == [[False, True, False], [False, False, False]]
    for as_in_diffusers in (of_mask(mask="alpha"), of_mask(preserve_unmasked=True)):
        assert np.array_equal(drawn_pixels(as_in_diffusers, mask), mask >= 128)


def test_steps_keep_of_a_cut_out_what_is_opaque_alone(models: Any) -> None:
    alpha = np.zeros((SIDE, SIDE), np.uint8)
    alpha[21:43, 21:43] = 255
    inputs = JobInputs(a_picture(), 255 - alpha)
    for preserve, latents in ((True, 2 * 2), (False, 3 * 3)):
        job = of_mask(mask="alpha", preserve_unmasked=preserve)
        kept = models("sd1").runner.prepare(job, inputs)._beginning.kept
        assert int((kept[0][0] == 0).sum()) == latents


def refusal(models: Any, job: Job, inputs: JobInputs | None, name: str = "sd1") -> SmallcatError:
    with pytest.raises(SmallcatError) as caught:
        models(name).runner.prepare(job, inputs)
    return caught.value


def test_what_is_not_drawn_is_refused(models: Any) -> None:
    dot = np.zeros((SIDE, SIDE), np.uint8)
    dot[3, 3] = 255
    for name in ("sd1", "sd1 for inpainting"):
        error = refusal(models, of_mask(), JobInputs(a_picture(), dot), name)
        assert isinstance(error, InvalidJobError)
        assert "nothing would be drawn" in str(error)
    assert isinstance(refusal(models, of_image(), None), RenderError)
    assert isinstance(refusal(models, of_mask(), IMAGE_ONLY), RenderError)
