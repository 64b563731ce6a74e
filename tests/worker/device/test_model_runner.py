"""The runner against diffusers' own pipelines, on tiny models and a CPU."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests import tiny_models
from tests.worker.device.beside_diffusers import assert_drawn
from tests.worker.device.noise_schedules import IN_DIFFUSERS
from worker.contract.choices import Scheduler
from worker.contract.errors import (
    DeviceError,
    InvalidJobError,
    JobTooLargeError,
    NotFiniteError,
    OutOfMemoryError,
    RenderError,
    SettingsError,
    SmallcatError,
)
from worker.contract.job import Job
from worker.contract.scheduler_names import OFFERED
from worker.contract.settings import WorkerSettings
from worker.device.job_state import JobState
from worker.device.model_runner import ModelRunner
from worker.device.schedulers.samplers import CLASSES, class_of
from worker.device.unet_family import UNetFamily
from worker.device.vae import tiles
from worker.engine.runner import Picture
from worker.model import loader

LONG = "a small cat that sits on a very long wall and looks at a very long list of very long words " * 2


#: numpy's word about what diffusers' schedulers call 1,000 times.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]


class Model:
    """A tiny model behind a runner, and diffusers' own pipeline of the same files beside it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        worker_settings = WorkerSettings(model=str(folder), **settings)
        self.loaded = loader.load(worker_settings)
        self.runner = ModelRunner(worker_settings, self.loaded)
        self.pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.own = self.pipeline.scheduler
        # diffusers 0.42.1 looks for the last norm where transformers had it before version 5.
        object.__setattr__(self.pipeline.text_encoder, "text_model", self.pipeline.text_encoder)

    def expected(self, job: Job) -> NDArray[np.uint8]:
        """The pixels of diffusers' own call for `job`."""
        kind, options = CLASSES.get(job.scheduler, (type(self.own).__name__, {}))
        options = {**options, **IN_DIFFUSERS[job.schedule]}
        if kind == "DPMSolverSDEScheduler":
            options["noise_sampler_seed"] = job.seed
        self.pipeline.scheduler = class_of(kind, with_eta=job.eta is not None).from_config(
            self.own.config, **options
        )
        if job.eta is not None:
            self.pipeline.scheduler.eta = job.eta
        arguments: dict[str, Any] = {"negative_prompt": job.negative_prompt or None}
        if isinstance(self.pipeline, diffusers.LatentConsistencyModelPipeline):
            arguments = {}
        elif job.guidance_rescale:
            arguments["guidance_rescale"] = job.guidance_rescale
        if job.eta is not None:
            arguments["eta"] = job.eta
        if job.clip_skip > 1:
            arguments["clip_skip"] = job.clip_skip - 1
        job = job.resolved(self.runner.served)
        return np.asarray(
            self.pipeline(
                job.prompt,
                width=job.width,
                height=job.height,
                num_inference_steps=job.steps,
                guidance_scale=job.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(job.seed),
                **arguments,
            ).images[0]
        )

    def check(self, job: Job, picture: Picture | SmallcatError) -> None:
        """`picture` is what diffusers gives, within 1 of 255, and is not blank."""
        assert_drawn(picture, self.expected(job), job)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tiny_models.tiny_sd1(tmp_path_factory.mktemp("models") / "sd1"))


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tiny_models.tiny_sd2(tmp_path_factory.mktemp("models") / "sd2"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tiny_models.tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl"))


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tiny_models.tiny_lcm(tmp_path_factory.mktemp("models") / "lcm"))


def a_job(**fields: Any) -> Job:
    return Job(**{"prompt": "a small cat", "seed": 7, "steps": 4, **fields})


def finish(runner: ModelRunner, *states: JobState) -> list[Picture | SmallcatError]:
    """Step all of them together until all are done; the shorter ones leave early."""
    while running := [state for state in states if state.step < state.steps]:
        assert runner.step(running) == [None] * len(running)
    return list(runner.decode(states))


def prepared(runner: ModelRunner, *jobs: Job) -> list[JobState]:
    return [runner.prepare(job) for job in jobs]


# --- the right picture --------------------------------------------------------------------------------------


def test_every_scheduler_guided_and_not_in_one_batch_sd1(sd1: Model) -> None:
    jobs = [
        a_job(
            prompt=f"cat {number}", seed=number, scheduler=name, guidance_scale=guidance, steps=3 + number % 3
        )
        for number, name in enumerate(Scheduler)
        for guidance in (6.0, 1.0)
    ]
    for job, picture in zip(jobs, finish(sd1.runner, *prepared(sd1.runner, *jobs)), strict=True):
        sd1.check(job, picture)


