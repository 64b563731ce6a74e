"""What a job may be, what its id says, and that nothing else ever comes out of `Job.parse`."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.contract.choices import ImageFormat, PromptSyntax, Scheduler
from worker.contract.errors import InvalidJobError
from worker.contract.job import SUBMISSION_FIELDS, Job
from worker.contract.job_checks import VISIBLE
from worker.contract.job_keywords import JobFields
from worker.contract.job_parameters import MAX_METADATA, MAX_METADATA_DEPTH, MAX_SEED
from worker.contract.loras import LorasLike
from worker.contract.record import JobRecord, State
from worker.contract.served_model import Defaults, ServedModel

SERVED = ServedModel(
    name="a/model",
    revision="r" * 40,
    defaults=Defaults(width=512, height=768, steps=30, guidance_scale=7.5),
)
GOLDEN = Job(
    prompt="a small cat",
    negative_prompt="blurry",
    seed=7,
    width=512,
    height=640,
    steps=20,
    guidance_scale=7.5,
    scheduler=Scheduler.EULER,
    model="a/model",
    revision="0123456789abcdef",
    format=ImageFormat.PNG,
)
#: A picture in the bucket.
REFERENCE = f"sha256:{'ab' * 32}:640x480"


def parsed(**fields: Any) -> Job:
    return Job.parse({"prompt": "a small cat", "seed": 1, **fields})


def refusal(**fields: Any) -> str:
    with pytest.raises(InvalidJobError) as caught:
        parsed(**fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "x"),
        ("prompt", "x" * 8_000),
        ("prompt", "line\nline\r\n\ttab"),
        ("prompt", "🐈 кот 猫 قطة"),
        ("negative_prompt", ""),
        ("negative_prompt", "x" * 8_000),
        ("seed", 0),
        ("seed", MAX_SEED),
        ("width", 64),
        ("width", 2_048),
        ("height", 72),
        ("steps", 1),
        ("steps", 150),
        ("guidance_scale", 0),
        ("guidance_scale", 30),
        ("guidance_scale", 7),
        ("model", "x" * 200),
        ("priority", 0),
        ("priority", 9),
        ("metadata", {"of": ["the", "caller", 1, 1.5, None, True]}),
    ],
)
def test_values_at_a_limit_are_taken_as_they_are(field: str, value: Any) -> None:
    assert getattr(parsed(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("prompt", "", "prompt is empty: say what to draw."),
        ("prompt", " \n\t ", "prompt is blank: say what to draw."),
        ("prompt", "x" * 8_001, "prompt is 8,001 characters, the limit is 8,000."),
        ("prompt", "a\x00b", "prompt holds the control character U+0000: remove it."),
        ("prompt", "a\x1b[31mb", "prompt holds the control character U+001B: remove it."),
        ("prompt", "a\x85b", "prompt holds the control character U+0085: remove it."),
        ("prompt", 5, "prompt is 5: it must be a valid string."),
        ("prompt", None, "prompt is None: it must be a valid string."),
        ("negative_prompt", "x" * 8_001, "negative_prompt is 8,001 characters, the limit is 8,000."),
        ("negative_prompt", "\x07", "negative_prompt holds the control character U+0007: remove it."),
        ("seed", -2, f"seed is -2: it must be 0 to {2**63 - 1:,}, or -1 for a drawn one."),
        ("seed", 2**63, f"seed is {2**63}: it must be 0 to {2**63 - 1:,}."),
        ("seed", "5", f"seed is '5': it must be a valid integer, 0 to {2**63 - 1:,}."),
        ("seed", 5.0, f"seed is 5.0: it must be a valid integer, 0 to {2**63 - 1:,}."),
        ("seed", True, f"seed is True: it must be a valid integer, 0 to {2**63 - 1:,}."),
        ("width", 56, "width is 56: it must be 64 to 2,048."),
        ("width", 65, "width is 65, which is no multiple of 8: use 64 or 72."),
        ("height", 2_047, "height is 2047, which is no multiple of 8: use 2040 or 2048."),
        ("height", 2_056, "height is 2056: it must be 64 to 2,048."),
        ("steps", 0, "steps is 0: it must be 1 to 150."),
        ("steps", 151, "steps is 151: it must be 1 to 150."),
        ("steps", True, "steps is True: it must be a valid integer, 1 to 150."),
        ("guidance_scale", -0.1, "guidance_scale is -0.1: it must be 0 to 30."),
        ("guidance_scale", 30.1, "guidance_scale is 30.1: it must be 0 to 30."),
        ("guidance_scale", math.nan, "guidance_scale is nan: it must be a finite number, 0 to 30."),
        ("guidance_scale", math.inf, "guidance_scale is inf: it must be a finite number, 0 to 30."),
        ("guidance_start", -0.1, "guidance_start is -0.1: it must be 0 to 1."),
        ("guidance_stop", 1.1, "guidance_stop is 1.1: it must be 0 to 1."),
        ("guidance_scale", True, "guidance_scale is True: it must be a valid number, 0 to 30."),
        ("model", "", "model is empty: leave it out for the fleet's default."),
        ("model", "x" * 201, "model is 201 characters, the limit is 200."),
        ("model", "a\nb", "model holds the control character U+000A: remove it."),
        ("revision", "a\x06b", "revision holds the control character U+0006: remove it."),
        ("priority", 10, "priority is 10: it must be 0 to 9."),
        ("priority", -1, "priority is -1: it must be 0 to 9."),
        ("metadata", [1], "metadata is [1]: it must be a valid dictionary."),
        ("metadata", {"x": math.nan}, "metadata is not JSON:"),
        ("metadata", {"x": object()}, "metadata is not JSON:"),
        ("metadata", {"x": "\ud800"}, "metadata is not JSON:"),
    ],
)
def test_a_value_past_a_limit_gets_a_sentence_with_the_value_the_limit_and_the_remedy(
    field: str, value: Any, sentence: str
) -> None:
    assert refusal(**{field: value}).startswith(sentence)


@pytest.mark.parametrize("prompt", ["a\ud83dcat", "\udcff"])
def test_a_lone_surrogate_is_refused_with_a_text_that_can_be_printed(prompt: str) -> None:
    assert refusal(prompt=prompt).encode()


def test_the_error_of_an_unknown_scheduler_or_format_names_what_there_is() -> None:
    assert refusal(scheduler="dim") == (
        "scheduler is 'dim': use one of default, ddim, euler, euler_ancestral, dpmpp_2m, "
        "dpmpp_2m_karras, pndm, unipc, lcm, heun, dpm2, dpm2_ancestral, lms, ddpm, deis, dpmpp_2s, "
        "dpmpp_2s_ancestral, dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde, tcd, sa_solver."
    )
    assert refusal(format="gif") == "format is 'gif': use one of png, webp, jpeg."


@pytest.mark.parametrize(
    ("given_name", "scheduler"),
    [
        ("DPM++ 2M Karras", Scheduler.DPMPP_2M_KARRAS),
        ("euler a", Scheduler.EULER_ANCESTRAL),
        ("UniPC", Scheduler.UNIPC),
        ("dpmpp-2m", Scheduler.DPMPP_2M),
    ],
)
def test_schedulers_go_by_the_names_people_use(given_name: str, scheduler: Scheduler) -> None:
    assert parsed(scheduler=given_name).scheduler is scheduler


def test_jpg_is_jpeg() -> None:
    assert parsed(format="JPG").format is ImageFormat.JPEG


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        *(("promt", "prompt"), ("negativ_prompt", "negative_prompt"), ("step", "steps")),
        *(("num_inference_steps", "steps"), ("numInferenceSteps", "steps"), ("cfg", "guidance_scale")),
        *(("cfg_scale", "guidance_scale"), ("sampler", "scheduler"), ("sampler_name", "scheduler")),
        *(("num_inference_step", "steps"), ("w", "width"), ("CFG Scale", "guidance_scale")),
    ],
)
def test_an_unknown_field_names_the_near_miss(misspelt: str, meant: str) -> None:
    assert refusal(**{misspelt: 1}) == f'There is no job field "{misspelt}": did you mean "{meant}"?'


def test_an_unknown_field_far_from_all_names_them_all() -> None:
    sentence = refusal(zzz=1)
    assert all(field in sentence for field in (*Job.model_fields, "webhook"))


def test_all_wrong_fields_are_in_one_error() -> None:
    sentence = refusal(width=65, steps=0, zzz=1)
    assert "width" in sentence
    assert "steps" in sentence
    assert "zzz" in sentence


def test_the_error_of_a_job_without_a_prompt_says_so() -> None:
    with pytest.raises(InvalidJobError, match=r"^prompt is missing: a job needs a prompt\.$"):
        Job.parse({})


@pytest.mark.parametrize(
    "value", ["x" * 10**6, [0] * 10**5, 10**5_000, -(10**5_000)], ids=["text", "list", "int", "negative"]
)
def test_a_huge_value_gets_a_short_sentence(value: Any) -> None:
    for field in Job.model_fields:
        if field not in ("prompt", "metadata"):
            assert len(refusal(**{field: value})) < 400


def test_metadata_is_limited_by_its_bytes_as_compact_json() -> None:
    around = len('{"x":""}')
    assert parsed(metadata={"x": "y" * (MAX_METADATA - around)})
    assert refusal(metadata={"x": "y" * (MAX_METADATA - around + 1)}) == (
        "metadata is 4,097 bytes of JSON, the limit is 4,096: keep a reference."
    )
    # Bytes, not characters.
    assert "the limit is 4,096" in refusal(metadata={"x": "é" * 2_048})


def nested(depth: int) -> dict[str, Any]:
    value: Any = []
    for _ in range(depth - 2):
        value = [value]
    return {"x": value}


def test_metadata_as_deep_as_allowed_makes_the_whole_way_as_json() -> None:
    job = parsed(metadata=nested(MAX_METADATA_DEPTH))
    assert Job.model_validate_json(job.model_dump_json()) == job


@pytest.mark.parametrize("depth", [MAX_METADATA_DEPTH + 1, 300, 1_900, 100_000])
def test_metadata_deeper_than_json_readers_go_is_refused(depth: int) -> None:
    assert refusal(metadata=nested(depth)).startswith("metadata is nested deeper than ")


def test_metadata_is_the_callers_at_the_time_of_the_call() -> None:
    inner = [1]
    job = parsed(metadata={"list": inner})
    inner.append(2)
    assert job.metadata == {"list": [1]}


def test_a_job_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parsed().seed = 2  # type: ignore[misc]


def test_without_a_seed_one_is_drawn_and_recorded() -> None:
    for fields in ({}, {"seed": -1}):
        seeds = {Job.parse({"prompt": "a small cat", **fields}).seed for _ in range(8)}
        assert len(seeds) > 1
        assert min(seeds) >= 0


def test_the_hash_never_changes_by_accident() -> None:
    """A changed id orphans every stored picture: raise ID_VERSION on purpose, then change this."""
    assert GOLDEN.id == "5658caa6a817ae958cf25d94c7a29fb6"


OTHER_VALUES: dict[str, Any] = {
    "prompt": "a small dog",
    "negative_prompt": "sharp",
    "seed": 8,
    "width": 520,
    "height": 648,
    "steps": 21,
    "guidance_scale": 7.25,
    "guidance_start": 0.25,
    "guidance_stop": 0.75,
    "scheduler": "ddim",
    "schedule": "sgm_uniform",
    "eta": 0.5,
    "guidance_rescale": 0.7,
    "prompt_syntax": "a1111",
    "clip_skip": 2,
    "vae": "ft-mse",
    "loras": [{"name": "detail", "weight": 0.8}],
    "file_hashes": {"lora:detail": "cd" * 32, "vae:ft-mse": "ab" * 32},
    "model": "another/model",
    "revision": "fedcba9876543210",
    "format": "webp",
    "priority": 9,
    "metadata": {"mine": 1},
    "tenant": "acme",
    "image": REFERENCE,
    "mask": "alpha",
    "strength": 0.5,
    "mask_blur": 8,
    "padding": 32,
    "preserve_unmasked": False,
    "upscale": 2.0,
    "upscale_steps": 12,
    "upscale_strength": 0.75,
    "upscaler": "lanczos",
}
#: What a field needs beside it.
NEEDED: dict[str, dict[str, Any]] = {
    "eta": {"scheduler": "ddim"},
    "mask": {"image": REFERENCE},
    "strength": {"image": REFERENCE},
    "mask_blur": {"image": REFERENCE, "mask": REFERENCE},
    "padding": {"image": REFERENCE, "mask": "alpha"},
    "preserve_unmasked": {"image": REFERENCE, "mask": "alpha"},
    "upscale_steps": {"upscale": 2.0},
    "upscale_strength": {"upscale": 2.0},
    "upscaler": {"upscale": 2.0},
}


@pytest.mark.parametrize("field", Job.model_fields)
def test_the_id_follows_what_determines_the_picture_and_nothing_else(field: str) -> None:
    golden = GOLDEN.model_dump() | NEEDED.get(field, {})
    other = Job.parse(golden | {field: OTHER_VALUES[field]})
    belongs_to_the_submission = field in SUBMISSION_FIELDS
    assert (other.id == Job.parse(golden).id) is belongs_to_the_submission


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"guidance_scale": 7}, {"guidance_scale": 7.0}),
        ({"guidance_scale": 0.0}, {"guidance_scale": -0.0}),
        ({"scheduler": "Euler a"}, {"scheduler": "euler_ancestral"}),
        ({"format": "jpg"}, {"format": "jpeg"}),
        ({}, {"negative_prompt": "", "scheduler": "default", "format": "png", "priority": 5, "metadata": {}}),
        ({}, {"prompt_syntax": "plain"}),
    ],
)
def test_equal_pictures_have_equal_ids_however_they_are_written(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert parsed(**one).id == parsed(**other).id


def test_resolving_fills_in_what_was_left_open_and_pins_the_model() -> None:
    job = parsed(steps=12).resolved(SERVED)
    assert (job.width, job.height, job.steps, job.guidance_scale) == (512, 768, 12, 7.5)
    assert (job.model, job.revision) == (SERVED.name, SERVED.revision)


def test_a_job_with_the_defaults_is_the_job_that_leaves_them_open() -> None:
    given = parsed(width=512, height=768, steps=30, guidance_scale=7.5, model="a/model")
    assert given.resolved(SERVED).id == parsed().resolved(SERVED).id


def test_a_resolved_job_is_within_its_limits() -> None:
    assert Job.parse(parsed().resolved(SERVED).model_dump()) == parsed().resolved(SERVED)


def test_two_open_jobs_are_never_the_same_job() -> None:
    job = parsed()
    assert not job.is_open
    assert job.opened().is_open
    assert job.opened().id != job.opened().id


def test_an_open_job_is_closed_by_resolving_it() -> None:
    assert parsed().opened().resolved(SERVED).id == parsed().resolved(SERVED).id


# Everything that JSON can say, and some that only Python can.
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**400, max_value=10**420)
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(["", " ", "\x00", "\ud800", "x" * 8_001, "png", "euler", 65, 2**63, -0.0, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(st.sampled_from([*Job.model_fields, "promt"]) | st.text(st.characters(), max_size=8), ODD)
    | ODD
)
def test_parse_gives_a_job_or_an_invalid_job_error_and_nothing_else(fields: Any) -> None:
    try:
        job = Job.parse(fields)
    except InvalidJobError as error:
        sentence = str(error)
        sentence.encode()  # Can be printed.
        job = None
    if job is None:
        assert "\n" not in sentence
    else:
        assert Job.model_validate_json(job.model_dump_json()) == job
        assert Job.parse(json.loads(json.dumps(job.model_dump(mode="json")))) == job
        assert len(job.id) == 32


def test_the_keyword_parameters_are_the_fields_of_a_job_with_their_types() -> None:
    meant = {}
    hints = get_type_hints(Job)
    for name in Job.model_fields:
        kind = hints[name]
        # Choices are taken by their name as well.
        is_choice = isinstance(kind, type) and issubclass(kind, StrEnum)
        meant[name] = kind | str if is_choice else kind
    del meant["prompt"]
    # A path, bytes and more, of which `submit_job` makes a reference.
    meant |= {"image": Any, "mask": Any}
    # They are taken as texts and objects as well.
    meant["loras"] = LorasLike
    keywords = get_type_hints(JobFields)
    assert keywords == meant
    assert list(keywords) == list(meant)
    assert not JobFields.__required_keys__


VALID = st.fixed_dictionaries(
    {"prompt": st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1).filter(VISIBLE.search)},
    optional={
        "negative_prompt": st.text(st.characters(exclude_categories=["Cc", "Cs"])),
        "seed": st.integers(0, MAX_SEED),
        "width": st.integers(8, 256).map(lambda n: 8 * n),
        "height": st.integers(8, 256).map(lambda n: 8 * n),
        "steps": st.integers(1, 150),
        "guidance_scale": st.floats(0, 30),
        "guidance_start": st.floats(0, 1),
        "guidance_stop": st.floats(0, 1),
        "scheduler": st.sampled_from(list(Scheduler)),
        "prompt_syntax": st.just("plain"),
        "format": st.sampled_from(list(ImageFormat)),
        "priority": st.integers(0, 9),
        "metadata": st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
    },
)


@settings(deadline=None, max_examples=100)
@given(VALID)
def test_every_valid_job_is_the_same_job_after_its_way_through_json(fields: dict[str, Any]) -> None:
    job = Job.parse(fields)
    there = Job.model_validate_json(job.model_dump_json())
    assert there == job
    assert there.id == job.id


def test_a_record_has_its_syntax_so_that_its_job_keeps_it_when_submitted_again() -> None:
    job = parsed(prompt="a (cat:1.3)")
    assert not job.says_syntax
    record = JobRecord(id=job.id, state=State.DONE, job=job)
    again = JobRecord.model_validate_json(record.model_dump_json()).job
    assert again.says_syntax
    assert again.in_syntax(PromptSyntax.A1111).prompt_syntax is PromptSyntax.PLAIN
    assert "prompt_syntax" not in record.model_dump_json()
