"""The one reading of all formats: which job field a name means, and which value is given to it.

Options in a text line, headings of a table, keys of JSON and columns of Parquet are names; what stands beside
them are values, whose meaning `producer.prompts.values` says. Whatever the format:

- a name is a job field's or one of its aliases, in any case, with or without blanks, dashes and underscores
- other names go to the job's metadata, but for a near miss of a field's name, which is refused
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, Final

from producer.prompts.entries import LineError
from producer.prompts.json_values import is_json, json_of
from producer.prompts.pasted import refuse_parameters
from producer.prompts.values import NOT_GIVEN, value_of
from worker.contract.errors import InvalidJobError
from worker.contract.explain import short
from worker.contract.job import WRITTEN_FIELDS
from worker.contract.job_fields import FieldEntry
from worker.contract.scheduler_names import pair_of
from worker.contract.spelling import distance

#: What `meaning_of` gives for a number of pictures, for a schedule beside a sampler, and for both sides.
COUNT: Final = "a number of pictures"
SCHEDULE: Final = "schedule"
SIZE: Final = "a size"
#: Names that ask for several pictures: their product is the number of pictures.
_COUNTS = ("batch_size", "n_iter", "num_images_per_prompt")
#: Names whose values are sizes where they look like one, such as 512x768. Else they mean anything.
_SIZES = ("size", "image_size", "resolution", "dimensions")
_SIZE = re.compile(r"\s*(\d{1,5})\s*[xX×*]\s*(\d{1,5})\s*")
#: Names that mean the sampler alone: beside one of them a `scheduler` is the schedule, as in ComfyUI.
_SAMPLERS = frozenset(("sampler", "samplername"))
#: Names of other programs that change a picture there and mean nothing here.
_MEANINGLESS = (
    *("outpath_samples", "outpath_grids", "prompt_for_display", "styles", "subseed_strength", "subseed"),
    *("seed_resize_from_h", "seed_resize_from_w", "sampler_index", "restore_faces", "tiling"),
    *("do_not_save_samples", "do_not_save_grid"),
    *("enable_hr", "hr_scale", "hr_upscaler", "hires", "hires_fix", "refiner"),
    *("webhook", "aspect_ratio", "checkpoint", "ckpt_name", "sd_model_checkpoint", "model_hash"),
)
#: Pictures that one line can ask for, at most.
_MAX_COUNT = 10_000
#: Values and names that are kept, and characters of a value that is, at most.
_MAX_KNOWN, _LONGEST_KNOWN = 4_096, 40
#: A name is no longer than this; more is looked up nowhere.
_LONGEST_NAME = 100


def _plain(name: str) -> str:
    """A name without what does not count in it."""
    # Also without what is not seen, and with wide letters as plain ones: spreadsheets have both.
    plain = name if name.isascii() else unicodedata.normalize("NFKC", name)
    return re.sub("[\\s_\u00ad\u200b-\u200f\u2060\ufeff-]+", "", plain.casefold())


#: What each name means, without what does not count in it: a job field, `COUNT` or `SCHEDULE`.
MEANINGS: dict[str, str] = {
    **{_plain(each): COUNT for each in _COUNTS},
    **{_plain(each): SIZE for each in _SIZES},
    **{_plain(each): field.name for field in WRITTEN_FIELDS.values() for each in field.all_headings},
    **{_plain(name): name for name in WRITTEN_FIELDS},
}
#: The names that were looked up, and what each means.
_NEW: Final = "not looked up"
_KNOWN_NAMES: dict[str, str | None] = {}
_PLAIN_MEANINGLESS = frozenset(map(_plain, _MEANINGLESS))
#: Names that another one may be a misspelling of. Short aliases are near to too many words.
_SPELLINGS = {
    _plain(name): name
    for field in WRITTEN_FIELDS.values()
    for name in (*field.all_headings, field.name)
    if len(name) > 4 or name == field.name
}


def meaning_of(name: str) -> str | None:
    """The job field that a name means, `COUNT` or `SCHEDULE`; None for all other names."""
    meaning = _KNOWN_NAMES.get(name, _NEW)
    if meaning is _NEW:
        if len(name) > _LONGEST_NAME:
            return None
        if len(_KNOWN_NAMES) >= _MAX_KNOWN:
            _KNOWN_NAMES.clear()
        meaning = _KNOWN_NAMES[name] = MEANINGS.get(_plain(name))
    return meaning


def is_meaningless(name: str) -> bool:
    """Whether another program draws another picture for it, and this one does not know it."""
    return len(name) <= _LONGEST_NAME and _plain(name) in _PLAIN_MEANINGLESS


def near_miss(name: str) -> str | None:
    """The name that `name`, which means nothing, may be a misspelling of; None where it is none.

    That is one letter more, less, other or exchanged with its neighbour; two in names of eight and more.
    """
    return _near_miss(name) if len(name) <= _LONGEST_NAME else None


@functools.lru_cache(4_096)
def _near_miss(name: str) -> str | None:
    plain = _plain(name)
    if not plain or plain in _PLAIN_MEANINGLESS:
        return None
    found = [
        (near, spelled)
        for spelling, spelled in _SPELLINGS.items()
        if spelling[0] == plain[0] and (near := distance(plain, spelling)) <= 1 + (len(spelling) >= 8)
    ]
    return min(found)[1] if found else None


class FieldReader:
    """Reads the names and values of one file's lines."""

    def __init__(
        self,
        file: str,
        warn: Callable[[str], None],
        *,
        extra: bool = False,
        decimal_comma: bool = False,
        is_json: bool = False,
    ) -> None:
        """With `extra`, near misses of names go to metadata too. With `is_json`, all values are of JSON.

        `warn` is called with one sentence for each name that has no meaning here.
        """
        self._file, self._warn, self._extra = file, warn, extra
        self._decimal_comma, self._is_json = decimal_comma, is_json
        self._warned: set[str] = set()
        #: The names that were met outside the job fields, and what each may be a misspelling of.
        self._extras: dict[str, str | None] = {}
        #: Values of fields that were read, by the field and the text: most columns repeat a few.
        self._known: dict[tuple[str, str], Any] = {}

    def read(self, line: int, pairs: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], int]:
        """The job fields of a line, and the number of pictures it asks for. Raises `LineError`."""
        fields: dict[str, Any] = {}
        metadata: dict[str, Any] = {}
        names: dict[str, str] = {}
        choice: dict[str, Any] = {}
        images = 1
        for name, raw in pairs:
            meaning = meaning_of(name)
            if meaning is None:
                if (value := self._extra_value(line, name, raw)) is not NOT_GIVEN:
                    metadata[name.strip()] = value
            elif meaning == COUNT:
                images *= _count(name, raw)
            elif meaning == SIZE:
                if sides := sides_of(raw):
                    _take_sides(name, sides, names, fields)
                elif (value := self._extra_value(line, name, raw)) is not NOT_GIVEN:
                    metadata[name.strip()] = value
            elif meaning == SCHEDULE:
                if (value := value_of(WRITTEN_FIELDS[SCHEDULE], raw)) is not NOT_GIVEN:
                    choice[SCHEDULE] = value
            else:
                value = self._value(meaning, raw)
                if value is NOT_GIVEN:
                    continue
                if meaning == "scheduler":
                    _take_choice(choice, name, value)
                elif meaning in names:
                    _take_again(WRITTEN_FIELDS[meaning], (names[meaning], name), value, fields, metadata)
                else:
                    names[meaning], fields[meaning] = name, value
        refuse_parameters(fields.get("prompt"))
        if choice:
            fields |= _pair(choice)
        if metadata:
            own = fields.get("metadata", {})
            # What is no object stays, and the job's own error names it.
            fields["metadata"] = metadata | own if isinstance(own, dict) else own
        return fields, images

    def _value(self, name: str, raw: Any) -> Any:
        """The value of a job field, as `value_of` reads it."""
        if type(raw) is not str or len(raw) > _LONGEST_KNOWN or name in ("prompt", "metadata"):
            return value_of(WRITTEN_FIELDS[name], raw, decimal_comma=self._decimal_comma)
        key = name, raw
        value = self._known.get(key)
        if value is None:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            value = value_of(WRITTEN_FIELDS[name], raw, decimal_comma=self._decimal_comma)
            self._known[key] = value
        return value

    def _extra_value(self, line: int, name: str, raw: Any) -> Any:
        """The value that a name outside the job fields has in metadata, or `NOT_GIVEN`."""
        if name not in self._extras:
            self._meet(line, name)
        if not self._extra and (near := self._extras.get(name)):
            raise LineError(meaning_of(near) or "", misspelt(name[:60], near))
        if raw is None or (isinstance(raw, float) and math.isnan(raw)):
            return NOT_GIVEN
        if isinstance(raw, str) and not raw.strip():
            return NOT_GIVEN
        if isinstance(raw, dict):
            self._look_into(line, name, raw)
        return raw if self._is_json or isinstance(raw, str) or is_json(raw) else json_of(raw)

    def _meet(self, line: int, name: str) -> None:
        """Look at a name outside the job fields for the first time."""
        if len(self._extras) >= _MAX_KNOWN:
            self._extras.clear()
        self._extras[name[:_LONGEST_NAME]] = near_miss(name)
        if is_meaningless(name) and name not in self._warned:
            self._warned.add(name)
            self._warn(f'{self._file}, line {line}: "{name}" has no meaning here: it goes to metadata.')

    def _look_into(self, line: int, name: str, value: dict[Any, Any]) -> None:
        """Warn of job fields in an object that goes to metadata, where they have no effect."""
        names = (key for key in value if isinstance(key, str) and meaning_of(key) in WRITTEN_FIELDS)
        inner = next(names, None)
        if inner is not None and name not in self._warned:
            self._warned.add(name)
            self._warn(
                f'{self._file}, line {line}: "{name}" goes to metadata, and so "{inner}" in it has no '
                "effect: write it beside the prompt."
            )


