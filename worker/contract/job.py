"""What a job is: one prompt with its parameters, their limits, and the id that follows from them.

A job travels as JSON from the producer through Redis to a worker and lies beside its picture in the
bucket. Both sides use this module and nothing else to read and write it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import secrets
import unicodedata
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Self, TypedDict

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from worker.contract.errors import InvalidJobError

#: Version of the message and of the hash below. A change to either is a new number.
FORMAT_VERSION = 1
#: Characters in a prompt, at most.
MAX_PROMPT = 2_000
#: Pixels a side: least, most, and what both must be a multiple of (the VAE's and UNet's factor).
MIN_SIZE, MAX_SIZE, SIZE_STEP = 64, 2_048, 8
#: Denoising steps, at most.
MAX_STEPS = 150
#: Classifier-free guidance, at most (Ho and Salimans, 2022, in diffusers' parametrisation).
MAX_GUIDANCE = 30.0
#: Seeds are 0 to this: what `torch.Generator.manual_seed` takes without wrapping around.
MAX_SEED = 2**63 - 1
#: Bytes of metadata as compact JSON, at most.
MAX_METADATA = 4_096
#: Levels of lists and objects in metadata, at most: the readers of JSON on the way stop at 200.
MAX_METADATA_DEPTH = 64
#: A job's priority: 0 is last, 9 is next.
MAX_PRIORITY, DEFAULT_PRIORITY = 9, 5
#: A model's name, at most this long: a hub id, or the name under which a worker serves a folder or file.
MAX_MODEL = 200
#: The model that a job means when it names none: the fleet's default.
DEFAULT_MODEL = "default"
#: Start of the revision of a job that was submitted before any worker had announced its model.
OPEN_REVISION = "open-"


#: Parameters that the first jobs did not have. At their default they are left out of the id, which so stays
#: what it was.
_LATER_FIELDS = ("guidance_start", "guidance_stop")


class Scheduler(StrEnum):
    """diffusers' noise schedulers that a job can ask for."""

    #: The one in the model's own `scheduler/scheduler_config.json`.
    DEFAULT = "default"
    DDIM = "ddim"
    EULER = "euler"
    EULER_ANCESTRAL = "euler_ancestral"
    DPMPP_2M = "dpmpp_2m"
    DPMPP_2M_KARRAS = "dpmpp_2m_karras"
    PNDM = "pndm"
    UNIPC = "unipc"
    LCM = "lcm"


class ImageFormat(StrEnum):
    """The encodings a picture can be stored in."""

    #: Lossless. The default.
    PNG = "png"
    #: Lossless WebP.
    WEBP = "webp"
    #: Lossy, quality 95, without chroma subsampling.
    JPEG = "jpeg"


class Defaults(BaseModel):
    """What a model uses where a job is silent. A worker announces them with its model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Pixels.
    width: int
    #: Pixels.
    height: int
    #: Denoising steps.
    steps: int
    #: Classifier-free guidance; 1 and below is none.
    guidance_scale: float


class ServedModel(BaseModel):
    """A model as a worker announces it: jobs for it are routed by name and revision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: The name jobs ask for: `SMALLCAT_MODEL` as given for a hub id, else the folder's or file's name.
    name: str
    #: The hub's commit, or a hash over the files. Part of every job's id.
    revision: str
    #: What the model uses where a job is silent.
    defaults: Defaults


def _text(value: str) -> str:
    """Refuse characters that no prompt means: control characters but tab and newline, lone surrogates."""
    return _name(value, allowed="\t\n\r")


def _name(value: str, allowed: str = "") -> str:
    """Refuse control characters: in a name also tab and newline."""
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in allowed:
            raise ValueError(f"holds the control character U+{ord(character):04X}: remove it")
    return value


def _depth(value: object) -> int:
    """Levels of lists and objects in `value`; counted no further than one past the limit."""
    deepest, below = 0, [(value, 1)]
    while below and deepest <= MAX_METADATA_DEPTH:
        each, level = below.pop()
        if isinstance(each, dict | list | tuple):
            deepest = max(deepest, level)
            below += [(inner, level + 1) for inner in (each.values() if isinstance(each, dict) else each)]
    return deepest