def test_eta_and_rescaled_guidance_in_one_batch(sd1: Model, sdxl: Model, tmp_path: Path) -> None:
    """Among jobs without either; and with zero terminal SNR, which rescaled guidance is for."""
    zero = Model(tiny_models.tiny_sd2(tmp_path / "zero", zero_terminal_snr=True))
    for tiny in (sd1, sdxl, zero):
        jobs = [
            a_job(seed=1, scheduler="ddim", eta=1.0, guidance_rescale=0.7),
            a_job(seed=2, scheduler="ddim", eta=0.3),
            a_job(seed=3, scheduler="tcd", eta=0.4, guidance_rescale=1.0),
            a_job(seed=4, scheduler="euler_ancestral", eta=0.5),
            a_job(seed=5, scheduler="ddim", guidance_scale=1.0, guidance_rescale=0.7),
            a_job(seed=6, scheduler="euler", guidance_scale=9.0, guidance_rescale=0.7, steps=3),
            a_job(seed=6, scheduler="euler", guidance_scale=9.0, steps=3),
            a_job(seed=8, guidance_scale=12.0, guidance_rescale=0.3, negative_prompt="a dog"),
        ]
        pictures = finish(tiny.runner, *prepared(tiny.runner, *jobs))
        for job, picture in zip(jobs, pictures, strict=True):
            tiny.check(job, picture)
        [alone] = finish(tiny.runner, *prepared(tiny.runner, jobs[5]))
        tiny.check(jobs[5], alone)
        assert isinstance(pictures[5], Picture)
        assert isinstance(pictures[6], Picture)
        assert np.abs(pictures[5].pixels.astype(int) - pictures[6].pixels).max() > 1


def test_a_scheduler_of_second_order_takes_two_evaluations_a_step_and_texts_count_them(sd1: Model) -> None:
    """As AUTOMATIC1111 1.10 counts: `total_steps` (modules/sd_samplers_common.py)."""
    fields = {"prompt": "[red:blue:0.5] cat", "prompt_syntax": "a1111"}
    for name in ("heun", "dpm2", "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"):
        state = sd1.runner.prepare(a_job(scheduler=name, **fields))
        assert state.steps == 2 * 4 - 1
        [prompt] = state._text.prompts
        assert list(prompt.ends) == [4, 8]
    assert sd1.runner.prepare(a_job(scheduler="dpmpp_2s")).steps == 4


def test_schedules_in_one_batch(sd1: Model) -> None:
    """Each scheduler with one of the schedules that it is offered with."""
    jobs = [
        a_job(seed=number, scheduler=name, schedule=schedules[number % 3], steps=3)
        for number, (name, schedules) in enumerate(OFFERED.items())
        if len(schedules) >= 3
    ]
    assert len(jobs) > 10
    for job, picture in zip(jobs, finish(sd1.runner, *prepared(sd1.runner, *jobs)), strict=True):
        sd1.check(job, picture)


@pytest.mark.parametrize("model", ["sd2", "sdxl"])
def test_schedulers_with_v_prediction_and_sdxl(model: str, request: pytest.FixtureRequest) -> None:
    tiny: Model = request.getfixturevalue(model)
    jobs = [
        a_job(scheduler=name, seed=number, guidance_scale=(5.0, 0.5)[number % 2])
        for number, name in enumerate(Scheduler)
    ]
    for job, picture in zip(jobs, finish(tiny.runner, *prepared(tiny.runner, *jobs)), strict=True):
        tiny.check(job, picture)


def test_zero_terminal_snr(tmp_path: Path) -> None:
    tiny = Model(tiny_models.tiny_sd2(tmp_path / "zero", zero_terminal_snr=True))
    names = (
        Scheduler.DEFAULT,
        Scheduler.EULER,
        Scheduler.DPMPP_2M,
        Scheduler.DPMPP_2M_KARRAS,
        Scheduler.UNIPC,
    )
    jobs = [a_job(scheduler=name) for name in names]
    for job, picture in zip(jobs, finish(tiny.runner, *prepared(tiny.runner, *jobs)), strict=True):
        tiny.check(job, picture)


