"""The infotext: what is read from it is the job that it was written for."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.worker.contract.test_job import OTHER_VALUES, REFERENCE
from worker.contract.choices import ALIGN_YOUR_STEPS, ETA, SAMPLERS, ImageFormat, PromptSyntax, Scheduler
from worker.contract.errors import InvalidJobError
from worker.contract.infotext import read, read_fields, write
from worker.contract.job import JOB_FIELDS, WRITTEN_FIELDS, Job
from worker.contract.job_checks import VISIBLE
from worker.contract.job_parameters import MAX_SEED, MAX_SIZE
from worker.contract.scheduler_names import OFFERED


def resolved(**fields: Any) -> Job:
    given_fields = {
        "prompt": "a small cat",
        "seed": 5,
        "width": 512,
        "height": 512,
        "steps": 20,
        "guidance_scale": 7.5,
        "scheduler": "euler_ancestral",
        "model": "a/model",
        "revision": "abc123",
    }
    return Job.parse(given_fields | fields)


def test_the_text_is_what_automatic1111_would_write() -> None:
    assert write(resolved(negative_prompt="blurry")) == (
        "a small cat\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 5, Size: 512x512, Model: a/model, "
        "Model hash: abc123, Format: png, Version: smallcat"
    )


def test_without_a_negative_prompt_its_line_is_left_out() -> None:
    assert "Negative prompt" not in write(resolved())


#: Pieces that the format itself uses, or that break lines, quotes and escapes.
PIECES = st.sampled_from(
    [
        "\n",
        "\r\n",
        "\r",
        "Steps: ",
        "Steps: 20, Sampler: Euler",
        "Negative prompt: ",
        "\nNegative prompt: ",
        'Texts: "[]"',
        ", ",
        '"',
        '\\"',
        "\\",
        "\u2028",
        "🐈",
        "e\u0301",
        "x",
        "\t",
        " ",
        ": ",
    ]
)
#: Every scheduler with every schedule, and an eta where it takes one.
SAMPLERS_AND_SCHEDULES = [
    {"scheduler": name, "schedule": schedule, "eta": eta}
    for name, schedules in OFFERED.items()
    for schedule in ("default", *schedules)
    for eta in ((None, 0.25) if name in ETA else (None,))
]


TEXT = st.lists(PIECES | st.characters(exclude_categories=["Cc", "Cs"]), max_size=12).map("".join)
NAME = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)


#: Names of files, as embeddings and VAEs have them.
FILE_NAME = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"]), min_size=1, max_size=12)
SHA256 = st.text("0123456789abcdef", min_size=64, max_size=64)


LORA_NAME = FILE_NAME.filter(str.isprintable) | st.sampled_from(["detail", "a=b", "a:b", "a b", "x#y", "[x]"])
LORA_WEIGHT = st.sampled_from([0.8, 1, -4, 1e-07, 0.1234567890123456])


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """A VAE or none, and embeddings, with their hashes, as a resolved job has them."""
    vae = draw(st.just("") | FILE_NAME)
    loras = draw(st.dictionaries(LORA_NAME, st.tuples(LORA_WEIGHT, st.none() | LORA_WEIGHT), max_size=3))
    hashes = {f"embedding:{name}": draw(SHA256) for name in draw(st.lists(FILE_NAME, max_size=3))}
    hashes |= {f"lora:{name.strip()}": draw(SHA256) for name in loras}
    return {
        "vae": vae,
        "loras": [
            {"name": name, "weight": weight, "text_encoder_weight": of_text}
            for name, (weight, of_text) in loras.items()
        ],
        "file_hashes": hashes | ({f"vae:{vae}": draw(SHA256)} if vae else {}),
    }


@st.composite
def inputs(draw: st.DrawFn) -> dict[str, Any]:
    """What a job begins with, that has two steps or more: nothing, a picture, or one and its mask."""
    image, mask = draw(st.sampled_from([("", ""), (REFERENCE, ""), (REFERENCE, "alpha"), (REFERENCE,) * 2]))
    strength = st.floats(0.5, 1) | st.none()
    found = {"image": image, "mask": mask, "strength": draw(strength) if image else None}
    if mask:
        padding = draw(st.none() | st.integers(0, 256))
        found |= {"padding": padding, "preserve_unmasked": draw(st.booleans())}
        has_edge = mask != "alpha" and found["preserve_unmasked"]
        found["mask_blur"] = draw(st.integers(0, 64) if has_edge else st.sampled_from([0, 4]))
    return found


#: The fields of `inputs`.
INPUTS = "image mask strength mask_blur padding preserve_unmasked"
#: A strategy for each field; where several fields have limits together, for all of them.
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": TEXT.filter(VISIBLE.search),
    "negative_prompt": TEXT,
    "seed": st.integers(0, MAX_SEED),
    "width": st.integers(8, 256).map(lambda n: 8 * n),
    "height": st.integers(8, 256).map(lambda n: 8 * n),
    "steps": st.integers(1, 150),
    "guidance_scale": st.floats(0, 30),
    "guidance_start": st.floats(0, 1),
    "guidance_stop": st.floats(0, 1),
    "scheduler schedule eta": st.sampled_from(SAMPLERS_AND_SCHEDULES),
    "guidance_rescale": st.floats(0, 1),
    "model": NAME,
    "revision": NAME,
    "prompt_syntax": st.sampled_from(list(PromptSyntax)),
    "clip_skip": st.integers(1, 12),
    "vae loras file_hashes": files(),
    "format": st.sampled_from(list(ImageFormat)),
    INPUTS: inputs(),
}


#: Fields without a strategy of their own are tried at their default and at another value.
_NAMED = {name for names in FIELDS for name in names.split()}
FIELDS |= {
    each.name: st.sampled_from([each.default, OTHER_VALUES[each.name]])
    for each in WRITTEN_FIELDS.values()
    if each.is_hashed and each.name not in _NAMED
}


#: What a job without a second pass has at its default.
OF_SECOND_PASS = ("upscale_steps", "upscale_strength", "upscaler")


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    fields: dict[str, Any] = {}
    for names, strategy in FIELDS.items():
        value = draw(strategy)
        fields |= {names: value} if " " not in names else value
    if fields["schedule"] == "align_your_steps":
        fields["steps"] = ALIGN_YOUR_STEPS
    if fields["image"] or fields["upscale"] > 1:
        fields["steps"] = max(2, fields["steps"])
    if fields["mask"] or max(fields["width"], fields["height"]) > MAX_SIZE / 2:
        fields["upscale"] = 1.0
    if fields["upscale"] == 1:
        fields |= {name: JOB_FIELDS[name].default for name in OF_SECOND_PASS}
    if fields["schedule"] == "align_your_steps":
        fields["upscale_steps"] = None
    try:
        return Job.parse(fields | {"priority": 9, "metadata": {"mine": 1}, "tenant": "acme"})
    except InvalidJobError:
        # What AUTOMATIC1111's syntax refuses is words in the other one.
        return Job.parse(fields | {"prompt_syntax": PromptSyntax.PLAIN})


#: What belongs to the submission that made the picture, not to the picture.
NOT_OF_THE_PICTURE = {"priority": 5, "metadata": {}, "tenant": ""}


@settings(deadline=None, max_examples=250)
@example(resolved(prompt="a\nSteps: 3"))
@example(resolved(prompt="a\nNegative prompt: b"))
@example(resolved(negative_prompt="\nSteps: 1, Seed: 2", model='a, "b": c', revision=" r "))
@given(jobs())
def test_reading_what_was_written_gives_an_equal_job(job: Job) -> None:
    again = read(write(job))
    assert again == job.model_copy(update=NOT_OF_THE_PICTURE)
    assert again.id == job.model_copy(update=NOT_OF_THE_PICTURE).id


@pytest.mark.parametrize(
    ("pairs", "fields"),
    [
        (
            "Sampler: DPM++ 3M SDE, Schedule type: Exponential",
            {"scheduler": "dpmpp_3m_sde", "schedule": "exponential"},
        ),
        ("Sampler: DPM++ SDE Karras", {"scheduler": "dpmpp_sde", "schedule": "karras"}),
        ("Sampler: DPM++ 2S a, Eta: 0.67", {"scheduler": "dpmpp_2s_ancestral", "eta": 0.67}),
        ("Sampler: DDIM, Eta DDIM: 0.5", {"scheduler": "ddim", "eta": 0.5}),
        ("Sampler: Euler, Schedule type: SGM Uniform", {"scheduler": "euler", "schedule": "sgm_uniform"}),
    ],
)
def test_what_automatic1111_writes_of_a_sampler_is_read_and_written_again(
    pairs: str, fields: dict[str, Any]
) -> None:
    """AUTOMATIC1111 1.10: modules/sd_samplers_common.py, `eta_infotext_field`."""
    job = read(f"a small cat\nSteps: 20, {pairs}, Seed: 1, Size: 64x64")
    asked = {"schedule": "default", "eta": None} | fields
    assert {name: getattr(job, name) for name in asked} == asked
    written = write(resolved(**fields))
    assert {name: getattr(read(written), name) for name in asked} == asked


@pytest.mark.parametrize("scheduler", Scheduler)
def test_every_scheduler_has_a_name_there(scheduler: Scheduler) -> None:
    assert read(write(resolved(scheduler=scheduler))).scheduler is scheduler
    assert list(SAMPLERS.values()).count(SAMPLERS[scheduler]) == 1


def test_the_longest_texts_with_the_longest_escapes_still_fit_into_a_jpeg() -> None:
    """Exif in a JPEG ends at 65,533 bytes, and is UTF-16."""
    for character in ('"', "\\", "🐈", "\n", "x"):
        prompt = character * 1_900 + "\nNegative prompt: x"
        worst = character * 1_999 + "x"
        job = resolved(prompt=prompt, negative_prompt=worst, model="m," * 100, revision="r," * 50)
        text = write(job)
        assert read(text).id == job.id
        assert len(text.encode("utf-16-be")) < 60_000


#: From AUTOMATIC1111's stable-diffusion-webui: before and after samplers and schedules parted, with extras.
AUTOMATIC1111 = """\
masterpiece, (small cat:1.3), <lora:add_detail:0.8>
on a "red" sofa
Negative prompt: EasyNegative, lowres,
bad anatomy
Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 2961093478, Size: 512x768, Model hash: 7f96a1a9ca, \
Model: anything, v5: "final", Denoising strength: 0.5, Clip skip: 2, Hires upscale: 2, \
Lora hashes: "add_detail: 7c6bad76eb54", Version: v1.6.0"""


def test_a_picture_of_automatic1111_can_be_asked_for_again() -> None:
    job = read(AUTOMATIC1111)
    assert job.prompt_syntax == "a1111"
    # The network is a field of the job, by its hash: its name may mean another file here.
    assert job.prompt == 'masterpiece, (small cat:1.3), \non a "red" sofa'
    assert [(each.name, each.weight) for each in job.loras] == [("add_detail@7c6bad76eb54", 0.8)]
    assert job.negative_prompt == "EasyNegative, lowres,\nbad anatomy"
    assert (job.steps, job.scheduler, job.guidance_scale) == (28, Scheduler.DPMPP_2M_KARRAS, 7.0)
    assert (job.seed, job.width, job.height, job.clip_skip) == (2961093478, 512, 768, 2)
    # Its model's file name and hash mean nothing to this fleet.
    assert (job.model, job.revision) == ("default", "")


@pytest.mark.parametrize(
    ("pair", "left_out"),
    [
        ("VAE hash: 63aeecb90f, VAE: vae-ft-mse.pt", ("VAE: vae-ft-mse.pt",)),
        ("VAE: Automatic", ()),
        ("ENSD: 31337", ("ENSD: 31337",)),
        ("Variation seed strength: 0.5", ("Variation seed strength: 0.5",)),
    ],
)
def test_what_a_job_does_not_take_from_elsewhere_is_named(pair: str, left_out: tuple[str, ...]) -> None:
    """A VAE's file name is another fleet's; the others are not offered."""
    reading = read_fields(f"a cat\nSteps: 20, Seed: 1, {pair}, Version: v1.10.1")
    assert tuple(reading.left_out) == left_out
    assert "vae" not in reading.fields


@pytest.mark.parametrize("strength", ["1e-300", "5e-324", "0.001", "nan", "inf", "-1"])
def test_a_hires_fix_that_no_job_can_have_is_named(strength: str) -> None:
    pairs = [f"Denoising strength: {strength}", "Hires upscale: 2", "Hires upscaler: Latent"]
    reading = read_fields(f"a cat\nSteps: 20, Seed: 1, Size: 64x64, {', '.join(pairs)}, Version: v1.10.1")
    assert list(reading.left_out) == pairs
    assert "upscale" not in reading.fields


@pytest.mark.parametrize(("text", "clip_skip"), [("0", 1), ("1", 1), ("2", 2), ("-2", 2), ("12", 12)])
def test_other_tools_ways_to_count_layers_mean_the_same(text: str, clip_skip: int) -> None:
    assert read(f"a cat\nSteps: 20, Seed: 1, Clip skip: {text}").clip_skip == clip_skip


@pytest.mark.parametrize(
    ("pairs", "scheduler"),
    [
        ("Sampler: DPM++ 2M, Schedule type: Karras", Scheduler.DPMPP_2M_KARRAS),
        # What the sampler is made with there: modules/sd_samplers_kdiffusion.py of version 1.10.
        ("Sampler: DPM++ 2M, Schedule type: Automatic", Scheduler.DPMPP_2M_KARRAS),
        ("Sampler: Euler a, Schedule type: Automatic", Scheduler.EULER_ANCESTRAL),
        ("Sampler: PLMS", Scheduler.PNDM),
    ],
)
def test_a_sampler_is_read_with_its_schedule(pairs: str, scheduler: Scheduler) -> None:
    assert read(f"a small cat\nSteps: 20, {pairs}, Seed: 1").scheduler is scheduler


def test_a_bare_prompt_is_a_job() -> None:
    assert read("a small cat\non a mat").prompt == "a small cat\non a mat"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a cat\nSteps: many, Seed: 1", "many"),
        ("a cat\nSteps: 20, Size: 512", "512"),
        ("a cat\nSteps: 20, Size: 512x512x512", "512x512x512"),
        ("a cat\nSteps: 20, Seed: " + "9" * 5_000, "Seed"),
        ("a cat\nSteps: 151", "steps is 151"),
        ("a cat\nSteps: 20, Sampler: DPM fast", "scheduler is 'DPM fast'"),
        ('a cat\nSteps: 20, Texts: "[1]", Version: smallcat', "Texts"),
        ('a cat\nSteps: 20, Texts: "nonsense", Version: smallcat', "Texts"),
        ("\nSteps: 20", "prompt"),
        ("", "prompt"),
    ],
)
def test_what_cannot_be_a_job_is_refused_with_the_value(text: str, part: str) -> None:
    with pytest.raises(InvalidJobError) as caught:
        read(text)
    assert part in str(caught.value)
    assert len(str(caught.value)) < 400


def test_another_tools_quoting_is_no_obstacle() -> None:
    assert read('a cat\nSteps: 20, Wildcards: "C:\\Users", Seed: 4').seed == 4


@settings(deadline=None, max_examples=150)
@given(st.text(st.characters()) | st.lists(PIECES, max_size=15).map(lambda pieces: "Steps: ".join(pieces)))
def test_any_text_is_a_job_or_an_invalid_job(text: str) -> None:
    with contextlib.suppress(InvalidJobError):
        assert isinstance(read(text), Job)


def test_an_infotext_says_its_syntax_and_ours_without_it_is_plain() -> None:
    """Whatever the fleet's default is: the job says it."""
    made = Job(prompt="a (cat:1.3)", seed=1, width=64, height=64, steps=4, guidance_scale=7.5, revision="r")
    assert "syntax" not in write(made)
    assert read(write(made)).says_syntax
    assert read(write(made)).prompt_syntax == "plain"
    other = made.model_copy(update={"prompt_syntax": PromptSyntax.A1111})
    assert "Prompt syntax: a1111" in write(other)
    assert read(write(other)).id == other.id
    bare = read("a (cat:1.3)")
    assert not bare.says_syntax


def test_a_blur_that_has_no_effect_is_not_written() -> None:
    """The edge of the mask alpha is the image's own; AUTOMATIC1111 writes the blur of each other mask."""
    for mask, is_written in (("alpha", False), (REFERENCE, True)):
        job = Job(prompt="a cat", seed=1, image=REFERENCE, mask=mask, steps=20, guidance_scale=5.0)
        text = write(job)
        assert ("Mask blur: 4" in text) == is_written
        assert read(text).mask_blur == job.mask_blur
