"""No line vanishes: whatever a file is made of, each of its lines is a job's, a bad one, or blank."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from producer.prompts.reader import BadEntry, Entry, read
from producer.prompts.rows import MAX_ROW_LINES
from producer.prompts.sources import source


def entries(folder: Path, name: str, data: str | bytes, warnings: list[str] | None = None) -> list[Any]:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    warn = (lambda _: None) if warnings is None else warnings.append
    return list(read(source(str(path)), warn=warn))


#: Pieces of which lines are made.
PIECES = st.sampled_from(
    ["a cat", '"', '""', ",", ";", "\t", " ", "--steps 3", "\u2014steps 3", "#", "x" * 50, "\u200b", "{", "5"]
)
LINES = st.lists(st.lists(PIECES, max_size=5).map("".join), max_size=12)


@settings(max_examples=300, deadline=None)
@given(LINES, st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from(["txt", "csv", "tsv", "jsonl"]))
@example(['a 5" cat', 'a 6" dog', 'a 7" cow', 'a 8" pig', "plain"], "\n", "csv")
@example(['"a', 'b" c', "d"], "\n", "csv")
def test_jobs_and_bad_lines_and_blank_lines_are_all_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: str, form: str
) -> None:
    head = ["prompt"] if form in ("csv", "tsv") else []
    found = entries(tmp_path_factory.getbasetemp(), f"any.{form}", end.join([*head, *lines, ""]))
    numbers = [number for each in found for number in range(each.line, each.line + each.lines)]
    assert len(numbers) == len(set(numbers))
    blank = {"txt": "", "jsonl": ""}.get(form, '",\t' if form == "tsv" else '",')
    for number, line in enumerate(lines, 1 + len(head)):
        is_blank = not line.strip(blank + " \t") or (form == "txt" and line.strip().startswith("#"))
        assert number in numbers or is_blank, (number, line)
    assert set(numbers) <= set(range(1 + len(head), len(lines) + len(head) + 1))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.text('a ",;\n', min_size=1), st.text("b ';\t", max_size=5)).filter(
            lambda row: bool(row[0].strip(' ",;\n'))
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([",", ";", "\t", "|"]),
)
def test_what_pythons_csv_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str
) -> None:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([("prompt", "note"), *rows])
    found = entries(tmp_path_factory.getbasetemp(), "written.csv", file.getvalue())
    notes = [{"metadata": {"note": note}} if note.strip() else {} for _, note in rows]
    expected = [{"prompt": prompt, **note} for (prompt, _), note in zip(rows, notes, strict=True)]
    assert [each.fields for each in found] == expected


def test_a_quote_opens_a_cell_at_its_start_alone(tmp_path: Path) -> None:
    found = entries(tmp_path, "p.csv", 'prompt,steps\na 5" cat,1\na 6" dog,2\n"a ""7"" cow",3\n')
    assert [each.fields["prompt"] for each in found] == ['a 5" cat', 'a 6" dog', 'a "7" cow']


def test_a_quote_that_is_closed_inside_a_cell_is_one_bad_line(tmp_path: Path) -> None:
    bad, dog = entries(tmp_path, "p.csv", 'prompt,steps\n"a cat,1\na "dog",2\n')
    assert isinstance(bad, BadEntry)
    assert (bad.line, "before the cell ends" in bad.reason) == (2, True)
    assert dog == Entry(3, {"prompt": 'a "dog"', "steps": 2})


def test_the_end_of_a_quoted_cell_is_searched_for_in_linear_time(tmp_path: Path) -> None:
    lines = ['"open', *["x"] * (MAX_ROW_LINES - 1)] * 50
    found = entries(tmp_path, "p.csv", "\n".join(["prompt", *lines]))
    assert len(found) == len(lines)
    assert sum(isinstance(each, BadEntry) for each in found) == 50


@pytest.mark.parametrize(
    ("text", "encoding", "says"),
    [
        ("sep=;\r\nprompt;steps;guidance_scale\r\na cat;20;7,5\r\n", "utf-8", ""),
        ('"sep=;"\r\nprompt;steps;guidance_scale\r\na cat;20;7,5\r\n', "utf-8-sig", ""),
        ("prompt;steps;guidance_scale\ra cat;20;7,5\r", "utf-8", "semicolons"),
        ("\r\nprompt\tsteps\tguidance_scale\r\na cat\t20\t7.5\r\n", "utf-16", "tabs"),
        ("prompt|steps|guidance_scale\n|||\na cat|20|7.5||\n | \n", "utf-8", "bars"),
        ("prompt,steps,guidance_scale,note;a\n,,,\n\na cat,20,7.5,,,\n,,\n", "utf-8", ""),
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path: Path, text: str, encoding: str, says: str) -> None:
    said: list[str] = []
    found = [
        each for each in entries(tmp_path, "p.csv", text.encode(encoding), said) if isinstance(each, Entry)
    ]
    assert [each.fields for each in found] == [{"prompt": "a cat", "steps": 20, "guidance_scale": 7.5}]
    assert [says in each for each in said] == [True] * bool(says)
