"""What values of job fields must be, beyond the limits that pydantic knows. Each check gives back the value.

A check raises `ValueError` with the end of a sentence that begins with the field's name.
"""

from __future__ import annotations

import json
import re
import secrets
import unicodedata
from collections.abc import Callable, Container, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pydantic import ValidationInfo

from worker.contract import a1111_syntax
from worker.contract.choices import ALIGN_YOUR_STEPS, ETA, NoiseSchedule, PromptSyntax, Scheduler
from worker.contract.explain import short
from worker.contract.scheduler_names import read_pair

if TYPE_CHECKING:
    from pydantic import ValidationInfo

#: What `printable` and `one_line` take, as a JSON schema's pattern.
PRINTABLE = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]*$"
ONE_LINE = r"^[^\x00-\x1f\x7f-\x9f]*$"


#: Characters of a tenant's name, at most; and what it may be, as a JSON schema's pattern. It is part of keys
#: in the bucket, and of names in Redis.
MAX_TENANT = 40
TENANT = "^[a-z0-9-]*$"


def is_tenant(value: str) -> bool:
    """Whether a text is a tenant's name."""
    return re.fullmatch(f"[a-z0-9-]{{1,{MAX_TENANT}}}", value) is not None


def tenant_name(value: str) -> str:
    """Refuse what is no tenant's name; empty: the job is of no tenant."""
    if value and not is_tenant(value):
        raise ValueError(f"is {short(value)}: use 1 to {MAX_TENANT} lower-case letters, digits and hyphens")
    return value


def printable(value: str) -> str:
    """Refuse characters that no prompt means: control characters but tab and newline, lone surrogates."""
    return one_line(value, allowed="\t\n\r")


def one_line(value: str, allowed: str = "") -> str:
    """Refuse control characters: in a name also tab and newline."""
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in allowed:
            raise ValueError(f"holds the control character U+{ord(character):04X}: remove it")
    return value


