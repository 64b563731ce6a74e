"""Jobs that begin with a picture: what they may say, what follows from the picture, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.errors import InvalidJobError
from worker.contract.input_parameters import size_for
from worker.contract.input_reference import InputReference, jobs_of
from worker.contract.job import Job
from worker.contract.job_parameters import MAX_STEPS
from worker.contract.served_model import Defaults, ServedModel

FILE, PARENT = "sha256:" + "ab" * 32, "job:" + "cd" * 16
IMAGE = f"{FILE}:640x480"
SERVED = ServedModel(
    name="a/model",
    revision="r" * 40,
    defaults=Defaults(width=512, height=512, steps=10, guidance_scale=7.5),
)


def parsed(**fields: Any) -> Job:
    return Job.parse({"prompt": "a small cat", "seed": 1, **fields})


def refusal(**fields: Any) -> str:
    with pytest.raises(InvalidJobError) as caught:
        parsed(**fields)
    return str(caught.value)


@given(st.sampled_from(["sha256", "job"]), st.integers(1, 8_000), st.integers(1, 8_000), st.data())
def test_a_reference_is_the_same_after_its_way_through_text(
    kind: Any, width: int, height: int, data: st.DataObject
) -> None:
    digits = 64 if kind == "sha256" else 32
    name = data.draw(st.text("0123456789abcdef", min_size=digits, max_size=digits))
    reference = InputReference(kind, name, width, height)
    assert InputReference.parse(reference.encode()) == reference


@pytest.mark.parametrize(
    "text",
    [
        *("shoe.png", "s3://b/k", FILE, f"{FILE}:0x5", f"{FILE}:5", f"{FILE.upper()}:5x5", f"{PARENT}00:5x5"),
        *(f"{IMAGE}\n", "alpha", "data:image/png;base64,AAAA", f"sha256:{'ab' * 16}:5x5"),
    ],
)
def test_what_is_no_reference_is_refused_with_what_makes_one(text: str) -> None:
    assert "is no reference such as sha256:" in refusal(image=text)


@pytest.mark.parametrize("size", ["8001x8000", "32769x1", "99999x99999"])
def test_a_picture_of_too_many_pixels_is_refused_with_the_limits(size: str) -> None:
    said = refusal(image=f"{FILE}:{size}", width=512, height=512)
    assert f"image is {size}, the limits are 64 megapixels and 32,768 a side" in said


@pytest.mark.parametrize(
    ("size", "own"),
    [
        ("640x480", (640, 480)),
        ("1000x667", (1000, 664)),  # down to multiples of 8, as diffusers' VaeImageProcessor (0.42)
        ("4000x3000", (2048, 1536)),
        ("32x48", (64, 96)),
        ("2048x64", (2048, 64)),
    ],
)
def test_a_job_has_its_pictures_own_size_within_a_jobs_limits(size: str, own: tuple[int, int]) -> None:
    job = parsed(image=f"{FILE}:{size}")
    assert (job.width, job.height) == own
    assert job.resolved(SERVED).width == own[0]
    # It is the size that counts, not how it came to be.
    assert job.id == parsed(image=f"{FILE}:{size}", width=own[0], height=own[1]).id


def test_with_one_side_given_the_other_keeps_the_proportions() -> None:
    assert parsed(image=IMAGE, width=512).height == 384
    assert parsed(image=IMAGE, height=960).width == 1280
    assert (parsed(image=IMAGE, width=512, height=512).height) == 512


@given(st.integers(1, 32_768), st.integers(1, 32_768))
def test_every_size_that_follows_is_a_jobs_size_of_nearly_the_same_proportions(w: int, h: int) -> None:
    if (size := size_for((w, h))) is not None:
        assert all(64 <= side <= 2_048 and side % 8 == 0 for side in size)
        assert abs(size[0] / size[1] / (w / h) - 1) < 8 / min(size) + 0.01
    else:
        assert max(w, h) / min(w, h) >= 2_048 / 72


def test_proportions_that_no_job_has_need_a_size() -> None:
    assert refusal(image=f"{FILE}:10000x20") == (
        "image is 10000x20, and no size of 64 to 2,048 px has these proportions: give width and height."
    )
    assert parsed(image=f"{FILE}:10000x20", width=1024, height=64).image


def test_image_and_mask_may_be_pictures_of_jobs_which_the_id_has() -> None:
    job = parsed(image=f"{PARENT}:640x480", mask=f"{PARENT}:640x480")
    assert job.id != parsed(image=IMAGE, mask=f"{PARENT}:640x480").id
    assert job.id != parsed(image=f"{PARENT}:640x480").id
    assert jobs_of(job.image, job.mask) == (PARENT.removeprefix("job:"),)
    assert jobs_of(IMAGE, "alpha", "", None) == ()


def test_a_part_of_a_picture_has_the_size_of_the_model_where_none_is_given() -> None:
    """Its proportions are those of the mask, and its pixels too few for those of the picture."""
    for size in ("4000x3000", "10000x20"):
        job = parsed(image=f"{FILE}:{size}", mask="alpha", padding=0)
        assert (job.width, job.height) == (None, None)
        assert (job.resolved(SERVED).width, job.resolved(SERVED).height) == (512, 512)
    assert parsed(image=IMAGE, mask="alpha", padding=0, width=256).height is None


def test_the_picture_of_a_part_is_as_large_as_the_image() -> None:
    assert parsed(image=IMAGE, mask="alpha", padding=0, width=64, height=64).picture_size == (640, 480)
    assert parsed(image=IMAGE, mask="alpha").picture_size == (640, 480)
    assert parsed(image=IMAGE, width=512).picture_size == (512, 384)
    assert parsed(width=512, height=64).picture_size == (512, 64)
    assert parsed().picture_size == (None, None)


def test_strength_is_diffusers_own_where_it_is_not_given() -> None:
    """StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline, diffusers 0.42."""
    assert parsed(image=IMAGE).strength == 0.8
    assert parsed(image=IMAGE, mask="alpha").strength == 1.0
    assert parsed(image=IMAGE).id == parsed(image=IMAGE, strength=0.8).id
    assert parsed().strength is None


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"strength": 0.5}, "strength is 0.5, and there is no image to begin with: give one, or leave"),
        ({"image": IMAGE, "strength": 0.0}, "strength is 0.0: it must be above 0 and up to 1."),
        ({"image": IMAGE, "strength": 0.04, "steps": 20}, "strength is 0.04, which leaves none of 20 steps"),
        ({"image": IMAGE, "strength": 1.5}, "strength is 1.5: it must be above 0 and up to 1."),
        ({"mask": "alpha"}, "mask is for an image: give one, or leave the mask out."),
        ({"image": IMAGE, "mask": f"{FILE}:480x640"}, "mask is 480x640 and the image 640x480: give a mask"),
        ({"image": IMAGE, "mask": f"{PARENT}:480x640"}, "mask is 480x640 and the image 640x480: give a mask"),
        ({"image": f"{PARENT}:64x64", "mask": "alpha"}, "mask is alpha, and pictures of jobs have no alpha"),
        ({"image": IMAGE, "mask_blur": 8}, "mask_blur is 8, and is for a mask: give one, or leave it out."),
        (
            {"image": IMAGE, "mask": "alpha", "mask_blur": 8},
            "mask_blur is 8, and the edge of the mask alpha is the image's own: leave it out, blur the image",
        ),
        (
            {"image": IMAGE, "mask": IMAGE, "mask_blur": 8, "preserve_unmasked": False},
            "preserve_unmasked is False and mask_blur 8, which is for the edge where the image's own pixels",
        ),
        ({"padding": 0}, "padding is 0, and is for a mask: give one, or leave it out."),
        ({"preserve_unmasked": False}, "preserve_unmasked is False, and is for a mask"),
        ({"image": IMAGE, "mask": "alpha", "mask_blur": 65}, "mask_blur is 65: it must be 0 to 64."),
        ({"image": IMAGE, "mask": "alpha", "padding": 257}, "padding is 257: it must be 0 to 256."),
        (
            {"image": f"{FILE}:16384x64", "mask": "alpha", "padding": 0, "format": "webp"},
            "padding is 0, so that the picture is as large as the image, 16384x64, and webp holds up to 16",
        ),
    ],
)
def test_what_would_have_no_effect_or_another_one_is_refused(fields: Any, sentence: str) -> None:
    assert refusal(**fields).startswith(sentence)


def test_a_mask_may_be_of_another_resolution() -> None:
    assert parsed(image=IMAGE, mask=f"{FILE}:64x48").mask


def test_a_strength_that_leaves_no_step_is_refused_also_where_the_model_says_the_steps() -> None:
    job = parsed(image=IMAGE, strength=0.09)
    with pytest.raises(InvalidJobError, match=r"leaves none of 10 steps: use at least 0\.1,"):
        job.resolved(SERVED)
    assert parsed(image=IMAGE, strength=0.1).resolved(SERVED).steps == 10


@pytest.mark.parametrize("name", ["strength", "upscale_strength"])
def test_the_least_strength_that_a_refusal_names_leaves_a_step(name: str) -> None:
    pass_of = {"image": IMAGE} if name == "strength" else {"upscale": 1.5}
    for steps in range(2, MAX_STEPS + 1):
        fields = {**pass_of, "steps": steps}
        found = re.search(r"use at least ([\d.]+),", refusal(**fields, **{name: 0.001}))
        assert found, steps
        assert parsed(**fields, **{name: float(found[1])}), steps
        assert float(found[1]) <= 1.1 / steps


def test_a_job_that_begins_with_noise_says_nothing_of_pictures() -> None:
    """Its id and its message are those of earlier versions."""
    job = parsed(image="", mask="", strength=None, mask_blur=4, padding=None, preserve_unmasked=True)
    assert (job.version, job.id) == (1, parsed().id)
    assert job.model_dump(mode="json").keys() == parsed().model_dump(mode="json").keys()
    assert parsed(image=IMAGE).version == 4