@pytest.mark.parametrize("pipeline_class", ["LatentConsistencyModelPipeline", "StableDiffusionPipeline"])
def test_a_unet_that_embeds_guidance_takes_one_row(tmp_path: Path, pipeline_class: str) -> None:
    tiny = Model(tiny_models.tiny_lcm(tmp_path / "lcm", pipeline_class=pipeline_class))
    jobs = [a_job(guidance_scale=scale, seed=number) for number, scale in enumerate((8.5, 1.0, 3.0))]
    in_flight = prepared(tiny.runner, *jobs)
    assert [state.rows for state in in_flight] == [1, 1, 1]
    for job, picture in zip(jobs, finish(tiny.runner, *in_flight), strict=True):
        tiny.check(job, picture)


def test_other_sizes(sd1: Model, sdxl: Model) -> None:
    for tiny in (sd1, sdxl):
        jobs = [a_job(width=104, height=72), a_job(width=72, height=104, guidance_scale=1.0)]
        first, second = prepared(tiny.runner, *jobs)
        assert first.lane != second.lane
        pictures = [*finish(tiny.runner, first), *finish(tiny.runner, second)]
        for job, picture in zip(jobs, pictures, strict=True):
            tiny.check(job, picture)
            assert isinstance(picture, Picture)
            assert picture.pixels.shape == (job.height, job.width, 3)


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_negative_prompts(model: str, request: pytest.FixtureRequest) -> None:
    tiny: Model = request.getfixturevalue(model)
    jobs = [a_job(), a_job(negative_prompt="dogs"), a_job(negative_prompt=" ")]
    pictures = finish(tiny.runner, *prepared(tiny.runner, *jobs))
    for job, picture in zip(jobs, pictures, strict=True):
        tiny.check(job, picture)
    assert len({picture.pixels.tobytes() for picture in pictures if isinstance(picture, Picture)}) > 1


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl", "lcm"])
def test_layers_are_skipped_as_diffusers_skips_them(model: str, request: pytest.FixtureRequest) -> None:
    """Of the prompt alone, whose argument in diffusers is one less; in a batch with jobs that skip none."""
    tiny: Model = request.getfixturevalue(model)
    jobs = [
        a_job(clip_skip=skip, negative_prompt=negative, seed=number)
        for number, (skip, negative) in enumerate(((2, ""), (1, ""), (2, "dogs"), (1, "dogs")))
    ]
    pictures = finish(tiny.runner, *prepared(tiny.runner, *jobs))
    for job, picture in zip(jobs, pictures, strict=True):
        tiny.check(job, picture)
    assert not np.array_equal(tiny.expected(jobs[0]), tiny.expected(a_job(seed=0)))
    with pytest.raises(InvalidJobError, match="clip_skip is 3, but this model's text encoder has 2 layers"):
        tiny.runner.prepare(a_job(clip_skip=3))


def test_sdxl_latents_with_mean_and_deviation(tmp_path: Path) -> None:
    tiny = Model(tiny_models.tiny_sdxl(tmp_path / "moments", latents_mean=True))
    job = a_job()
    tiny.check(job, finish(tiny.runner, *prepared(tiny.runner, job))[0])


def test_a_single_file_gives_what_its_folder_gives(sd1: Model, tmp_path: Path) -> None:
    path, configs = tiny_models.tiny_single_file(tmp_path)
    runner = ModelRunner(WorkerSettings(model=str(path), model_config_dir=str(configs)))
    assert runner.served.name == "tiny"
    job = a_job()
    sd1.check(job, finish(runner, *prepared(runner, job))[0])


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
def test_every_attention_backend_gives_diffusers_picture(sd2: Model, backend: Any) -> None:
    runner = ModelRunner(WorkerSettings(model=str(sd2.folder), attention=backend))
    job = a_job()
    sd2.check(job, finish(runner, *prepared(runner, job))[0])


