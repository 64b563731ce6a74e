"""What a value that is written for a job field means, in any format, option or request. Whatever the format:

- None, NaN, an empty text and the words null, none and nan mean that the field is not given; a NaN for a
  number is refused in options and requests, which have no empty cells (`value_in_call`)
- `20.0` and `"20"` are integers; a number that has lost digits, as 64 bits with a fraction do past 2 to the
  power of 53, is none
- `7,5` is a number where semicolons part the cells; there `1.000` and `1,000` are no integers, since one of
  the two is a thousand
- LoRAs are a text such as `detail=0.8; pixel=1`, or as JSON has them; the word none is a list without any
- `true`, `yes`, `on` and 1 are yes; `false`, `no`, `off` and 0 are no
- a seed of -1 is one that is to be drawn
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any, Final

from producer.prompts.entries import LineError
from producer.prompts.json_values import is_json, json_of
from worker.contract.explain import short
from worker.contract.job import WRITTEN_FIELDS
from worker.contract.job_fields import NESTED, FieldEntry, truth_of

#: For each field with choices these by AUTOMATIC1111's names for them, in lower case.
_CHOICES = {
    field.name: {name.lower(): str(choice) for choice, name in field.a1111_values.items()}
    for field in WRITTEN_FIELDS.values()
}
#: What programs write into a table where a number is missing, and all words that mean that nothing is given.
_MISSING = frozenset(("nan", "<na>"))
_NULLS = frozenset(("null", "none", *_MISSING))
_INTEGER = re.compile(r"[+-]?\d{1,30}(\.0*)?")
_PERHAPS_THOUSANDS = re.compile(r"[+-]?\d{1,3}[.,]000")
#: From here on a number with a fraction may stand for the integer beside it.
INEXACT: Final = 2.0**53
_NUMBER = re.compile(r"[+-]?(\d{1,30}(\.\d{0,40})?|\.\d{1,40})(e[+-]?\d{1,3})?", re.IGNORECASE)
#: A comma in a weight, where it is the mark in numbers: `detail=0,8`.
_COMMA_IN_NUMBER = re.compile(r"(=[ ]?[+-]?\d{0,30}),(?=\d)")


class _NotGiven:
    """The type of `NOT_GIVEN`."""


#: The value of a field that is not given.
NOT_GIVEN: Final = _NotGiven()


def value_of(field: FieldEntry, raw: Any, *, decimal_comma: bool = False) -> Any:
    """The value of a job field, or `NOT_GIVEN`.

    What cannot be of the field's type stays as it is, and the job's own error names it. Raises `LineError`.
    """
    if isinstance(raw, bytes) and field.kind not in NESTED:
        raw = raw.decode("utf-8", "surrogateescape")
    if isinstance(raw, str):
        text = raw.strip()
        if len(text) <= 4 and text.lower() in _NULLS and not _is_empty_list(field, text):
            if field.is_required:
                raise LineError(field.name, f"{field.name} is {text}, which means none: say what to draw.")
            return NOT_GIVEN
        if not text and not field.is_required:
            return NOT_GIVEN
        return _of_text(field, raw if field.is_prompt else text, decimal_comma)
    if raw is None or (isinstance(raw, float | Decimal) and math.isnan(raw)):
        return NOT_GIVEN
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, dict) and not is_json(raw):
        return json_of(raw)
    if isinstance(raw, Decimal):
        raw = int(raw) if raw == raw.to_integral_value() and abs(raw) < 10**30 else float(raw)
    if isinstance(raw, int | float):
        if field.kind is bool and raw in (0, 1):
            return bool(raw)
        if field.kind is int:
            is_exact = isinstance(raw, float) and raw.is_integer() and abs(raw) < INEXACT
            return int(raw) if is_exact else raw
        if field.kind is str:
            return short(raw) if isinstance(raw, int) and abs(raw) > 10**50 else str(raw)
    return raw


def value_in_call(field: FieldEntry, raw: Any) -> Any:
    """The same in an option of the command line or a request, which have no empty cells: NaN stays there."""
    is_missing = isinstance(raw, str) and raw.strip().lower() in _MISSING
    return raw if is_missing and field.kind in (int, float) else value_of(field, raw)


def _is_empty_list(field: FieldEntry, text: str) -> bool:
    """Whether a text says that there is nothing in a list: also where most lines have something."""
    return field.kind is list and text.lower() == "none"


def _of_text(field: FieldEntry, text: str, decimal_comma: bool) -> Any:
    if field.kind is list:
        return _COMMA_IN_NUMBER.sub(r"\1.", text) if decimal_comma else text
    if field.kind is dict:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LineError(field.name, f"{field.name} is not a JSON object ({error}).") from None
    if field.kind is bool:
        return text if (truth := truth_of(text)) is None else truth
    if field.kind in (int, float):
        plain = text.replace(",", ".", 1) if decimal_comma else text
        if decimal_comma and field.kind is int and _PERHAPS_THOUSANDS.fullmatch(text):
            return text
        if field.kind is int and _INTEGER.fullmatch(plain):
            return int(plain.partition(".")[0])
        if field.kind is float and _NUMBER.fullmatch(plain):
            return float(plain)
    return _CHOICES[field.name].get(text.lower(), text) if field.choices else text
