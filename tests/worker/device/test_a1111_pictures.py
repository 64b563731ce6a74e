"""Pictures in AUTOMATIC1111's syntax are diffusers' own with the oracle's embeddings, also in batches."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests import a1111_oracle, tiny_models
from tests.worker.device.beside_diffusers import assert_drawn
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.job_state import JobState
from worker.device.model_runner import ModelRunner
from worker.device.schedulers.samplers import CLASSES
from worker.engine.runner import Picture

LONG = "a small cat, that sits on a long wall, and looks at a list of words, "
#: (prompt, negative prompt): of 1 to 5 windows, of which a letter takes a token.
TEXTS = (
    ("a small cat", ""),
    ("a (small:1.4) [cat], ((red))", "(fog:0.5), dogs"),
    (LONG * 2, ""),
    (LONG * 3 + "(by night:1.3)", LONG),
    ("a cat BREAK on a (roof:1.2)", "fog BREAK dogs"),
    ("a [cat:(dog:1.2):0.5], red", "[fog::2]"),
    ("a [cat|dog|" + LONG * 2 + "]", "[fog|]"),
    ("a cat AND a (red:1.3) dog :0.6 AND fog :-0.4", ""),
    ("[cat:dog:2] AND " + LONG * 2, LONG * 2),
    ("a cat :1.5", "fog"),
    (LONG * 4, LONG * 2),
)


def with_means(folder: Path) -> Path:
    """The model with biases in its text encoders' norms: without, the mean that emphasis restores is zero."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        for name in ("text_encoder", "text_encoder_2"):
            for parameter, values in getattr(pipeline, name, torch.nn.Module()).named_parameters():
                if re.search(r"norm\w*\.bias$", parameter):
                    torch.nn.init.normal_(values, mean=0.3)
    pipeline.save_pretrained(folder)
    return folder


