"""Names and values of prompt files as the first version read them, and which jobs it took.

It changes no more: see `producer.prompts.reader_v1`. A field, a scheduler or a format that came later is as
unknown here as it was then.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from worker.contract.choices import PromptSyntax
from worker.contract.errors import InvalidJobError, PromptFileError
from worker.contract.explain import short
from worker.contract.job import Job
from worker.contract.job_parameters import FIRST_MAX_PROMPT

_INTEGERS = ("seed", "width", "height", "steps", "priority")
_NUMBERS = ("guidance_scale", "guidance_start", "guidance_stop")
#: The job fields that there were.
_FIELDS = (
    *("prompt", "negative_prompt", "seed", "width", "height", "steps", *_NUMBERS),
    *("scheduler", "model", "revision", "format", "priority", "metadata"),
)
#: Other headings of columns, in lower case with underscores.
_ALIASES = {
    **dict.fromkeys(("text", "caption", "prompts", "positive_prompt", "positive"), "prompt"),
    **dict.fromkeys(("negative", "negativeprompt", "neg_prompt"), "negative_prompt"),
    **dict.fromkeys(("num_inference_steps", "inference_steps", "sampling_steps"), "steps"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance"), "guidance_scale"),
    **dict.fromkeys(("sampler", "sampler_name"), "scheduler"),
    **dict.fromkeys(("sd_model", "model_name"), "model"),
    "w": "width",
    "h": "height",
    "random_seed": "seed",
}
#: Options of a line that mean a job field: the field, and what its text becomes.
_OPTIONS: dict[str, tuple[str, type]] = {
    **{name: (name, str) for name in ("prompt", "negative_prompt")},
    **{name: (name, int) for name in ("seed", "steps", "width", "height")},
    "cfg_scale": ("guidance_scale", float),
    "sampler_name": ("scheduler", str),
    "sd_model": ("model", str),
}
#: Options that ask for several pictures: their product is the number of pictures.
_COUNTS = ("batch_size", "n_iter")
#: Options that were left out.
_MEANINGLESS = (
    *("outpath_samples", "outpath_grids", "prompt_for_display", "styles", "subseed_strength", "subseed"),
    *("seed_resize_from_h", "seed_resize_from_w", "sampler_index", "restore_faces", "tiling"),
    *("do_not_save_samples", "do_not_save_grid"),
)
#: AUTOMATIC1111's names for schedulers, in lower case, where options have them.
_SAMPLERS = {
    "default": "default",
    "ddim": "ddim",
    "euler": "euler",
    "euler a": "euler_ancestral",
    "dpm++ 2m": "dpmpp_2m",
    "dpm++ 2m karras": "dpmpp_2m_karras",
    "plms": "pndm",
    "unipc": "unipc",
    "lcm": "lcm",
}
#: The choices that there were, and other spellings of them.
_CHOICES = {
    "scheduler": tuple(_SAMPLERS.values()),
    "format": ("png", "webp", "jpeg"),
}
_SPELLINGS = {"euler_a": "euler_ancestral", "dpmpp_2m_k": "dpmpp_2m_karras", "jpg": "jpeg"}
_INTEGER = re.compile(r"[+-]?\d{1,30}(\.0*)?")


def job_of(fields: Mapping[str, Any]) -> Job:
    """The job of these fields. Raises `InvalidJobError` for what was no job then."""
    values, wrong = dict(fields), []
    for name in fields:
        if name not in _FIELDS and name in Job.model_fields:
            wrong.append(f'There is no job field "{name}": known are {", ".join(_FIELDS)}.')
            del values[name]
    if values.get("seed") == -1 and type(values["seed"]) is int:
        wrong.append("seed is -1: it must be greater than or equal to 0.")
        del values["seed"]
    for name in ("prompt", "negative_prompt"):
        if isinstance(text := values.get(name), str) and len(text) > FIRST_MAX_PROMPT:
            wrong.append(f"{name} is {len(text):,} characters, the limit is {FIRST_MAX_PROMPT:,}.")
            values[name] = "x"
    for name, choices in _CHOICES.items():
        if isinstance(value := values.get(name), str):
            plain = value.strip().lower().replace("++", "pp").replace(" ", "_").replace("-", "_")
            values[name] = _SPELLINGS.get(plain, plain)
            if values[name] not in choices:
                wrong.append(f"{name} is {short(value)}: use one of {', '.join(choices)}.")
                del values[name]
    # Said, so that the fleet's default is not taken.
    values["prompt_syntax"] = PromptSyntax.PLAIN
    try:
        job = Job.parse(values, is_new=False)
    except InvalidJobError as error:
        raise InvalidJobError(" ".join([str(error), *wrong])) from None
    if wrong:
        raise InvalidJobError(" ".join(wrong))
    return job


def grid_of(words: Sequence[str]) -> dict[str, list[Any]]:
    """The axes of a grid from words such as `steps=20,30`."""
    grid: dict[str, list[Any]] = {}
    for word in words:
        axis, _, text = word.partition("=")
        axis = axis.strip().replace("-", "_")
        values = next(csv.reader([text], skipinitialspace=True), [])
        grid[axis] = [_typed(axis, value) for value in values if value.strip()]
    return grid


class Headings:
    """What each column of a table means. Columns that mean no job field go to the job's metadata."""

    def __init__(self, names: Sequence[str], file: str) -> None:
        """Raises `PromptFileError` where no column is the prompt, or two are the same field."""
        plain = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in names]
        #: For each column the job field it means, or None.
        self._fields: list[str | None] = [name if name in _FIELDS else None for name in plain]
        for column, name in enumerate(plain):
            field = _ALIASES.get(name)
            if field is not None and field not in self._fields:
                self._fields[column] = field
        self._names = [name.strip() for name in names]
        shown = ", ".join(f'"{name}"' for name in self._names[:20])
        if "prompt" not in self._fields:
            raise PromptFileError(f"{file} has no column of prompts among {shown}.")
        for field in _FIELDS:
            if self._fields.count(field) > 1:
                raise PromptFileError(f"{file} has two columns for {field} among {shown}: rename one.")

    def fields_of_text(self, cells: Sequence[str]) -> dict[str, Any]:
        """The job fields of a row of texts, without empty cells. Raises `ValueError` for bad metadata."""
        fields: dict[str, Any] = {}
        metadata: dict[str, Any] = {}
        for name, field, cell in zip(self._names, self._fields, cells, strict=False):
            if field == "prompt":
                fields["prompt"] = cell
            elif not cell.strip():
                continue
            elif field is None:
                metadata[name] = cell
            elif field == "metadata":
                try:
                    metadata |= json.loads(cell)
                except (ValueError, TypeError, RecursionError) as error:
                    raise ValueError(f"metadata is not a JSON object ({error}).") from None
            else:
                fields[field] = _typed(field, cell)
        if metadata:
            fields["metadata"] = metadata
        return fields

    def fields_of_values(self, values: Sequence[Any]) -> dict[str, Any]:
        """The job fields of a row of values, without those that are None."""
        fields: dict[str, Any] = {}
        metadata: dict[str, Any] = {}
        for name, field, value in zip(self._names, self._fields, values, strict=True):
            if value is None:
                continue
            if field is None:
                metadata[name] = value if _is_json(value) else str(value)
            elif field in _INTEGERS and isinstance(value, float) and value.is_integer():
                fields[field] = int(value)
            elif field in (*_INTEGERS, *_NUMBERS) and isinstance(value, str):
                fields[field] = _typed(field, value)
            else:
                fields[field] = value
        if metadata:
            own = fields.get("metadata")
            fields["metadata"] = metadata | own if isinstance(own, dict) else metadata
        return fields


