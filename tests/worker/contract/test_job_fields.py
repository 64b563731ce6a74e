"""One table of job fields: made-up fields that stand in `Job` alone are found in all that is made from it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import annotated_types
import pytest
from pydantic import BaseModel, Field

from tests.worker.contract.made_up_fields import VALUES, WHOLE
from worker.contract.errors import InvalidJobError
from worker.contract.job import FORMAT_VERSION, JOB_FIELDS, Job
from worker.contract.job_fields import JobField, help_lines, table_of
from worker.contract.message import Message
from worker.contract.record import JobRecord
from worker.contract.served_model import Defaults

ROOT = Path(__file__).parents[3]

#: What a newcomer writes: fields of each type, one with all names, one with none, one of the submission.
IN_JOB = """
    #: How sharp the picture is, 0 to 4.
    sharpness: Annotated[
        float,
        Field(ge=0, le=4, strict=True),
        JobField(since=NEXT, a1111_option="sharpen", diffusers="sharpness_scale", headings=("crispness",)),
    ] = 0.0
    #: Its colours.
    palette: Annotated[
        Palette,
        BeforeValidator(spelled_as(Palette, {})),
        JobField(since=NEXT, a1111_option="colors", a1111_values={"warm": "Warm tones"}),
    ] = Palette.ANY
    #: What it is like: up to 50 characters.
    mood: Annotated[str, Field(max_length=50, strict=True), JobField(since=NEXT)] = ""
    #: What the team says of it: up to 50 characters.
    team_note: Annotated[
        str, Field(max_length=50, strict=True), JobField(since=NEXT, is_submission=True)
    ] = ""
    #: Whether its edges meet.
    seamless: Annotated[bool, Field(strict=True), JobField(since=NEXT, a1111_option="seamlessly")] = False
"""
IN_KEYWORDS = """
    sharpness: float
    palette: Palette | str
    mood: str
    team_note: str
    seamless: bool
"""
CHOICES = """
from enum import StrEnum
class Palette(StrEnum):
    ANY = "any"
    WARM = "warm"


