"""A job's parameters: each with its type, its limits, and what it is called elsewhere.

This is the one table that command-line options, file headings, infotext, the HTTP schema and the documents
are made from; `worker.contract.job_fields` says how.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, TypedDict

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from worker.contract.choices import (
    FIRST_SCHEDULERS,
    SAMPLERS,
    SCHEDULES,
    ImageFormat,
    NoiseSchedule,
    PromptSyntax,
    Scheduler,
)
from worker.contract.job_checks import (
    MAX_TENANT,
    ONE_LINE,
    PRINTABLE,
    TENANT,
    VISIBLE,
    divisible_by,
    drawn,
    has_its_steps,
    named_vae,
    not_blank,
    not_invisible,
    one_line,
    one_pair,
    one_zero,
    printable,
    read_scheduler,
    readable,
    sha256_by_file,
    since_by_choice,
    since_by_length,
    small_json,
    spelled_as,
    taken_as_eta,
    tenant_name,
)
from worker.contract.job_fields import JobField
from worker.contract.lora_tags import without_tags
from worker.contract.loras import MAX_LORAS, Lora, LorasLike, read_loras, shown_loras
from worker.contract.stored_jobs import of_new_jobs

#: Characters in a prompt, at most; and in messages of version 1.
MAX_PROMPT, FIRST_MAX_PROMPT = 8_000, 2_000
#: Pixels a side: least, most, and what both must be a multiple of (the VAE's and UNet's factor).
MIN_SIZE, MAX_SIZE, SIZE_STEP = 64, 2_048, 8
#: Denoising steps, at most.
MAX_STEPS = 150
#: Classifier-free guidance, at most (Ho and Salimans, 2022, in diffusers' parametrisation).
MAX_GUIDANCE = 30.0
#: The name of a file that a worker offers beside its model, at most this long.
MAX_FILE_NAME = 100
#: Layers of a text encoder, from its end, that can be taken: SD 1.x has so many.
MAX_CLIP_SKIP = 12
#: Seeds are 0 to this number, which `torch.Generator.manual_seed` takes without wrapping around.
MAX_SEED = 2**63 - 1
#: Bytes of metadata as compact JSON, at most.
MAX_METADATA = 4_096
#: Levels of lists and objects in metadata, at most: some JSON readers on the job's way stop at 200.
MAX_METADATA_DEPTH = 64
#: A job's priority is 0 to this number; higher is sooner.
MAX_PRIORITY, DEFAULT_PRIORITY = 9, 5
#: A model's name, at most this long: a hub id, or the name under which a worker serves a folder or file.
MAX_MODEL = 200
#: A revision, at most this long.
MAX_REVISION = 100
#: The model of jobs that name none: the fleet's default.
DEFAULT_MODEL = "default"

#: Limits that several fields share.
_SIZE = Field(ge=MIN_SIZE, le=MAX_SIZE, strict=True, json_schema_extra={"multipleOf": SIZE_STEP})
_SHARE = Field(ge=0, le=1, strict=True, allow_inf_nan=False)


class JobParameters(BaseModel):
    """The parameters of one picture, and of its submission. Frozen; what exists is within its limits.

    A field that is None means the model's own default.

    To add a field: its annotation with limits, a `#:` line with units and ranges, a default that changes no
    picture, and the same name in `ParameterFields`. `JobField` says what it is called elsewhere. All else is
    made from `worker.contract.job.JOB_FIELDS`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=False)

    #: What to draw: 1 to 8,000 characters. In the syntax `plain` what is beyond the text encoder's window is
    #: cut, as diffusers does.
    prompt: Annotated[
        str,
        Field(
            min_length=1,
            max_length=MAX_PROMPT,
            strict=True,
            json_schema_extra={"pattern": PRINTABLE, "allOf": [{"pattern": VISIBLE.pattern}]},
        ),
        AfterValidator(printable),
        AfterValidator(not_blank),
        of_new_jobs(not_invisible),
        JobField(
            since=since_by_length(FIRST_MAX_PROMPT, 2),
            a1111_option="prompt",
            diffusers="prompt",
            headings=("text", "caption", "prompts", "positive_prompt", "positive"),
            is_prompt=True,
            is_searched=True,
            is_original=True,
        ),
    ]
    #: What to keep out of the picture: up to 8,000 characters. Needs guidance above 1.
    negative_prompt: Annotated[
        str,
        Field(max_length=MAX_PROMPT, strict=True, json_schema_extra={"pattern": PRINTABLE}),
        AfterValidator(printable),
        JobField(
            since=since_by_length(FIRST_MAX_PROMPT, 2),
            a1111_option="negative_prompt",
            diffusers="negative_prompt",
            headings=("negative", "negativeprompt", "neg_prompt"),
            is_prompt=True,
            is_searched=True,
            is_original=True,
        ),
    ] = ""
    #: Seed of the CPU noise generator, 0 to 2^63-1. Not given, or -1: drawn at submission.
    seed: Annotated[
        int,
        Field(ge=0, le=MAX_SEED, strict=True),
        BeforeValidator(drawn),
        JobField(
            infotext_order=6,
            a1111_option="seed",
            headings=("random_seed",),
            is_searched=True,
            is_original=True,
        ),
    ] = Field(default_factory=lambda: secrets.randbits(32))
    #: Pixels, 64 to 2,048, a multiple of 8.
    width: Annotated[
        int | None,
        _SIZE,
        AfterValidator(divisible_by(SIZE_STEP)),
        JobField(
            pair="size",
            label="Size",
            infotext_order=7,
            a1111_option="width",
            diffusers="width",
            headings=("w",),
            is_searched=True,
            is_original=True,
        ),
    ] = None
    #: Pixels, 64 to 2,048, a multiple of 8.
    height: Annotated[
        int | None,
        _SIZE,
        AfterValidator(divisible_by(SIZE_STEP)),
        JobField(
            pair="size",
            label="Size",
            infotext_order=7,
            a1111_option="height",
            diffusers="height",
            headings=("h",),
            is_searched=True,
            is_original=True,
        ),
    ] = None
    #: Denoising steps, 1 to 150.
    steps: Annotated[
        int | None,
        Field(ge=1, le=MAX_STEPS, strict=True),
        JobField(
            infotext_order=1,
            a1111_option="steps",
            diffusers="num_inference_steps",
            headings=("inference_steps", "sampling_steps"),
            is_original=True,
        ),
    ] = None
    #: Classifier-free guidance, 0 to 30. At 1 and below there is none, which takes half the work.
    guidance_scale: Annotated[
        float | None,
        Field(ge=0, le=MAX_GUIDANCE, strict=True, allow_inf_nan=False),
        AfterValidator(one_zero),
        JobField(
            label="Guidance",
            infotext="CFG scale",
            infotext_order=3,
            a1111_option="cfg_scale",
            diffusers="guidance_scale",
            headings=("cfg", "guidance", "cfgs"),
            is_original=True,
        ),
    ] = None
    #: Share of the steps, 0 to 1, before which there is no guidance (Kynkäänniemi et al., 2024).
    guidance_start: Annotated[float, _SHARE, AfterValidator(one_zero), JobField(infotext_order=4)] = 0.0
    #: Share of the steps, 0 to 1, after which there is no guidance. Steps without it take half the work.
    guidance_stop: Annotated[float, _SHARE, AfterValidator(one_zero), JobField(infotext_order=5)] = 1.0
    #: diffusers' noise scheduler; `default` is the model's own.
    scheduler: Annotated[
        Scheduler,
        BeforeValidator(read_scheduler),
        JobField(
            since=since_by_choice(FIRST_SCHEDULERS, 3),
            infotext="Sampler",
            infotext_order=2,
            a1111_option="sampler_name",
            a1111_values=SAMPLERS,
            headings=("sampler",),
            is_searched=True,
            is_original=True,
        ),
    ] = Scheduler.DEFAULT
    #: How the scheduler spaces its noise levels; `default` is its own. Which schedules a scheduler has is in
    #: the table of schedulers.
    schedule: Annotated[
        NoiseSchedule,
        AfterValidator(has_its_steps),
        JobField(
            since=3,
            infotext="Schedule type",
            infotext_order=2,
            a1111_values=SCHEDULES,
            headings=("schedule_type", "noise_schedule"),
            is_searched=True,
        ),
    ] = NoiseSchedule.DEFAULT
    #: Share of a step's noise that is new, 0 to 1, for `ddim` and `tcd` (not given: 0) and for ancestral
    #: schedulers (not given: 1).
    eta: Annotated[
        float | None,
        Field(ge=0, le=1, strict=True, allow_inf_nan=False),
        AfterValidator(taken_as_eta),
        JobField(since=3, diffusers="eta", is_left_open=True),
    ] = None
    #: How much of the contrast that guidance adds is taken back, 0 to 1 (Lin et al., 2024).
    guidance_rescale: Annotated[
        float,
        _SHARE,
        AfterValidator(one_zero),
        JobField(
            since=3,
            infotext="CFG rescale",
            diffusers="guidance_rescale",
            headings=("cfg_rescale", "cfg_rescale_multiplier"),
        ),
    ] = 0.0
    #: The model's name, up to 200 characters; `default` is the fleet's.
    model: Annotated[
        str,
        Field(min_length=1, max_length=MAX_MODEL, strict=True, json_schema_extra={"pattern": ONE_LINE}),
        AfterValidator(one_line),
        JobField(
            infotext_order=8,
            infotext_ours_only=True,
            a1111_option="sd_model",
            headings=("model_name",),
            is_original=True,
        ),
    ] = DEFAULT_MODEL
    #: The model's revision, up to 100 characters. Not given: filled in at submission from what the workers
    #: announced.
    revision: Annotated[
        str,
        Field(max_length=MAX_REVISION, strict=True, json_schema_extra={"pattern": ONE_LINE}),
        AfterValidator(one_line),
        JobField(
            infotext="Model hash",
            infotext_order=9,
            infotext_ours_only=True,
            is_filled_by_fleet=True,
            is_original=True,
        ),
    ] = ""
    #: How both prompts are read: `plain`, or `a1111` with weights, BREAK, AND and text by step. Not given:
    #: the fleet's default.
    prompt_syntax: Annotated[
        PromptSyntax,
        BeforeValidator(spelled_as(PromptSyntax, {"automatic1111": "a1111"})),
        AfterValidator(readable),
        JobField(since=2, infotext_ours_only=True),
    ] = PromptSyntax.PLAIN
    #: The text encoder's layer that is taken, 1 to 12 from its end: 1 is the last one, 2 the last but one, as
    #: AUTOMATIC1111 counts. diffusers' argument of that name is one less.
    clip_skip: Annotated[
        int,
        Field(ge=1, le=MAX_CLIP_SKIP, strict=True),
        JobField(since=3, headings=("clipskip", "clip_stop_at_last_layers")),
    ] = 1
    #: The VAE that makes pixels of latents, up to 100 characters: one of those that the workers offer. Empty:
    #: the model's own.
    vae: Annotated[
        str,
        Field(max_length=MAX_FILE_NAME, strict=True, json_schema_extra={"pattern": ONE_LINE}),
        BeforeValidator(named_vae),
        AfterValidator(one_line),
        JobField(since=3, label="VAE", infotext_ours_only=True, headings=("sd_vae", "vae_name")),
    ] = ""
    #: LoRAs that the workers offer, up to 8, by name or hash (SHA-256, AutoV2, AutoV3), each with a weight of
    #: -4 to 4 (not given: 1): `detail=0.8; pixel=1:te=0.5`, where `te` is another weight for the text
    #: encoders, or as JSON `[{"name": "detail", "weight": 0.8}]`.
    loras: Annotated[
        list[Lora],
        Field(max_length=MAX_LORAS),
        BeforeValidator(read_loras),
        JobField(
            since=4,
            label="LoRAs",
            each="lora",
            as_text=shown_loras,
            infotext_ours_only=True,
            headings=("lora",),
            is_searched=True,
        ),
    ] = []
    #: SHA-256 of each file that the job uses beside its model, by kind and name. Not given: filled in at
    #: submission from what the workers announced.
    file_hashes: Annotated[
        dict[str, str],
        Field(strict=True),
        AfterValidator(sha256_by_file),
        JobField(since=3, infotext_ours_only=True, is_filled_by_fleet=True),
    ] = {}
    #: The picture's encoding.
    format: Annotated[
        ImageFormat,
        BeforeValidator(spelled_as(ImageFormat, {"jpg": "jpeg"})),
        JobField(infotext_order=10, is_original=True),
    ] = ImageFormat.PNG
    #: Whose job it is, where several share the workers: 1 to 40 lower-case letters, digits and hyphens.
    tenant: Annotated[
        str,
        Field(max_length=MAX_TENANT, strict=True, json_schema_extra={"pattern": TENANT}),
        AfterValidator(tenant_name),
        JobField(since=3, is_set_by_producer=True),
    ] = ""
    #: 0 to 9: jobs of a higher priority are rendered first.
    priority: Annotated[
        int, Field(ge=0, le=MAX_PRIORITY, strict=True), JobField(is_submission=True, is_original=True)
    ] = DEFAULT_PRIORITY
    #: The caller's own JSON object, up to 4 KiB, returned untouched.
    metadata: Annotated[
        dict[str, Any],
        AfterValidator(small_json(MAX_METADATA, MAX_METADATA_DEPTH)),
        JobField(is_submission=True, is_original=True),
    ] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _read_together(cls, values: Any) -> Any:
        return without_tags(one_pair(values))


class ParameterFields(TypedDict, total=False):
    """The fields of `JobParameters` beside the prompt: a part of `worker.contract.job_keywords.JobFields`."""

    negative_prompt: str
    seed: int
    width: int | None
    height: int | None
    steps: int | None
    guidance_scale: float | None
    guidance_start: float
    guidance_stop: float
    scheduler: Scheduler | str
    schedule: NoiseSchedule | str
    eta: float | None
    guidance_rescale: float
    model: str
    revision: str
    prompt_syntax: PromptSyntax | str
    clip_skip: int
    vae: str
    loras: LorasLike
    file_hashes: dict[str, str]
    format: ImageFormat | str
    tenant: str
    priority: int
    metadata: dict[str, Any]
