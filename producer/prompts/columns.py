"""Headings of a table of prompts: which job field each column means, in any case and by any of its names."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from worker.contract.errors import PromptFileError
from worker.contract.job import JOB_FIELDS

#: Other names for job fields, as tables from elsewhere have them, in lower case with underscores.
ALIASES = {name: field.name for field in JOB_FIELDS.values() for name in field.all_headings}
_INTEGERS = {field.name for field in JOB_FIELDS.values() if field.kind is int}
_NUMBERS = {field.name for field in JOB_FIELDS.values() if field.kind is float}
#: Fields whose text becomes a number.
_NUMERIC = _INTEGERS | _NUMBERS
_INTEGER = re.compile(r"[+-]?\d{1,30}(\.0*)?")
#: Job fields that a heading can name.
_FIELDS = tuple(JOB_FIELDS)


class Headings:
    """What each column of a table means. Columns that mean no job field go to the job's metadata."""

    def __init__(self, names: Sequence[str], file: str, warn: Callable[[str], None]) -> None:
        """`warn` is called with a sentence for each column that may be misspelt.

        Raises `PromptFileError` where no column is the prompt, or two are the same field.
        """
        plain = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in names]
        #: For each column the job field it means, or None.
        self._fields: list[str | None] = [name if name in _FIELDS else None for name in plain]
        for column, name in enumerate(plain):
            field = ALIASES.get(name)
            if field is not None and field not in self._fields:
                self._fields[column] = field
        self._names = [name.strip() for name in names]
        self._refuse(file)
        for name, field in zip(plain, self._fields, strict=True):
            if field is None and (near := difflib.get_close_matches(name, _FIELDS, 1, 0.85)):
                warn(f'{file}: the column "{name}" goes to metadata; did you mean "{near[0]}"?')

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
                fields[field] = typed(field, cell)
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
                fields[field] = int(value)  # A column of integers with gaps is stored as floats.
            elif field in _NUMERIC and isinstance(value, str):
                fields[field] = typed(field, value)
            else:
                fields[field] = value
        if metadata:
            own = fields.get("metadata")
            fields["metadata"] = metadata | own if isinstance(own, dict) else metadata
        return fields

    def _refuse(self, file: str) -> None:
        shown = ", ".join(f'"{name}"' for name in self._names[:20])
        if "prompt" not in self._fields:
            near = difflib.get_close_matches("prompt", [name.lower() for name in self._names], 1)
            hint = f'rename "{near[0]}"' if near else "name one of them"
            raise PromptFileError(f'{file} has no column of prompts among {shown}: {hint} "prompt".')
        for field in _FIELDS:
            if self._fields.count(field) > 1:
                raise PromptFileError(f"{file} has two columns for {field} among {shown}: rename one.")


def typed(field: str, cell: str) -> Any:
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
