"""Every change of what a job may be is a new version of messages, so that older workers leave it alone.

`formats/N.json` is what a job may be in messages of version N: JSON Schema of `Job`, as pydantic makes it.
`allOf` has what is asked of new jobs alone. Nothing that was in a version is ever taken back: a limit that
became narrower is `NarrowedTo`.
After a change of `Job`: raise `FORMAT_VERSION`, say `since` in the field's `JobField`, put a message into
`messages/`, and write the new file with

    python -m tests.worker.contract.test_format_versions
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from worker.contract import job as job_module
from worker.contract.job import FORMAT_VERSION, JOB_FIELDS, Job, version_needed
from worker.contract.job_parameters import FIRST_MAX_PROMPT
from worker.contract.message import MAX_VERSION, Message, payload_of

FORMATS = Path(__file__).with_name("formats")
#: Fields that came within version 1: a worker of e673185 loses a job with another value than the default.
UNVERSIONED = {"guidance_start", "guidance_stop"}
#: Limits of a schema, and whether a wider one is a smaller number.
LIMITS = {"minimum": True, "maximum": False, "minLength": True, "maxLength": False}
LIMITS |= {"exclusiveMinimum": True, "exclusiveMaximum": False}


def schema() -> dict[str, Any]:
    """What a job may be: limits and choices of each field."""
    found = Job.model_json_schema()
    return {
        name: _without_words(field, found.get("$defs", {})) for name, field in found["properties"].items()
    }


def _without_words(value: Any, named: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_without_words(each, named) for each in value]
    if not isinstance(value, dict):
        return value
    if reference := value.get("$ref"):
        value = value | named[reference.rpartition("/")[2]]
    skipped = ("title", "description", "default", "$ref")
    return {name: _without_words(each, named) for name, each in value.items() if name not in skipped}


def stored(version: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FORMATS / f"{version}.json").read_text())
    return found


def parts(field: dict[str, Any]) -> dict[str, Any]:
    """A field's own schema, whether or not it may be null as well."""
    own = [each for each in field.get("anyOf", [field]) if each.get("type") != "null"]
    return own[0]


def additions(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """Values that `new` has and `old` has not, by field: some of each kind. A field of its own: None."""
    found: dict[str, list[Any]] = {}
    for name, field in new.items():
        if name not in old:
            found[name] = [None]
            continue
        was, now = parts(old[name]), parts(field)
        values = [each for each in now.get("enum", ()) if each not in was.get("enum", ())]
        for limit, is_lower in LIMITS.items():
            if limit in was and (
                limit not in now or (now[limit] < was[limit] if is_lower else now[limit] > was[limit])
            ):
                edge = now.get(limit, was[limit] - 1 if is_lower else was[limit] + 1)
                values.append("x" * edge if "Length" in limit else edge)
        if values:
            found[name] = values
    return found


def test_what_a_job_may_be_is_stored_under_the_version_of_messages() -> None:
    assert schema() == stored(FORMAT_VERSION), __doc__
    assert sorted(int(path.stem) for path in FORMATS.glob("*.json")) == list(range(1, FORMAT_VERSION + 1))


def test_what_came_after_a_version_needs_a_later_one() -> None:
    for version in range(1, FORMAT_VERSION):
        for name, values in additions(stored(version), schema()).items():
            for value in values:
                since = JOB_FIELDS[name].since if value is None else version_needed({name: value})
                assert callable(since) or since > version, f"{name}: since which version has it {value}?"


def test_what_a_version_had_is_read_ever_after() -> None:
    for version in range(1, FORMAT_VERSION + 1):
        assert additions(schema(), stored(version)) == {}, f"of version {version}"


def test_fields_say_since_when_they_are_there() -> None:
    for name, entry in JOB_FIELDS.items():
        if not callable(entry.since):
            assert 1 <= entry.since <= FORMAT_VERSION <= MAX_VERSION
            assert (entry.since == 1) is (entry.is_original or name in UNVERSIONED), name
    # Messages of runs fill in these three without a look at versions (producer/ingest/message_templates.py).
    # Longer prompts go through `Job`.
    assert {JOB_FIELDS[name].since for name in ("seed", "metadata")} == {1}
    assert version_needed({"prompt": "x" * FIRST_MAX_PROMPT}) == 1


def test_additions_are_found_whatever_their_kind() -> None:
    old = {
        "steps": {"anyOf": [{"type": "integer", "maximum": 150, "minimum": 1}, {"type": "null"}]},
        "format": {"type": "string", "enum": ["png"]},
        "prompt": {"type": "string", "maxLength": 3},
    }
    new = {
        "steps": {"anyOf": [{"type": "integer", "maximum": 200, "minimum": 0}, {"type": "null"}]},
        "format": {"type": "string", "enum": ["png", "gif"]},
        "prompt": {"type": "string"},
        "mood": {"type": "string"},
    }
    assert additions(old, new) == {"steps": [0, 200], "format": ["gif"], "prompt": ["xxxx"], "mood": [None]}
    assert additions(new, new) == {}


def test_a_message_says_the_version_that_its_job_needs_and_no_later_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    later = {
        "guidance_start": replace(JOB_FIELDS["guidance_start"], since=2),
        "steps": replace(
            JOB_FIELDS["steps"], since=lambda steps: 3 if steps is not None and steps > 100 else 1
        ),
    }
    monkeypatch.setattr(job_module, "JOB_FIELDS", {**JOB_FIELDS, **later})
    versions = {
        str(fields): payload_of(Job.parse({"prompt": "x", "seed": 1, **fields}))["version"]
        for fields in ({}, {"steps": 100}, {"guidance_start": 0.5}, {"guidance_start": 0.5, "steps": 101})
    }
    assert list(versions.values()) == [1, 1, 2, 3]


def test_a_worker_reads_all_versions_up_to_its_own() -> None:
    job = Job.parse({"prompt": "x", "seed": 1})
    for version in range(1, FORMAT_VERSION + 1):
        assert Message.parse(payload_of(job) | {"version": version}).job == job


if __name__ == "__main__":
    file = FORMATS / f"{FORMAT_VERSION}.json"
    if file.exists() and (taken_back := additions(schema(), stored(FORMAT_VERSION))):
        raise SystemExit(f"Version {FORMAT_VERSION} had more, and it must be read: {taken_back}. {__doc__}")
    file.write_text(json.dumps(schema(), indent=1, sort_keys=True) + "\n")