def misspelt(name: str, near: str) -> str:
    """The sentence for a name that is nearly another one."""
    return f'There is no job field "{name}": did you mean "{near}"? With --extra it goes to metadata.'


def _count(name: str, raw: Any) -> int:
    value = value_of(WRITTEN_FIELDS["steps"], raw)
    if value is NOT_GIVEN:
        return 1
    if type(value) is not int or not 1 <= value <= _MAX_COUNT:
        raise LineError("", f"{name} is {short(value)}: it must be 1 to {_MAX_COUNT:,}.")
    return value


def _take_choice(choice: dict[str, Any], name: str, value: Any) -> None:
    key = "sampler" if _plain(name) in _SAMPLERS else "scheduler"
    if choice.setdefault(key, value) != value:
        raise LineError(
            "scheduler", f"scheduler is {short(choice[key])} and {short(value)}: keep one of them."
        )


def _take_again(
    field: FieldEntry, names: tuple[str, str], value: Any, fields: dict[str, Any], metadata: dict[str, Any]
) -> None:
    """Take a second value of a field. A file may have texts beside its prompts, and several LoRAs by one name
    (`--lora a --lora b`); all else must be the same.
    """
    first, second = names
    if field.is_prompt and _plain(first) != _plain(second):
        if _plain(second) == _plain(field.name):
            first, second = second, first
            value, fields[field.name] = fields[field.name], value
        metadata[second.strip()] = value
    elif field.kind is list and _plain(first) == _plain(second):
        known = fields[field.name]
        fields[field.name] = [*(known if isinstance(known, list) else [known]), value]
    elif field.is_prompt or fields[field.name] != value:
        raise _two_values(field, names, fields[field.name], value)