def _size(value: int | None) -> int | None:
    """Refuse sizes that the model's downsampling does not divide, naming the two nearest that fit."""
    if value is not None and value % SIZE_STEP:
        below = value - value % SIZE_STEP
        raise ValueError(
            f"is {value}, which is no multiple of {SIZE_STEP}: use {below} or {below + SIZE_STEP}"
        )
    return value


def _choice(value: object) -> object:
    """Let names be given in any case and with blanks or dashes ("DPM++ 2M Karras", "euler a")."""
    if not isinstance(value, str) or isinstance(value, StrEnum):
        return value
    name = value.strip().lower().replace("++", "pp").replace(" ", "_").replace("-", "_")
    name = {"euler_a": "euler_ancestral", "dpmpp_2m_k": "dpmpp_2m_karras", "jpg": "jpeg"}.get(name, name)
    # What is none is shown as it was given.
    return name if name in {*Scheduler, *ImageFormat} else value


Size = Annotated[int, Field(strict=True, ge=MIN_SIZE, le=MAX_SIZE)]


class Job(BaseModel):
    """One prompt with its parameters. Frozen; a job that exists is within its limits.

    A field that is None means the model's own default, which `resolved` fills in. The id is a hash of
    what determines the picture; priority and metadata belong to the submission and are left out of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=False)

    #: What to draw: 1 to 2,000 characters. Beyond the text encoder's window it is cut, as diffusers does.
    prompt: str = Field(min_length=1, max_length=MAX_PROMPT, strict=True)
    #: What to keep out; needs guidance above 1. Up to 2,000 characters.
    negative_prompt: str = Field(default="", max_length=MAX_PROMPT, strict=True)
    #: Seed of the CPU noise generator, 0 to 2^63-1. Not given: drawn at submission.
    seed: int = Field(default_factory=lambda: secrets.randbits(32), ge=0, le=MAX_SEED, strict=True)
    #: Pixels, 64 to 2,048, a multiple of 8.
    width: Size | None = None
    #: Pixels, 64 to 2,048, a multiple of 8.
    height: Size | None = None
    #: Denoising steps, 1 to 150.
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS, strict=True)
    #: Classifier-free guidance, 0 to 30; 1 and below is none and takes half the work.
    guidance_scale: float | None = Field(
        default=None, ge=0, le=MAX_GUIDANCE, strict=True, allow_inf_nan=False
    )
    #: Share of the steps, 0 to 1, from which on guidance is used (Kynkäänniemi et al., 2024).
    guidance_start: float = Field(default=0.0, ge=0, le=1, strict=True, allow_inf_nan=False)
    #: Share of the steps, 0 to 1, from which on it no longer is. Steps without guidance take half the work.
    guidance_stop: float = Field(default=1.0, ge=0, le=1, strict=True, allow_inf_nan=False)
    #: diffusers noise scheduler; `default` is the model's own.
    scheduler: Annotated[Scheduler, BeforeValidator(_choice)] = Scheduler.DEFAULT
    #: The model's name; `default` is the fleet's.
    model: str = Field(default=DEFAULT_MODEL, min_length=1, max_length=MAX_MODEL, strict=True)
    #: The model's revision. Not given: filled in at submission from what the workers announced.
    revision: str = Field(default="", max_length=100, strict=True)
    #: The picture's encoding.
    format: Annotated[ImageFormat, BeforeValidator(_choice)] = ImageFormat.PNG
    #: 0 to 9; jobs of a higher one are rendered first.
    priority: int = Field(default=DEFAULT_PRIORITY, ge=0, le=MAX_PRIORITY, strict=True)
    #: The caller's own JSON object, up to 4 KiB, returned untouched.
    metadata: dict[str, Any] = Field(default_factory=dict)

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _printable(cls, value: str) -> str:
        return _text(value)

    @field_validator("model", "revision")
    @classmethod
    def _one_line(cls, value: str) -> str:
        return _name(value)

    @field_validator("guidance_scale", "guidance_start", "guidance_stop")
    @classmethod
    def _one_zero(cls, value: float | None) -> float | None:
        # -0.0 is the same picture, and so must be the same id.
        return value if value is None else value + 0.0

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is blank: say what to draw")
        return value

    @field_validator("width", "height")
    @classmethod
    def _divisible(cls, value: int | None) -> int | None:
        return _size(value)

    @field_validator("metadata")
    @classmethod
    def _plain_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        if _depth(value) > MAX_METADATA_DEPTH:
            raise ValueError(f"is nested deeper than {MAX_METADATA_DEPTH} levels: keep a reference")
        try:
            text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
            size = len(text.encode())
        except (TypeError, ValueError) as error:
            raise ValueError(f"is not JSON: {_short(str(error))}") from None
        if size > MAX_METADATA:
            raise ValueError(f"is {size:,} bytes of JSON, the limit is {MAX_METADATA:,}: keep a reference")
        # A copy: what the caller changes later is not part of the job.
        return dict(json.loads(text))

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Self:
        """The job that `fields` describe.

        Raises `InvalidJobError` with one sentence for each field that is unknown or outside its limits.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise InvalidJobError(_explain(error)) from None

    def resolved(self, served: ServedModel) -> Self:
        """This job for `served`: what it left open is filled in from the model, its revision is pinned."""
        silent = [name for name in Defaults.model_fields if getattr(self, name) is None]
        filled = {name: getattr(served.defaults, name) for name in silent}
        return self.model_copy(update={**filled, "model": served.name, "revision": served.revision})

    def opened(self) -> Self:
        """This job for a model that nobody has announced yet: an id of its own, whatever revision renders it.

        Without knowing the revision, two submissions cannot be known to mean the same picture.
        """
        return self.model_copy(update={"revision": OPEN_REVISION + secrets.token_hex(8)})

    @property
    def is_open(self) -> bool:
        """Whether the job was submitted before any worker had announced its model."""
        return self.revision.startswith(OPEN_REVISION)

    @property
    def id(self) -> str:
        """32 hexadecimal digits: SHA-256 over all that determines the picture, cut to 128 bits."""
        return hashlib.sha256(hashed(self.model_dump(mode="json")).encode()).hexdigest()[:32]


