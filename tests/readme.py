"""Makes the documents' tables of settings and of job fields from the code: `python -m tests.readme`."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from worker.contract import settings
from worker.contract.job import JOB_FIELDS, Job
from worker.contract.job_fields import FieldEntry, help_lines
from worker.contract.settings import ProducerSettings, Settings, WorkerSettings

README = Path(__file__).parent.parent / "README.md"
_BETWEEN = re.compile(r"(<!-- settings:[^\n]*-->\n).*?(<!-- end of settings -->)", re.DOTALL)


def _lines() -> dict[tuple[str, str], str]:
    """The `#:` line over each field, by class and field name."""
    source = Path(settings.__file__).read_text()
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    above = field.lineno - 2
                    found[node.name, field.target.id] = lines[above].strip().removeprefix("#:").strip()
    return found


def _default(value: Any) -> str:
    if value is PydanticUndefined or value is None or value == "":
        return ""
    if isinstance(value, bool):
        return f"`{int(value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def table() -> str:
    """The table in Markdown."""
    rows = ["| Variable | Read by | Default | Meaning |", "|---|---|---|---|"]
    for kind, reader in ((Settings, "both"), (WorkerSettings, "worker"), (ProducerSettings, "producer")):
        for name, field in kind.model_fields.items():
            if (kind.__name__, name) in (lines := _lines()):
                text = lines[kind.__name__, name].replace("|", "\\|")
                rows.append(f"| `{kind.variable(name)}` | {reader} | {_default(field.default)} | {text} |")
    return "\n".join(rows) + "\n"


def job_fields_table() -> str:
    """The table of job fields in Markdown, for docs/job-fields.md. Empty cells: there is no such name."""
    rows = ["| Field | Type | Default | Meaning | Headings in tables | A1111 option | Infotext | diffusers |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    for name, entry in JOB_FIELDS.items():
        cells = [f"`{name}`", _type(entry), _field_default(entry), help_lines(Job)[name].replace("|", "\\|")]
        cells.append(", ".join(f"`{heading}`" for heading in entry.all_headings))
        cells.append(f"`--{entry.a1111_option}`" if entry.a1111_option else "")
        cells.append(f"`{entry.infotext}`" if entry.is_hashed and not entry.is_prompt else "")
        cells.append(f"`{entry.diffusers}`" if entry.diffusers else "")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _type(entry: FieldEntry) -> str:
    if entry.choices:
        return ", ".join(f"`{choice}`" for choice in entry.choices)
    return {int: "integer", float: "number", str: "text", dict: "JSON object"}[entry.kind]


def _field_default(entry: FieldEntry) -> str:
    if entry.is_required:
        return "required"
    if entry.is_nullable:
        return "the model's own"
    if entry.is_filled_by_fleet:
        return "the newest served"
    if entry.is_made:
        return "empty" if entry.kind is dict else "drawn"
    return _default(entry.default) or "empty"


def renewed(text: str) -> str:
    """The README's text with the table as it should be."""
    return _BETWEEN.sub(lambda found: f"{found[1]}{table()}{found[2]}", text)


if __name__ == "__main__":
    README.write_text(renewed(README.read_text()))