def _two_values(field: FieldEntry, names: tuple[str, str], kept: Any, value: Any) -> LineError:
    first, second = names
    reason = f'"{first}" is {short(kept)} and "{second}" is {short(value)}: both mean {field.name}, keep one.'
    return LineError(field.name, reason)


def _take_sides(name: str, sides: tuple[int, int], names: dict[str, str], fields: dict[str, Any]) -> None:
    for side, length in zip(("width", "height"), sides, strict=True):
        if fields.setdefault(side, length) != length:
            raise _two_values(WRITTEN_FIELDS[side], (names[side], name), fields[side], length)
        names.setdefault(side, name)


def sides_of(raw: Any) -> tuple[int, int] | None:
    """Width and height in a value such as `512x768`; None where it looks otherwise."""
    found = _SIZE.fullmatch(raw) if isinstance(raw, str) and len(raw) < 40 else None
    return (int(found[1]), int(found[2])) if found else None


def _pair(choice: dict[str, Any]) -> dict[str, Any]:
    """What the names of a sampler, a scheduler and a schedule mean together."""
    sampler, scheduler, schedule = (choice.get(name) for name in ("sampler", "scheduler", "schedule"))
    if sampler is None or (scheduler is not None and schedule is not None):
        sampler, scheduler = (scheduler, None) if sampler is None else (sampler, scheduler)
    if scheduler is not None and schedule is not None and scheduler != schedule:
        shown = f"{short(scheduler)} and {short(schedule)}"
        raise LineError("scheduler", f"The schedule is {shown} beside a sampler: keep one of them.")
    schedule = scheduler if schedule is None else schedule
    if schedule is None or not all(each is None or isinstance(each, str) for each in (sampler, schedule)):
        return {"scheduler": sampler}  # The job's own check reads the name, and says what is wrong with it.
    try:
        return {name: str(value) for name, value in pair_of(sampler, schedule).fields().items()}
    except InvalidJobError as error:
        raise LineError("scheduler", str(error)) from None