#: A character that can be seen: neither white space nor what Unicode 15 lists as ignorable by default
#: (DerivedCoreProperties.txt), such as U+200B.
VISIBLE = re.compile(
    "[^\\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)


def not_blank(value: str) -> str:
    """Refuse a text of white space."""
    if not value.strip():
        raise ValueError(_BLANK)
    return value


def not_invisible(value: str, _: ValidationInfo) -> str:
    """Refuse a text in which nothing can be seen."""
    if not VISIBLE.search(value):
        raise ValueError(_BLANK)
    return value


_BLANK = "is blank: say what to draw"


def since_by_choice(first: Container[str], version: int) -> Callable[[Any], int]:
    """The version of messages that a choice needs, where those of `first` were there before `version`."""
    return lambda value: 1 if value is None or value in first else version


def since_by_length(first: int, version: int) -> Callable[[Any], int]:
    """The version of messages that a text needs whose limit was `first` characters before `version`."""
    return lambda value: version if isinstance(value, str) and len(value) > first else 1


def drawn(value: object) -> object:
    """A random seed for -1, as AUTOMATIC1111 has it."""
    if type(value) is not int or value >= 0:
        return value
    if value == -1:
        return secrets.randbits(32)
    raise ValueError(f"is {short(value)}: it must be 0 to {2**63 - 1:,}, or -1 for a drawn one")


def one_zero(value: float | None) -> float | None:
    """-0.0 is the same picture as 0.0, and so must be the same id."""
    return value if value is None else value + 0.0


def divisible_by(step: int) -> Callable[[int | None], int | None]:
    """Refuse numbers that `step` does not divide, naming the two nearest that fit."""

    def check(value: int | None) -> int | None:
        if value is not None and value % step:
            below = value - value % step
            raise ValueError(f"is {value}, which is no multiple of {step}: use {below} or {below + step}")
        return value

    return check


def readable(value: PromptSyntax, info: ValidationInfo) -> PromptSyntax:
    """Refuse prompts that cannot be read in this syntax, or ask for what is not offered."""
    prompt, negative = info.data.get("prompt"), info.data.get("negative_prompt")
    # A prompt that is wrong by itself has its own error.
    if value is PromptSyntax.A1111 and prompt is not None and negative is not None:
        a1111_syntax.check(prompt, negative, info.data.get("steps"))
    return value


class _Misread(str):
    """A scheduler that could not be read; the text is its error."""


def one_pair(values: object) -> object:
    """Read scheduler and schedule together, of all fields of a job: the name of one may say the other.

    What cannot be read is left to `read_scheduler`, so that the error stands beside those of other fields.
    """
    if not isinstance(values, dict):
        return values
    scheduler, schedule = (values.get(name, "default") for name in ("scheduler", "schedule"))
    if not (isinstance(scheduler, str) and isinstance(schedule, str)):
        return values
    if "schedule" not in values and scheduler in _SCHEDULERS:
        return values
    others = {name: value for name, value in values.items() if name != "schedule"}
    try:
        return others | read_pair(scheduler, schedule).fields()
    except ValueError as error:
        return others | {"scheduler": _Misread(error)}


_SCHEDULERS = frozenset(map(str, Scheduler))


def read_scheduler(value: object) -> object:
    """Refuse a scheduler that `one_pair` could not read."""
    if isinstance(value, _Misread):
        raise ValueError(str(value))
    return value


def taken_as_eta(value: float | None, info: ValidationInfo) -> float | None:
    """Refuse an `eta` that the scheduler does not take. What it is anyway is as if it were not given."""
    scheduler = info.data.get("scheduler")
    # A scheduler that is wrong by itself has its own error.
    if value is None or scheduler is None:
        return value
    if scheduler not in ETA:
        name = "the model's own scheduler" if scheduler is Scheduler.DEFAULT else f'scheduler "{scheduler}"'
        raise ValueError(f"is {value:g}, but it is not for {name}: use {' or '.join(ETA)}, or leave it out")
    return None if value == ETA[scheduler] else value + 0.0


def has_its_steps(value: NoiseSchedule, info: ValidationInfo) -> NoiseSchedule:
    """Refuse numbers of steps that the schedule has no noise levels for."""
    steps = info.data.get("steps")
    if value is NoiseSchedule.ALIGN_YOUR_STEPS and steps not in (None, ALIGN_YOUR_STEPS):
        raise ValueError(
            f'is "{value}", which has {ALIGN_YOUR_STEPS} steps, but steps is {steps}: use {ALIGN_YOUR_STEPS}'
        )
    return value


def spelled_as(choices: type[StrEnum], others: Mapping[str, str]) -> Callable[[object], object]:
    """Take a choice's name in any case, with blanks or dashes ("DPM++ 2M Karras"), or one of `others`."""

    def check(value: object) -> object:
        if not isinstance(value, str) or isinstance(value, StrEnum):
            return value
        name = value.strip().lower().replace("++", "pp").replace(" ", "_").replace("-", "_")
        name = others.get(name, name)
        # What is no choice is shown as it was given.
        return name if name in set(choices) else value

    return check


def small_json(max_bytes: int, max_depth: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Refuse objects that JSON cannot hold, or of more bytes as compact JSON, or nested deeper.

    What is given back is a copy: what the caller changes later is not part of the job.
    """

    def check(value: dict[str, Any]) -> dict[str, Any]:
        if _depth(value, max_depth) > max_depth:
            raise ValueError(f"is nested deeper than {max_depth} levels: keep a reference")
        try:
            text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
            size = len(text.encode())
        except (TypeError, ValueError) as error:
            raise ValueError(f"is not JSON: {short(str(error))}") from None
        if size > max_bytes:
            raise ValueError(f"is {size:,} bytes of JSON, the limit is {max_bytes:,}: keep a reference")
        return dict(json.loads(text))

    return check


def _depth(value: object, most: int) -> int:
    """Levels of lists and objects in `value`; counted no further than one past `most`."""
    deepest, below = 0, [(value, 1)]
    while below and deepest <= most:
        each, level = below.pop()
        if isinstance(each, dict | list | tuple):
            deepest = max(deepest, level)
            below += [(inner, level + 1) for inner in (each.values() if isinstance(each, dict) else each)]
    return deepest


#: AUTOMATIC1111's words for the model's own VAE, in lower case.
NO_VAE = ("automatic", "none")


def named_vae(value: object) -> object:
    """The words for the model's own VAE as none, and AUTOMATIC1111's names of others without a suffix."""
    if not isinstance(value, str):
        return value
    name = value.strip()
    return "" if name.lower() in NO_VAE else name.removesuffix(".safetensors")


#: Files that a job may use beside its model, at most.
MAX_FILES_OF_JOB = 64
_FILE = re.compile(r"[a-z]{1,20}:[^\x00-\x1f\x7f]{1,100}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: Before the names of LoRAs, which are composed in `loras`, too.
_OF_LORAS = "lora:"


def sha256_by_file(value: dict[str, str]) -> dict[str, str]:
    """Refuse what is not the SHA-256 of files, by kind and name, in an order that depends on nothing else."""
    if len(value) > MAX_FILES_OF_JOB:
        raise ValueError(f"has {len(value)} files, the limit is {MAX_FILES_OF_JOB}: use fewer")
    for key, sha256 in value.items():
        if not _FILE.fullmatch(key) or not _SHA256.fullmatch(sha256):
            raise ValueError(
                f"has {short({key: sha256})}: it must be a kind and a name, such as embedding:easynegative, "
                "with 64 hexadecimal digits"
            )
    found = (
        (unicodedata.normalize("NFC", key) if key.startswith(_OF_LORAS) else key, sha256)
        for key, sha256 in value.items()
    )
    return dict(sorted(found))
