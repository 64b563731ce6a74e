"""Jobs with a second pass: what they may say, what follows from it, and hires fix in infotexts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.errors import InvalidJobError
from worker.contract.infotext import read, read_fields, write
from worker.contract.job import Job
from worker.contract.message import route_of
from worker.contract.metadata.hires import scale_to, steps_of
from worker.contract.second_pass import MAX_UPSCALE_STEPS, SecondPass, upscaled
from worker.contract.served_model import Defaults, ServedModel

IMAGE = f"sha256:{'ab' * 32}:640x480"
SERVED = ServedModel(
    name="a/model",
    revision="r" * 40,
    defaults=Defaults(width=1024, height=768, steps=10, guidance_scale=7.5),
)
SIZE = {"width": 512, "height": 768, "steps": 20}


def parsed(**fields: Any) -> Job:
    return Job.parse({"prompt": "a small cat", "seed": 1, **fields})


def test_a_second_pass_has_a_size_and_steps_of_its_own() -> None:
    job = parsed(upscale=1.6, upscale_steps=30, upscale_strength=0.35, **SIZE)
    assert job.second_pass == SecondPass(816, 1224, 30, 0.35)
    assert job.second_pass.steps_run == 10
    assert (job.picture_size, job.all_steps) == ((816, 1224), 30)
    assert parsed(upscale=2).resolved(SERVED).second_pass == SecondPass(2048, 1536, 10, 0.5)
    assert parsed(upscale=1.5, image=IMAGE).picture_size == (960, 720)


def test_a_job_without_one_is_as_it_was() -> None:
    job = parsed(upscale=1, upscale_strength=0.5, upscaler="latent", **SIZE)
    assert job.id == parsed(**SIZE).id
    assert (job.version, job.second_pass, job.picture_size, job.all_steps) == (1, None, (512, 768), 20)
    assert parsed(upscale=2).version == 4
    assert not {"upscale", "upscaler", "upscale_strength"} & job.model_dump().keys()


@given(st.integers(8, 256), st.integers(8, 256))
def test_a_size_that_is_asked_for_by_a_share_is_reached(side: int, target: int) -> None:
    assert upscaled(8 * side, 8 * target / (8 * side)) == 8 * target


def test_what_a_tenant_is_charged_has_both_passes() -> None:
    job = parsed(upscale=2, tenant="acme", **SIZE)
    assert route_of(job).cost == 512 * 768 * 20 + 1024 * 1536 * 10


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"upscale": 0.5}, "upscale is 0.5: it must be 1 to 4."),
        ({"upscale": 4.1}, "upscale is 4.1: it must be 1 to 4."),
        (
            {"upscale": 3, "width": 1024, "height": 512},
            "upscale is 3, which makes 3072x1536 px of 1024x512, the limit is 2,048 a side: use at most 2,",
        ),
        (
            {"upscale": 2, "width": 2048},
            "upscale is 2, which makes 4096 px of 2048, the limit is 2,048 a side: leave it out, or",
        ),
        ({"upscale": 2, "image": IMAGE, "mask": "alpha"}, "upscale is 2, and is not for a job with a mask"),
        (
            {"upscale_steps": 5},
            "upscale_steps is 5, and is for a second pass: give upscale, or leave it out.",
        ),
        # A prompt that is wrong by itself has its own error alone.
        (
            {"upscale": 2, "steps": 20, "prompt": "", "prompt_syntax": "a1111"},
            "prompt is empty: say what to draw.",
        ),
        # Whether or not the steps are known.
        ({"upscale": 2, "upscale_strength": 0}, "upscale_strength is 0: it must be above 0 and up to 1."),
        ({"upscale_strength": 0.7}, "upscale_strength is 0.7, and is for a second pass: give upscale"),
        ({"upscaler": "lanczos"}, "upscaler is 'lanczos', and is for a second pass: give upscale"),
        ({"upscale": 2, "upscaler": "esrgan"}, "upscaler is 'esrgan': use one of latent, lanczos."),
        ({"upscale": 2, "steps": 1}, "upscale_strength is 0.5, which leaves none of 1 steps: use at least 1"),
        ({"upscale": 2, "upscale_steps": 751}, "upscale_steps is 751: it must be 1 to 750."),
        (
            {"upscale": 2, "upscale_steps": 400},
            "upscale_strength is 0.5, which runs 200 of 400 steps, the limit is 150: use less.",
        ),
        (
            {"upscale": 2, "schedule": "align_your_steps", "scheduler": "euler", "upscale_steps": 20},
            'upscale_steps is 20, but schedule "align_your_steps" has 10: leave it out.',
        ),
    ],
)
def test_what_would_have_no_effect_or_no_size_is_refused(fields: Any, sentence: str) -> None:
    with pytest.raises(InvalidJobError) as caught:
        parsed(**fields)
    assert str(caught.value).startswith(sentence)


def test_the_remedy_of_a_picture_that_is_too_large_is_enough() -> None:
    for size, upscale in (({"width": 1024, "height": 512}, 3), ({"width": 2048}, 2), ({"width": 1504}, 1.5)):
        with pytest.raises(InvalidJobError, match=r"a side: .* a width and height of at most") as caught:
            parsed(**size, upscale=upscale)
        side = int(str(caught.value).rpartition(" ")[2].rstrip(".").replace(",", ""))
        assert parsed(width=side, height=side, upscale=upscale).upscale == upscale


def test_what_only_the_models_own_size_and_steps_refuse_is_refused_then() -> None:
    for fields, sentence in (
        ({"upscale": 3}, "upscale is 3, which makes 3072x2304 px of 1024x768"),
        ({"upscale": 1.5, "upscale_strength": 0.09}, "upscale_strength is 0.09, which leaves none of 10"),
    ):
        with pytest.raises(InvalidJobError, match=sentence):
            parsed(**fields).resolved(SERVED)


def test_texts_by_step_go_on_in_a_second_pass() -> None:
    """As in version 1.10 (modules/prompt_parser.py): `hires_steps` with `use_old_scheduling` off."""
    from worker.contract.a1111_syntax import schedule

    assert schedule("[a:b:0.5]", 10, 20) == [(10, "b")]
    assert schedule("[a:b:1.5]", 10, 20) == [(5, "a"), (10, "b")]
    assert schedule("[a:b:25]", 10, 20) == [(5, "a"), (10, "b")]
    assert schedule("[a:b:25]", 20) == [(20, "a")]


# --- hires fix ----------------------------------------------------------------------------------------------


@given(st.integers(1, 150), st.floats(0.2, 1))
def test_as_many_steps_are_run_as_hires_fix_has(run: int, strength: float) -> None:
    steps = steps_of(run, strength)
    assert int(steps * strength) == run
    assert int((steps - 1) * strength) < run
    assert steps <= MAX_UPSCALE_STEPS


def test_a_size_is_reached_by_scale_or_would_be_cropped() -> None:
    assert scale_to((512, 768), 1024, 0) == scale_to((512, 768), 0, 1536) == 2.0
    assert scale_to((512, 768), 1024, 1536) == 2.0
    assert scale_to((512, 768), 1024, 1024) is scale_to((512, 768), 1536, 1536) is None


HIRES = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x768, Denoising strength: 0.7"


@pytest.mark.parametrize(
    ("more", "second"),
    [
        ("Hires upscale: 2, Hires upscaler: Latent", (1024, 1536, 29, 0.7)),
        ("Hires upscale: 1.5, Hires steps: 10, Hires upscaler: Lanczos", (768, 1152, 15, 0.7)),
        ("Hires resize: 1024x1536, Hires upscaler: Latent", (1024, 1536, 29, 0.7)),
    ],
)
def test_hires_fix_is_read_from_an_infotext(more: str, second: tuple[int, int, int, float]) -> None:
    found = read_fields(f"a cat\n{HIRES}, {more}")
    assert not found.left_out
    assert Job.parse(found.fields).second_pass == second


@pytest.mark.parametrize(
    "more",
    [
        "Hires upscale: 2, Hires upscaler: R-ESRGAN 4x+",
        "Hires upscale: 2, Hires upscaler: Latent (bicubic)",
        "Hires upscale: 3, Hires upscaler: Latent",
        "Hires resize: 1024x1024, Hires upscaler: Latent",
        "Hires upscale: 2, Hires steps: many, Hires upscaler: Latent",
    ],
)
def test_hires_fix_that_no_job_can_have_is_named(more: str) -> None:
    found = read_fields(f"a cat\n{HIRES}, {more}")
    assert more.split(", ")[0] in found.left_out
    assert Job.parse(found.fields).second_pass is None


def test_a_second_pass_is_written_as_hires_fix_too() -> None:
    job = parsed(upscale=1.5, upscale_steps=23, upscale_strength=0.7, **SIZE).resolved(SERVED)
    text = write(job)
    assert "Hires upscale: 1.5, " in text
    assert "Denoising strength: 0.7, Hires steps: 16, Hires upscaler: Latent" in text
    assert read(text) == job
    # As others read it, the steps that are run are as many.
    theirs = Job.parse(read_fields(text.replace("Version: smallcat", "Version: v1.10.1")).fields)
    assert theirs.second_pass == SecondPass(768, 1152, 23, 0.7)