class JobFields(TypedDict, total=False):
    """The fields of `Job` beside its prompt, as keyword parameters: `**fields: Unpack[JobFields]`.

    None means the model's own default. tests/worker/contract/test_job.py compares names and types with `Job`.
    """

    negative_prompt: str
    seed: int
    width: int | None
    height: int | None
    steps: int | None
    guidance_scale: float | None
    guidance_start: float
    guidance_stop: float
    scheduler: Scheduler | str
    model: str
    revision: str
    format: ImageFormat | str
    priority: int
    metadata: dict[str, Any]


def hashed(fields: Mapping[str, Any]) -> str:
    """The text whose hash is a job's id: of all its fields, as JSON has them, those that make the picture."""
    picture = {name: value for name, value in fields.items() if name not in ("priority", "metadata")}
    for name in _LATER_FIELDS:
        if picture[name] == Job.model_fields[name].default:
            del picture[name]
    return json.dumps([FORMAT_VERSION, picture], sort_keys=True, separators=(",", ":"))


def _explain(error: ValidationError) -> str:
    """pydantic's findings as sentences: the field, its value, the limit and the remedy."""
    sentences = []
    for finding in error.errors(include_url=False):
        field = str(finding["loc"][0]) if finding["loc"] else "job"
        value = finding.get("input")
        match finding["type"]:
            case "extra_forbidden":
                near = difflib.get_close_matches(field, Job.model_fields, 1)
                hint = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(Job.model_fields)}."
                shown = f'"{field}"' if field.isprintable() and len(field) <= 60 else _short(field)
                sentences.append(f"There is no job field {shown}: {hint}")
            case "missing":
                sentences.append(f"{field} is missing: a job needs a prompt.")
            case "value_error":
                sentences.append(f"{field} {str(finding['msg']).removeprefix('Value error, ')}.")
            case "enum":
                kind = Scheduler if field == "scheduler" else ImageFormat
                sentences.append(f"{field} is {_short(value)}: use one of {', '.join(kind)}.")
            case "string_too_short":
                remedy = "say what to draw" if field == "prompt" else "leave it out for the fleet's default"
                sentences.append(f"{field} is empty: {remedy}.")
            case "string_too_long":
                limit = finding["ctx"]["max_length"]
                sentences.append(f"{field} is {len(str(value)):,} characters, the limit is {limit:,}.")
            case _:
                limit = str(finding["msg"]).removeprefix("Input should be ")
                sentences.append(f"{_short(field)[1:-1]} is {_short(value)}: it must be {limit}.")
    return " ".join(sentences)


def _short(value: object) -> str:
    """A value as an error can show it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists without end
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