"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What made_up_fields.py finds in a copy of the tree where they stand in job_parameters.py alone."""
    copy = tmp_path_factory.mktemp("tree")
    heavy = shutil.ignore_patterns("*.safetensors", "__pycache__")
    for package in ("worker", "producer", "deploy"):
        shutil.copytree(ROOT / package, copy / package, ignore=heavy)
    (copy / "tests" / "faults").mkdir(parents=True)
    for name in ("docs.py", "test_architecture.py", "faults/earlier.py"):
        shutil.copy(ROOT / "tests" / name, copy / "tests" / name)
    shutil.copy(Path(__file__).with_name("made_up_fields.py"), copy)
    job = copy / "worker" / "contract" / "job_parameters.py"
    text = job.read_text()
    for before, added in (
        ("class JobParameters(BaseModel):", CHOICES),
        ("    #: 0 to 9: jobs of a higher priority", IN_JOB.replace("NEXT", str(FORMAT_VERSION + 1))),
        ("    priority: int\n", IN_KEYWORDS),
    ):
        assert text.count(before) == 1
        text = text.replace(before, added.lstrip("\n") + before)
    job.write_text(text)
    version = job.with_name("job.py")
    version.write_text(
        version.read_text().replace(
            f"FORMAT_VERSION = {FORMAT_VERSION}\n", f"FORMAT_VERSION = {FORMAT_VERSION + 1}\n"
        )
    )
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    ran = subprocess.run(
        [sys.executable, "made_up_fields.py"],
        cwd=copy,
        env=os.environ | keys,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    values: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    assert Path(values["tree"]).samefile(copy)
    return values


HASHED = ("sharpness", "palette", "mood", "seamless")


@pytest.mark.parametrize("file", ["p.csv", "p.tsv", "p.jsonl", "p.parquet"])
def test_a_new_field_is_read_from_every_format_of_prompt_file(found: dict[str, Any], file: str) -> None:
    assert found["prompt_files"][file] == VALUES


def test_a_new_field_is_read_from_a_line_of_automatic1111s_options(found: dict[str, Any]) -> None:
    named = {"sharpness": 2.5, "palette": "warm", "seamless": True}
    assert found["prompt_files"]["p.txt"] == dict.fromkeys(VALUES) | named


def test_yes_and_no_are_read_alike_from_every_format(found: dict[str, Any]) -> None:
    """What is neither stays, and the job's own error names it."""
    meant = {"TRUE": True, "false": False, "1": True, "On": True, "no": False, "": None, "null": None}
    for word, value in (meant | {"maybe": "maybe", "0.0": "0.0"}).items():
        assert found["prompt_files"][word] == [value] * 3, word
    for number, value in enumerate((False, True, 2, False, None)):
        read = found["prompt_files"][f"value {number}"]
        assert json.dumps(read) == json.dumps([value] * 2)


def test_a_new_field_has_its_other_headings(found: dict[str, Any]) -> None:
    assert found["headings"] == ["colors", "crispness", "seamlessly", "sharpen", "sharpness_scale"]


def test_a_new_field_is_an_option_with_its_line_and_its_limits_as_help(found: dict[str, Any]) -> None:
    for command in ("submit", "ingest"):
        text = " ".join(found["command_line"]["help"][command].split())
        assert "--sharpness FLOAT How sharp the picture is, 0 to 4. 0 when not given." in text
        assert "--palette TEXT Its colours. One of any, warm. any when not given." in text
        assert "--seamless BOOLEAN Whether its edges meet. false when not given." in text
        assert "--team-note TEXT What the team says of it: up to 50 characters." in text
    assert found["command_line"]["submitted"] == VALUES
    assert found["command_line"]["flag"] is True
    assert "'maybe' is no boolean" in found["command_line"]["wrong"]
    assert found["command_line"]["checked"].items() >= VALUES.items()


def test_a_new_field_of_the_picture_is_part_of_the_id_unless_it_is_at_its_default(
    found: dict[str, Any],
) -> None:
    ids = found["ids"]
    assert ids[""] == Job.parse(WHOLE).id
    assert len({ids[name] for name in ("", *HASHED)}) == 5
    assert ids["team_note"] == ids["not seamless"] == ids[""]


def test_a_new_field_goes_through_infotext_and_is_left_out_at_its_default(found: dict[str, Any]) -> None:
    there = found["infotexts"]
    assert "Sharpness: 2.5, Palette: Warm tones, Mood: " in there["text"]
    assert "Seamless: True" in there["text"]
    assert "ours" not in there["text"]
    assert there["read"] == VALUES | {"team_note": ""}
    assert not re.search("sharpness|palette|mood|seamless", there["plain"], re.IGNORECASE)


def test_a_new_field_goes_through_a_message_and_the_templates_of_messages(found: dict[str, Any]) -> None:
    assert found["messages"]["same"]
    assert found["messages"]["submission"] == ["team_note"]
    assert {name: found["run"]["job"][name] for name in VALUES} == VALUES
    assert found["run"]["id"][0] == found["run"]["id"][1]


def test_a_worker_that_does_not_know_a_new_field_reads_messages_and_records_where_it_is_at_its_default(
    found: dict[str, Any],
) -> None:
    """This process is that worker: its `Job` has no such field, and refuses unknown ones."""
    there = found["messages"]
    assert Message.parse(there["plain"]).job == Job.parse(WHOLE)
    assert JobRecord.model_validate_json(there["record"]).job == Job.parse(WHOLE)
    assert there["again"]
    assert there["plain"]["job"] == found["run"]["plain"] == Job.parse(WHOLE).model_dump(mode="json")
    with pytest.raises(InvalidJobError):
        Job.parse(found["run"]["job"])


def test_a_new_field_is_appended_to_the_columns_of_a_csv_manifest(found: dict[str, Any]) -> None:
    assert found["run"]["columns"][-5:] == list(VALUES)
    assert {name: found["run"]["csv"][name] for name in VALUES} == {n: str(v) for n, v in VALUES.items()}
    assert {name: found["run"]["jsonl"][name] for name in VALUES} == VALUES


def test_a_new_field_of_the_picture_is_an_axis_of_grids(found: dict[str, Any]) -> None:
    assert set(VALUES) & set(found["run"]["axes"]) == set(HASHED)


def test_a_new_field_can_be_in_the_names_of_downloads(found: dict[str, Any]) -> None:
    assert found["name_of_download"] == ["2.5_warm_calm-still_true.png"]


@pytest.mark.parametrize("manifest", ["m.csv", "m.jsonl"])
def test_a_new_field_is_in_the_gallerys_rows_where_it_is_not_at_its_default(
    found: dict[str, Any], manifest: str
) -> None:
    given, plain = found["run"][manifest]
    assert {name: given[name] for name in HASHED} == {
        "sharpness": "2.5",
        "palette": "warm",
        "mood": VALUES["mood"],
        "seamless": "true",
    }
    assert given["parameters"] == found["infotexts"]["text"]
    assert not set(VALUES) & set(plain)
    assert plain["parameters"] == found["infotexts"]["plain"]


def test_the_gallerys_page_knows_a_new_field(found: dict[str, Any]) -> None:
    fields = {each["name"]: each for each in found["run"]["page_fields"]}
    assert set(VALUES) & set(fields) == set(HASHED)
    plain = {"searched": False, "default": "0", "exact": True}
    assert fields["sharpness"] == {"name": "sharpness", "label": "Sharpness"} | plain
    assert (fields["palette"]["exact"], fields["palette"]["default"]) == (True, "any")
    assert (fields["mood"]["exact"], fields["mood"]["default"]) == (False, "")
    assert (fields["seamless"]["exact"], fields["seamless"]["default"]) == (True, "false")


def test_errors_name_a_new_field_its_limit_and_its_choices(found: dict[str, Any]) -> None:
    assert 'There is no job field "sharpnes": did you mean "sharpness"?' in found["errors"]
    assert "sharpness is 9.0: it must be 0 to 4." in found["errors"]
    assert "palette is 'loud': use one of any, warm." in found["errors"]


def test_a_new_field_is_a_keyword_parameter_and_in_the_documents(found: dict[str, Any]) -> None:
    assert found["keywords"] == list(VALUES)
    tables = found["documents"]
    assert "| `seamless` | boolean | `false` | Whether its edges meet. |" in tables["job-fields"]
    assert "| `sharpness` | number | `0` | How sharp the picture is, 0 to 4. |" in tables["job-fields"]
    names = ["`sharpness`", "`--sharpness`", "`crispness`, `sharpen`, `sharpness_scale`"]
    names += ["`--sharpen`", "`Sharpness`", "`sharpness_scale`"]
    assert f"| {' | '.join(names)} |" in tables["job-field-names"]


# What the table says of the fields there are.


def test_every_limit_of_a_field_is_in_its_line() -> None:
    lines = help_lines(Job)
    assert list(lines) == list(Job.model_fields)
    for name, info in Job.model_fields.items():
        assert lines[name].endswith("."), name
        for limit in info.metadata:
            match limit:
                case annotated_types.Ge(value) | annotated_types.Le(value):
                    shown = "2^63-1" if value == 2**63 - 1 else f"{value:,g}"
                case annotated_types.MinLen(value) | annotated_types.MaxLen(value):
                    shown = f"{value:,}"
                case _:
                    continue
            # An empty name is refused with the remedy.
            assert shown in lines[name] or (name, value) == ("model", 1), (name, value)


def test_a_number_beyond_a_limit_or_no_number_is_refused_with_both_limits() -> None:
    numbers = [each for each in JOB_FIELDS.values() if each.kind in (int, float)]
    assert len(numbers) > 15
    for entry in numbers:
        assert re.fullmatch("([0-9]+|above 0 and up) to [0-9,]+", entry.limits), entry.name
        most = int(entry.limits.split(" to ")[1].replace(",", ""))
        # -1 is a seed: a drawn one.
        for value in (-2, most + 1, "x", [], 10**40):
            with pytest.raises(InvalidJobError) as caught:
                Job.parse({"prompt": "a cat", entry.name: value})
            sentence = str(caught.value)
            assert sentence.startswith(f"{entry.name} is "), sentence
            assert re.search(rf"it must be (a valid \w+, )?{entry.limits}[,.]", sentence), sentence


def test_what_a_model_fills_in_are_the_fields_that_may_be_none() -> None:
    assert list(Defaults.model_fields) == [each.name for each in JOB_FIELDS.values() if each.is_nullable]


def test_the_prompts_are_those_that_an_infotext_has_lines_for() -> None:
    assert [each.name for each in JOB_FIELDS.values() if each.is_prompt] == ["prompt", "negative_prompt"]


def test_no_two_fields_have_the_same_name_anywhere() -> None:
    fields = JOB_FIELDS.values()
    headings = [name for each in fields for name in (each.name, *each.all_headings)]
    keys = [each.infotext for each in fields if not each.pair]
    for names in (headings, [each.a1111_option for each in fields if each.a1111_option], keys):
        assert len(names) == len(set(names))


def test_every_choice_has_one_name_of_its_own_in_an_infotext() -> None:
    for each in JOB_FIELDS.values():
        names = [each.a1111_values.get(choice, choice) for choice in each.choices]
        assert len(names) == len(set(names))
        assert set(each.a1111_values) <= set(each.choices)


def test_a_field_of_a_type_that_nobody_can_read_is_refused() -> None:
    class Odd(BaseModel):
        whens: Annotated[list[int], Field(max_length=3), JobField()] = []

    with pytest.raises(TypeError, match=r"The job field whens has the type .*list.*: use one of int, float"):
        table_of(Odd)


def test_several_lines_over_a_field_are_one_text() -> None:
    assert help_lines(Job)["revision"].endswith("filled in at submission from what the workers announced.")


def test_a_later_field_whose_default_is_made_is_refused() -> None:
    class Odd(BaseModel):
        boxes: Annotated[dict[str, Any], JobField()] = Field(default_factory=dict)

    with pytest.raises(TypeError, match="boxes has a default_factory: give it a plain default"):
        table_of(Odd)