class Model:
    """A tiny model behind a runner, and diffusers' own pipeline of the same files beside it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.runner = ModelRunner(WorkerSettings(model=str(folder), **settings))
        self.pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.own, self.forward = self.pipeline.scheduler, self.pipeline.unet.forward
        self.is_xl = isinstance(self.pipeline, diffusers.StableDiffusionXLPipeline)
        self.encoders = [
            a1111_oracle.Encoder(self.pipeline.tokenizer, self.pipeline.text_encoder, self.is_xl)
        ]
        if self.is_xl:
            second = a1111_oracle.Encoder(self.pipeline.tokenizer_2, self.pipeline.text_encoder_2, True)
            self.encoders.append(second)

    def rows(self, job: Job, steps: int, step: int) -> tuple[list[Any], list[float]]:
        """(hidden, pooled) of the negative prompt and of each prompt at a step, and the prompts' weights."""
        parts, weights = [], []
        for part in re.split(r"\bAND\b", job.prompt):
            text, weight = re.fullmatch(r"((?:.|\n)*?)(?:\s*:\s*([-+]?\d*\.?\d+))?\s*", part).groups()  # type: ignore[union-attr]
            parts.append(self.at(text, steps, step))
            weights.append(float(weight or 1))
        longest = max(hidden.shape[1] for hidden, _ in parts)
        for number, (hidden, pooled) in enumerate(parts):
            last = hidden[:, -1:].expand(-1, longest - hidden.shape[1], -1)
            parts[number] = torch.cat([hidden, last], dim=1), pooled
        without, pooled = self.at(job.negative_prompt, steps, step)
        if self.is_xl and not job.negative_prompt:
            without, pooled = torch.zeros_like(without), torch.zeros_like(pooled)
        return [(without, pooled), *parts], weights

    def at(self, text: str, steps: int, step: int) -> tuple[torch.Tensor, Any]:
        schedule = a1111_oracle.schedule(text, steps)
        place = next(number for number, (end, _) in enumerate(schedule) if step <= end)
        hidden, pooled = a1111_oracle.encoded(self.encoders, [each for _, each in schedule])
        return hidden[[place]], pooled if pooled is None else pooled[[place]]

    def expected(self, job: Job) -> NDArray[np.uint8]:
        """The pixels of diffusers' own call, whose UNet's two rows are made of the job's rows."""
        job = job.resolved(self.runner.served)
        kind, options = CLASSES.get(job.scheduler, (type(self.own).__name__, {}))
        self.pipeline.scheduler = getattr(diffusers, kind).from_config(self.own.config, **options)
        self.pipeline.scheduler.set_timesteps(job.steps)
        for encoder in self.encoders:
            encoder.clip_skip = job.clip_skip
        steps, step = len(self.pipeline.scheduler.timesteps), 0

        def forward(sample: Any, time: Any, encoder_hidden_states: Any, **more: Any) -> Any:
            nonlocal step
            rows, weights = self.rows(job, steps, step)
            step += 1
            outputs = []
            for hidden, pooled in rows if len(sample) == 2 else rows[1:]:
                if self.is_xl:
                    ids = more["added_cond_kwargs"]["time_ids"][:1]
                    more = {**more, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
                outputs.append(self.forward(sample[:1], time, encoder_hidden_states=hidden, **more)[0])
            first, prompts = outputs[0], outputs[len(sample) - 1 :]
            composed = first + sum(
                weight * (each - first) for each, weight in zip(prompts, weights, strict=True)
            )
            return (torch.cat([first, composed]) if len(sample) == 2 else composed,)

        self.pipeline.unet.forward = forward
        try:
            image = self.pipeline(
                "",
                width=64,
                height=64,
                num_inference_steps=job.steps,
                guidance_scale=job.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(job.seed),
            ).images[0]
        finally:
            self.pipeline.unet.forward = self.forward
        return np.asarray(image)

    def check(self, job: Job, picture: object) -> None:
        """`picture` is what diffusers gives, within 1 of 255, and is not blank."""
        assert_drawn(picture, self.expected(job), job)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(with_means(tiny_models.tiny_sd1(tmp_path_factory.mktemp("models") / "sd1")))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(with_means(tiny_models.tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl")))


def jobs_of(*texts: tuple[str, str], guidance: float = 6.0) -> list[Job]:
    schedulers = ("euler", "ddim", "dpmpp_2m", "euler_ancestral", "default")
    return [
        Job(
            prompt=prompt,
            negative_prompt=negative,
            prompt_syntax="a1111",
            seed=number,
            scheduler=schedulers[number % 5],
            steps=3 + number % 3,
            guidance_scale=guidance,
        )
        for number, (prompt, negative) in enumerate(texts)
    ]


def together(runner: ModelRunner, jobs: list[Job]) -> dict[int, object]:
    """The pictures by seed of jobs that join at random steps."""
    rng, waiting, in_flight = random.Random(1), list(jobs), []
    done: dict[int, object] = {}
    while waiting or in_flight:
        while waiting and rng.random() < 0.7:
            in_flight.append(runner.prepare(waiting.pop()))
        rng.shuffle(in_flight)
        if in_flight:
            assert runner.step(in_flight) == [None] * len(in_flight)
        finished = [state for state in in_flight if state.step == state.steps]
        for state, picture in zip(finished, runner.decode(finished), strict=True):
            done[state.job.seed] = picture
        in_flight = [state for state in in_flight if state.step < state.steps]
    return done


def alone(runner: ModelRunner, job: Job) -> object:
    state = runner.prepare(job)
    while state.step < state.steps:
        assert runner.step([state]) == [None]
    return next(runner.decode([state]))


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_pictures_alone_are_diffusers_own(model: str, request: pytest.FixtureRequest) -> None:
    tiny: Model = request.getfixturevalue(model)
    for job in jobs_of(*TEXTS):
        tiny.check(job, alone(tiny.runner, job))


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_pictures_in_mixed_batches_are_diffusers_own(model: str, request: pytest.FixtureRequest) -> None:
    """With plain jobs, with and without guidance, of all lengths: those too whose lengths do not divide."""
    tiny: Model = request.getfixturevalue(model)
    jobs = [
        *jobs_of(*TEXTS),
        *[job.model_copy(update={"seed": 100 + job.seed, "guidance_scale": 1.0}) for job in jobs_of(*TEXTS)],
    ]
    plain = [
        Job(prompt="a cat", seed=200 + number, steps=4, guidance_scale=scale)
        for number, scale in enumerate((5.0, 1.0))
    ]
    done = together(tiny.runner, [*jobs, *plain])
    for job in jobs:
        tiny.check(job, done[job.seed])
    for job in plain:
        # A short prompt without weights is the same in both syntaxes.
        tiny.check(job.model_copy(update={"prompt_syntax": "a1111"}), done[job.seed])


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_jobs_that_skip_layers_are_the_web_uis_beside_others(
    model: str, request: pytest.FixtureRequest
) -> None:
    """Of both prompts in SD 1.x. In SDXL it skips none, which a warning says."""
    tiny: Model = request.getfixturevalue(model)
    jobs = [
        job.model_copy(update={"clip_skip": 1 + number % 2})
        for number, job in enumerate(jobs_of(*TEXTS[1:4], ("a cat", ""), ("a cat", "")))
    ]
    done = together(tiny.runner, jobs)
    for job in jobs:
        tiny.check(job, done[job.seed])
        warnings = tiny.runner.prepare(job).warnings
        assert any("clip_skip 2 has no effect" in each for each in warnings) == (
            model == "sdxl" and job.clip_skip == 2
        )


def test_exact_mode_gives_the_same_bits_whatever_the_length_of_the_others(sd1: Model) -> None:
    runner = ModelRunner(WorkerSettings(model=str(sd1.folder), exact=True))
    jobs = jobs_of(*TEXTS)
    done = together(runner, jobs)
    for job in jobs:
        picture, single = done[job.seed], alone(runner, job)
        assert isinstance(picture, Picture)
        assert isinstance(single, Picture)
        assert np.array_equal(picture.pixels, single.pixels)


def test_rows_are_the_prompts_and_the_negative_one_while_there_is_guidance(sd1: Model) -> None:
    fields: dict[str, Any] = {"prompt": "a AND b AND c", "prompt_syntax": "a1111", "seed": 1, "steps": 4}
    state: JobState = sd1.runner.prepare(
        Job(**fields, guidance_scale=5.0, guidance_stop=0.5, scheduler="euler")
    )
    rows = []
    while state.step < state.steps:
        rows.append(state.rows)
        assert sd1.runner.step([state]) == [None]
    assert rows == [4, 4, 3, 3]


def test_the_picture_is_that_of_a_call_with_these_embeddings_and_nothing_else(sd1: Model) -> None:
    """Without a UNet of the test's making, where both texts have one length."""
    [job] = jobs_of((f"{LONG}(cat:1.4), ", f"{LONG}[dog]"))
    hidden = [a1111_oracle.encoded(sd1.encoders, [text])[0] for text in (job.prompt, job.negative_prompt)]
    sd1.pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(sd1.own.config)
    image = sd1.pipeline(
        prompt_embeds=hidden[0],
        negative_prompt_embeds=hidden[1],
        width=64,
        height=64,
        num_inference_steps=job.steps,
        guidance_scale=job.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(job.seed),
    ).images[0]
    picture = alone(sd1.runner, job)
    assert isinstance(picture, Picture)
    assert np.abs(picture.pixels.astype(int) - np.asarray(image).astype(int)).max() <= 1