def options_of(line: str) -> tuple[dict[str, Any], int]:
    """The job fields of a line of options, and the number of pictures it asks for. Raises `ValueError`."""
    words = shlex.split(line)
    fields: dict[str, Any] = {}
    images = 1
    while words:
        word = words.pop(0)
        name = word.removeprefix("--")
        if name == word:
            raise ValueError(f'"{word}" stands where an option should: put quotes around texts.')
        if name not in _OPTIONS and name not in _COUNTS and name not in _MEANINGLESS:
            raise ValueError(f"there is no option --{name}: known are {', '.join(_OPTIONS)}.")
        if not words:
            raise ValueError(f"--{name} is the last word: give it a value.")
        value = words.pop(0)
        if name in ("prompt", "negative_prompt"):
            while words and not words[0].startswith("--"):
                value += " " + words.pop(0)
        if name in _MEANINGLESS:
            continue
        field, kind = _OPTIONS.get(name, (name, int))
        try:
            typed = kind(value)
        except ValueError:
            raise ValueError(f'--{name} is "{value}": it must be a number.') from None
        if name in _COUNTS:
            if not 1 <= typed <= 10_000:
                raise ValueError(f"--{name} is {typed}: it must be 1 to 10,000.")
            images *= typed
        elif name == "sampler_name":
            fields[field] = _SAMPLERS.get(value.lower(), value)
        elif name != "seed" or typed != -1:
            fields[field] = typed
    return fields, images


def _typed(field: str, cell: str) -> Any:
    """A cell as its field's type; where it is not of that type, a text, which the job's own error names."""
    cell = cell.strip()
    if field in _INTEGERS and _INTEGER.fullmatch(cell):
        return int(cell.partition(".")[0])
    if field in _NUMBERS:
        try:
            return float(cell)
        except ValueError:
            return cell
    return cell


def _is_json(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_json(each) for name, each in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return isinstance(value, str | int | float | bool)