def test_jobs_that_join_and_leave_the_batch_leave_no_trace(sd1: Model) -> None:
    """Random jobs join at random steps and leave when done: each picture is diffusers' own."""
    rng = random.Random(3)
    jobs = [
        a_job(
            prompt=rng.choice(["a small cat", "two dogs", LONG]),
            negative_prompt=rng.choice(["", "", "green"]),
            seed=number,
            steps=rng.choice([1, 2, 4, 7]),
            guidance_scale=rng.choice([0.0, 1.0, 4.0, 9.5]),
            scheduler=rng.choice(list(Scheduler)),
        )
        for number in range(14)
    ]
    waiting, in_flight, done = list(jobs), [], {}
    while waiting or in_flight:
        while waiting and rng.random() < 0.6:
            in_flight.append(sd1.runner.prepare(waiting.pop()))
        rng.shuffle(in_flight)
        if in_flight:
            assert sd1.runner.step(in_flight) == [None] * len(in_flight)
        finished = [state for state in in_flight if state.step == state.steps]
        for state, picture in zip(finished, sd1.runner.decode(finished), strict=True):
            done[state.job.seed] = picture
        in_flight = [state for state in in_flight if state.step < state.steps]
    for job in jobs:
        sd1.check(job, done[job.seed])


def test_guidance_in_an_interval_is_guidance_in_those_steps_alone(sd1: Model) -> None:
    """As diffusers' own call with a guidance that its step-end callback changes."""
    job = a_job(scheduler="euler", steps=5, guidance_start=0.2, guidance_stop=0.6)
    sd1.pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(sd1.own.config)
    unguided, guided = 1.0000001, 7.5

    def change(pipeline: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._guidance_scale = guided if 0.2 <= (step + 1) / 5 < 0.6 else unguided
        return {}

    expected = sd1.pipeline(
        job.prompt,
        width=64,
        height=64,
        num_inference_steps=5,
        guidance_scale=unguided,
        generator=torch.Generator("cpu").manual_seed(job.seed),
        callback_on_step_end=change,
    ).images[0]
    (state,) = prepared(sd1.runner, job)
    rows = []
    while state.step < state.steps:
        rows.append(state.rows)
        assert sd1.runner.step([state]) == [None]
    assert rows == [1, 2, 2, 1, 1]
    (picture,) = sd1.runner.decode([state])
    assert isinstance(picture, Picture)
    assert np.abs(picture.pixels.astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_exact_mode_gives_the_same_bits_alone_and_in_a_batch(sd1: Model) -> None:
    runner = ModelRunner(WorkerSettings(model=str(sd1.folder), exact=True))
    jobs = [
        a_job(seed=number, scheduler=name, guidance_scale=1.0 + 3 * (number % 2), steps=3 + number % 3)
        for number, name in enumerate(Scheduler)
    ]
    together = finish(runner, *prepared(runner, *jobs))
    for job, picture in zip(jobs, together, strict=True):
        (alone,) = finish(runner, *prepared(runner, job))
        assert isinstance(picture, Picture)
        assert isinstance(alone, Picture)
        assert np.array_equal(picture.pixels, alone.pixels)
        sd1.check(job, picture)


# --- what a job state says of itself ------------------------------------------------------------------------


def test_rows_lanes_and_steps(sd1: Model) -> None:
    guided, plain, pndm = prepared(
        sd1.runner, a_job(scheduler="ddim"), a_job(guidance_scale=1.0), a_job(scheduler="pndm")
    )
    assert (guided.rows, plain.rows) == (2, 1)
    assert guided.lane == plain.lane
    assert (guided.steps, pndm.steps) == (4, 5)
    assert guided.job.revision == sd1.runner.served.revision


def test_long_prompts_are_cut_with_a_warning(sd1: Model, sd2: Model) -> None:
    for tiny, limit in ((sd1, 77), (sd2, 16)):
        job = a_job(prompt=LONG, negative_prompt=LONG)
        (state,) = prepared(tiny.runner, job)
        positive, negative = state.warnings
        assert positive.startswith(f'The prompt was cut after {limit} tokens; left out: "')
        assert positive.endswith('words"')
        assert negative.startswith("The negative prompt was cut after")
        tiny.check(job, finish(tiny.runner, state)[0])


def test_a_prompt_that_just_fits_has_no_warning(sd2: Model) -> None:
    # A token a letter, and the two marks.
    assert sd2.runner.prepare(a_job(prompt="a" * 14)).warnings == ()
    assert "left out" in sd2.runner.prepare(a_job(prompt="a" * 15)).warnings[0]


def test_text_is_encoded_once(sd1: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    encode = UNetFamily.encode
    monkeypatch.setattr(
        UNetFamily,
        "encode",
        lambda self, *args, **more: calls.append(args[0]) or encode(self, *args, **more),
    )
    prompt = "encoded only once"
    for seed in range(3):
        sd1.runner.prepare(a_job(prompt=prompt, seed=seed))
    sd1.runner.prepare(a_job(prompt=prompt, negative_prompt="ignored", guidance_scale=1.0))
    sd1.runner.prepare(a_job(prompt=prompt, negative_prompt="ignored too", guidance_scale=1.0))
    assert calls == [prompt, prompt]


def test_prepare_from_another_thread_while_steps_run(sd1: Model) -> None:
    jobs = [a_job(prompt=f"thread {number}", seed=number, scheduler="euler_ancestral") for number in range(6)]
    made: list[JobState] = []

    def prepare() -> None:
        made.extend(sd1.runner.prepare(job) for job in jobs)

    thread = threading.Thread(target=prepare)
    (busy,) = prepared(sd1.runner, a_job(steps=20))
    thread.start()
    while busy.step < busy.steps:
        sd1.runner.step([busy])
    thread.join()
    for job, picture in zip(jobs, finish(sd1.runner, *made), strict=True):
        sd1.check(job, picture)


def test_defaults_and_choices(sd1: Model, sdxl: Model, lcm: Model) -> None:
    assert sd1.runner.served.defaults.model_dump() == {
        "width": 64,
        "height": 64,
        "steps": 30,
        "guidance_scale": 7.5,
    }
    assert lcm.runner.served.defaults.steps == 4
    assert lcm.runner.served.defaults.guidance_scale == 8.5
    choices = {choice.what: choice for choice in sdxl.runner.choices}
    assert set(choices) == {
        "device",
        "dtype",
        "model",
        "attention",
        "safety checker",
        "memory layout",
    }
    assert all(choice.choice and choice.reason for choice in choices.values())
    assert choices["attention"].choice == "sdpa"


def test_warm_up(sd1: Model, sdxl: Model, lcm: Model) -> None:
    for tiny in (sd1, sdxl, lcm):
        choices = {choice.what: choice for choice in tiny.runner.warm_up()}
        assert choices["max rows"].choice == str(tiny.runner.max_rows)
        assert choices["compile"].choice == "no"
        lane = (4, 8, 8)
        assert 0 < tiny.runner.step_s(lane, 1) < tiny.runner.step_s(lane, 64) < 100
        assert tiny.runner.max_rows >= 2
        assert "1: " in choices["max rows"].reason
        # Its share of full batches. A guided job has two rows, unless guidance is embedded.
        rows, steps = (1 if tiny is lcm else 2), tiny.runner.served.defaults.steps
        full_s = tiny.runner.step_s(lane, tiny.runner.max_rows)
        assert tiny.runner.job_s == pytest.approx(steps * rows * full_s / tiny.runner.max_rows)


def test_a_cap_that_is_asked_for_is_not_measured(tmp_path: Path) -> None:
    model = str(tiny_models.tiny_sd1(tmp_path / "asked"))
    runner = ModelRunner(WorkerSettings(model=model, max_batch=3))
    assert [choice.choice for choice in runner.warm_up()] == ["no", "3"]
    assert runner.cap((4, 8, 8)) == runner.cap((4, 64, 64)) == 3


def test_larger_pictures_share_a_step_with_fewer(sd1: Model) -> None:
    lane, large = (4, 8, 8), (4, 16, 16)
    assert sd1.runner.cap(lane) == sd1.runner.max_rows
    assert sd1.runner.cap(large) == max(1, sd1.runner.max_rows // 4)


def test_warm_up_refuses_a_model_that_gives_nan(tmp_path: Path) -> None:
    tiny = Model(tiny_models.tiny_sd1(tmp_path / "nan"))
    with torch.no_grad():
        tiny.loaded.pipeline.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(SettingsError, match=r"failed to render at start.*no longer finite"):
        tiny.runner.warm_up()


def test_warm_up_names_a_device_that_fails(sd1: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU with a hardware fault, or one that this torch has no kernels for."""

    def fail(self: object, states: object) -> None:
        raise DeviceError("The device failed to denoise: CUDA error: no kernel image is available")

    monkeypatch.setattr(ModelRunner, "step", fail)
    with pytest.raises(SettingsError, match=r"^The device cpu .* one small picture .* nvidia-smi"):
        sd1.runner.warm_up()


# --- a job fails alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"scheduler": "lcm", "steps": 51},
            'steps is 51, the limit of scheduler "lcm" with this model is 50',
        ),
        ({"scheduler": "lcm", "steps": 150}, "the limit"),
    ],
)
def test_steps_that_a_scheduler_refuses(sd1: Model, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidJobError, match=message):
        sd1.runner.prepare(a_job(**fields))


def test_runge_kutta_needs_four_steps(sdxl: Model) -> None:
    with pytest.raises(InvalidJobError, match="use 4 or more"):
        sdxl.runner.prepare(a_job(scheduler="pndm", steps=3))


def test_a_latent_consistency_model_takes_its_own_scheduler_alone(lcm: Model) -> None:
    lcm.runner.prepare(a_job(scheduler="lcm"))
    with pytest.raises(InvalidJobError, match="latent consistency model"):
        lcm.runner.prepare(a_job(scheduler="euler"))


def test_sizes_that_the_vae_does_not_divide(sd1: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd1.loaded.pipeline, "vae_scale_factor", 16)
    with pytest.raises(InvalidJobError, match="72 x 64, but this model's sizes are multiples of 16"):
        sd1.runner.prepare(a_job(width=72, height=64))


def test_a_nan_in_one_job_is_its_own_alone(sd1: Model) -> None:
    jobs = [a_job(seed=1), a_job(seed=2)]
    healthy, sick = prepared(sd1.runner, *jobs)
    sd1.runner.step([healthy, sick])
    sick._state = sick._state * float("nan")
    fine, failure = sd1.runner.step([healthy, sick])
    assert fine is None
    assert isinstance(failure, NotFiniteError)
    assert (healthy.step, sick.step) == (2, 1)
    sd1.check(jobs[0], finish(sd1.runner, healthy)[0])


def test_a_scheduler_that_fails_is_its_own_jobs_alone(sd1: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    # With this model's config DDIM clips, so that its own object takes the step.
    jobs = [a_job(seed=1), a_job(seed=2, scheduler="ddim")]
    healthy, sick = prepared(sd1.runner, *jobs)

    def fail(*args: object, **more: object) -> None:
        raise IndexError("index 5 is out of bounds")

    with monkeypatch.context() as patch:
        patch.setattr(diffusers.DDIMScheduler, "step", fail)
        fine, failure = sd1.runner.step([healthy, sick])
    assert fine is None
    assert isinstance(failure, RenderError)
    assert "ddim" in str(failure)
    assert (healthy.step, sick.step) == (1, 0)
    # It is as it was: the step can be taken after all.
    for job, picture in zip(jobs, finish(sd1.runner, healthy, sick), strict=True):
        sd1.check(job, picture)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("bad kernel")])
def test_a_forward_that_fails_at_any_step_changes_nothing(
    sd1: Model, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (Scheduler.EULER_ANCESTRAL, Scheduler.LCM, Scheduler.UNIPC, Scheduler.PNDM, Scheduler.DPMPP_2M)
    jobs = [a_job(seed=number, scheduler=name) for number, name in enumerate(names)]
    in_flight = prepared(sd1.runner, *jobs)
    expected = OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else RenderError

    def fail(*args: object, **more: object) -> None:
        raise error

    while running := [state for state in in_flight if state.step < state.steps]:
        with monkeypatch.context() as patch:
            patch.setattr(sd1.loaded.pipeline.unet, "forward", fail)
            with pytest.raises(expected, match=r"Out of memory while|failed to denoise"):
                sd1.runner.step(running)
        # With half the rows it goes on.
        middle = len(running) // 2
        assert sd1.runner.step(running[:middle]) == [None] * middle if middle else True
        assert sd1.runner.step(running[middle:]) == [None] * (len(running) - middle)
    for job, picture in zip(jobs, sd1.runner.decode(in_flight), strict=True):
        sd1.check(job, picture)


def test_a_device_that_fails_is_nobodys_job(sd1: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    in_flight = prepared(sd1.runner, a_job(seed=1))

    def fail(*args: object, **more: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(sd1.loaded.pipeline.unet, "forward", fail)
    with pytest.raises(DeviceError, match="illegal memory access"):
        sd1.runner.step(in_flight)


def test_a_failed_forward_lets_go_of_its_tensors(sd1: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine tries fewer rows while it still holds the error: the memory must be free by then."""
    held: list[weakref.ref[torch.Tensor]] = []

    def fail(*args: object, **more: object) -> None:
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError(f"no room beside {len(activations)} values")

    monkeypatch.setattr(sd1.loaded.pipeline.unet, "forward", fail)
    try:
        sd1.runner.step(prepared(sd1.runner, a_job()))
    except OutOfMemoryError:
        gc.collect()
        assert held[0]() is None
    else:
        pytest.fail("no error")


def test_out_of_memory_on_a_cpu_is_known_by_its_text(sd1: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **more: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 TB")

    monkeypatch.setattr(sd1.loaded.pipeline.unet, "forward", fail)
    with pytest.raises(OutOfMemoryError):
        sd1.runner.step(prepared(sd1.runner, a_job()))


# --- decoding -----------------------------------------------------------------------------------------------


def test_decoding_together_and_over_lanes(sd1: Model) -> None:
    jobs = [a_job(seed=number, width=64 + 8 * (number % 2)) for number in range(5)]
    pictures = []
    in_flight = prepared(sd1.runner, *jobs)
    for lane in {state.lane for state in in_flight}:
        finish(sd1.runner, *(state for state in in_flight if state.lane == lane))
    pictures = list(sd1.runner.decode(in_flight))
    for job, picture in zip(jobs, pictures, strict=True):
        sd1.check(job, picture)


def test_what_does_not_fit_in_one_decoding_is_decoded_in_smaller_ones_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model of its own: it remembers.
    tiny = Model(tiny_models.tiny_sd1(tmp_path / "little_memory"))
    jobs = [a_job(seed=number) for number in range(5)]
    in_flight = prepared(tiny.runner, *jobs)
    finish(tiny.runner, *in_flight)
    decode = tiny.loaded.pipeline.vae.decode
    tried: list[int] = []

    def small(latents: torch.Tensor, **more: Any) -> Any:
        tried.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("too many")
        return decode(latents, **more)

    monkeypatch.setattr(tiny.loaded.pipeline.vae, "decode", small)
    for expected in ([5, 2, 2, 1], [2, 2, 1]):
        tried.clear()
        pictures = list(tiny.runner.decode(in_flight))
        assert tried == expected
    for job, picture in zip(jobs, pictures, strict=True):
        tiny.check(job, picture)


def test_decoding_fails_for_one_job_alone(sd1: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [a_job(seed=number) for number in range(3)]
    in_flight = prepared(sd1.runner, *jobs)
    finish(sd1.runner, *in_flight)
    in_flight[1]._state = in_flight[1]._state * float("nan")
    pictures = list(sd1.runner.decode(in_flight))
    assert isinstance(pictures[1], NotFiniteError)
    sd1.check(jobs[0], pictures[0])
    sd1.check(jobs[2], pictures[2])

    def fail(*args: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sd1.loaded.pipeline.vae, "decode", fail)
    monkeypatch.setattr(tiles, "decode", fail)
    (too_large,) = sd1.runner.decode(in_flight[:1])
    assert isinstance(too_large, JobTooLargeError)
    assert "64 x 64" in str(too_large)


# --- the safety checker -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("finds", "nsfw"), [("all", True), ("nothing", False)])
def test_the_safety_checker_has_its_say(tmp_path: Path, finds: str, nsfw: bool) -> None:
    tiny = Model(tiny_models.tiny_sd1(tmp_path / "checked", safety_checker=finds))
    jobs = [a_job(seed=1), a_job(seed=2)]
    for job, picture in zip(jobs, finish(tiny.runner, *prepared(tiny.runner, *jobs)), strict=True):
        assert isinstance(picture, Picture)
        assert picture.nsfw is nsfw
        assert np.abs(picture.pixels.astype(int) - tiny.expected(job).astype(int)).max() <= 1
        assert bool(picture.pixels.any()) is not nsfw


def test_the_safety_checker_switched_off(tmp_path: Path) -> None:
    folder = tiny_models.tiny_sd1(tmp_path / "checked", safety_checker="all")
    on = ModelRunner(WorkerSettings(model=str(folder)))
    off = ModelRunner(WorkerSettings(model=str(folder), safety_checker=False))
    (picture,) = finish(off, *prepared(off, a_job()))
    assert isinstance(picture, Picture)
    assert picture.nsfw is None
    assert picture.pixels.any()
    # Other pictures, so another revision.
    assert on.served.revision != off.served.revision
    assert {choice.what: choice.choice for choice in off.choices}["safety checker"] == "off"


def test_a_model_without_a_safety_checker_has_no_verdict(sd1: Model) -> None:
    (picture,) = finish(sd1.runner, *prepared(sd1.runner, a_job()))
    assert isinstance(picture, Picture)
    assert picture.nsfw is None
