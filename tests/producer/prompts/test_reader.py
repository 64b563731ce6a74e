from __future__ import annotations

import codecs
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.prompts import lines
from producer.prompts.reader import BadEntry, Entry, read
from producer.prompts.sources import source
from worker.contract.errors import PromptFileError


def entries(path: Path, form: str | None = None, skip: int = 0) -> list[Entry | BadEntry]:
    return list(read(source(str(path), form), skip))


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def warned(path: Path) -> list[str]:
    warnings: list[str] = []
    list(read(source(str(path)), warn=warnings.append))
    return warnings


# Text: encodings and lines.


def test_a_text_file_is_a_prompt_a_line_without_blanks_and_comments(tmp_path: Path) -> None:
    path = written(tmp_path, "p.txt", "a cat\n\n  # said nobody\n \t \n  a dog  \nlast without an end")
    assert entries(path) == [
        Entry(1, {"prompt": "a cat"}),
        Entry(5, {"prompt": "a dog"}),
        Entry(6, {"prompt": "last without an end"}),
    ]


@pytest.mark.parametrize(
    "encoded",
    [
        "eine Möwe\r\n猫\r\n".encode(),
        codecs.BOM_UTF8 + "eine Möwe\n猫\n".encode(),
        "eine Möwe\n猫\n".encode("utf-16"),
        codecs.BOM_UTF16_BE + "eine Möwe\r\n猫".encode("utf-16-be"),
    ],
)
def test_encodings_and_line_ends_are_recognised(tmp_path: Path, encoded: bytes) -> None:
    path = written(tmp_path, "p.txt", encoded)
    assert entries(path) == [Entry(1, {"prompt": "eine Möwe"}), Entry(2, {"prompt": "猫"})]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\r\n#-", exclude_categories=["Cs", "Z", "C"]))))
def test_every_text_comes_back_from_every_encoding(texts: list[str]) -> None:
    expected = [(number, text) for number, text in enumerate(texts, 1)]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        data = "".join(f"{text}\n" for text in texts).encode(encoding)
        assert list(lines.lines_of("x", io.BytesIO(data))) == expected


def test_a_bad_byte_is_an_error_with_its_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path, "p.txt", b"good\nbad \xff byte\nalso good\n")
    first, bad, last = entries(path)
    assert (first, last) == (Entry(1, {"prompt": "good"}), Entry(3, {"prompt": "also good"}))
    assert isinstance(bad, BadEntry)
    assert bad.line == 2
    assert "0xff" in bad.reason
    assert "UTF-8" in bad.reason


def test_a_line_without_end_is_refused_without_being_held_in_memory(tmp_path: Path) -> None:
    path = written(tmp_path, "p.txt", b"first\n" + b"x" * (5 * lines.MAX_LINE) + b"\nlast\n")
    first, bad, last = entries(path)
    assert isinstance(bad, BadEntry)
    assert "longer" in bad.reason
    assert (first, last) == (Entry(1, {"prompt": "first"}), Entry(3, {"prompt": "last"}))


@pytest.mark.parametrize("data", ["cat\n".encode("utf-32"), "a cat\n".encode("utf-16-le"), b"\0\1\0\3"])
def test_what_is_no_text_is_refused_as_a_whole(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(PromptFileError, match="UTF-8"):
        entries(written(tmp_path, "p.txt", data))


def test_utf16_that_ends_in_the_middle_of_a_character_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "p.txt", "a cat\na dog\n".encode("utf-16") + b"x")
    assert entries(path)[0] == Entry(1, {"prompt": "a cat"})
    assert isinstance(entries(path)[-1], BadEntry)


# Options in a line.


def test_a_line_can_carry_options_as_automatic1111_reads_them(tmp_path: Path) -> None:
    line = (
        '--prompt "a small cat" --negative_prompt blurry and dark --steps 30 --seed 7 --width 512 '
        '--cfg_scale 7 --sampler_name "Euler a" --n_iter 2 --batch_size 3 --restore_faces true'
    )
    path = written(tmp_path, "p.txt", f"{line}\n{line}\nplain -- no--options --3 steps\n")
    fields = {"prompt": "a small cat", "negative_prompt": "blurry and dark", "steps": 30, "seed": 7}
    fields |= {"width": 512, "guidance_scale": 7.0, "scheduler": "euler_ancestral"}
    fields["metadata"] = {"restore_faces": "true"}
    assert entries(path)[:2] == [Entry(1, fields, 6), Entry(2, fields, 6)]
    assert entries(path)[2] == Entry(3, {"prompt": "plain -- no--options --3 steps"})
    assert warned(path) == [f'{path}, line 1: "restore_faces" has no meaning here: it goes to metadata.']


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("--promt cat", 'did you mean "prompt"'),
        ("a red apple --stpes 10", 'did you mean "steps"'),
        ("a red apple --ar 16:9", "no option --ar"),
        ("a red apple --steps", "value"),
        ("a red apple --negative_prompt --steps 3", "value"),
        ("a red apple --prompt again", "keep one"),
        ("a red apple --steps 3 --steps 4", "keep one"),
        ('a sign "go --steps 10"', "quot"),
        ("none", "means none"),
        ("--prompt x " + "--steps 3 " * 100_000, "limit"),
        ('--prompt "' + '\\"' * 30_000, "quot"),
        ("--steps", "value"),
        ('--prompt "cat', "quot"),
        ("--steps 3 stray", "stray"),
        ("--n_iter 0", "1 to"),
    ],
)
def test_options_that_cannot_be_read_are_an_error_with_its_line(tmp_path: Path, line: str, part: str) -> None:
    [bad] = entries(written(tmp_path, "p.txt", line))
    assert isinstance(bad, BadEntry)
    assert part in bad.reason.lower() or part in bad.reason


# Tables.


def test_headings_are_known_whatever_their_case_and_others_go_to_metadata(tmp_path: Path) -> None:
    text = "Prompt,Negative Prompt,STEPS,CFG Scale,seed,Customer\ncat,dog,30,7.5,5,ann\nbird,,,,,\n"
    path = written(tmp_path, "p.csv", text)
    first = {"prompt": "cat", "negative_prompt": "dog", "steps": 30, "guidance_scale": 7.5, "seed": 5}
    assert entries(path) == [
        Entry(2, first | {"metadata": {"Customer": "ann"}}),
        Entry(3, {"prompt": "bird"}),
    ]


def test_a_cell_can_hold_commas_quotes_and_lines(tmp_path: Path) -> None:
    text = 'prompt,seed\r\n"a ""small"", red\ncat",1\r\na dog,2\r\n'
    assert entries(written(tmp_path, "p.csv", text)) == [
        Entry(2, {"prompt": 'a "small", red\ncat', "seed": 1}),
        Entry(4, {"prompt": "a dog", "seed": 2}),
    ]


def test_an_open_quote_is_one_bad_line(tmp_path: Path) -> None:
    path = written(tmp_path, "p.csv", 'prompt,seed\n"a cat,1\na dog,2\n"a ""bird""",3\n')
    bad, dog, bird = entries(path)
    assert isinstance(bad, BadEntry)
    assert bad.line == 2
    assert "quote" in bad.reason
    assert dog == Entry(3, {"prompt": "a dog", "seed": 2})
    assert bird == Entry(4, {"prompt": 'a "bird"', "seed": 3})


@pytest.mark.parametrize(
    ("row", "part"), [("a,b,c", "3 cells"), ('"a"b,1', "CSV"), ("\udcffa,1", "0xff"), ("cat,{}", "seed")]
)
def test_a_bad_row_is_a_bad_line(tmp_path: Path, row: str, part: str) -> None:
    data = f"prompt,seed\n{row}\ngood,1\n".encode("utf-8", "surrogateescape")
    first, good = entries(written(tmp_path, "p.csv", data))
    assert good == Entry(3, {"prompt": "good", "seed": 1})
    if isinstance(first, BadEntry):
        assert part in first.reason
    else:
        assert first.fields["seed"] == "{}"  # Left for the job's own error to name.


def test_tabs_and_semicolons_part_cells_too(tmp_path: Path) -> None:
    expected = [Entry(2, {"prompt": "a, cat", "seed": 3})]
    assert entries(written(tmp_path, "p.tsv", "prompt\tseed\na, cat\t3\n")) == expected
    assert entries(written(tmp_path, "p.csv", "prompt;seed\na, cat;3\n")) == expected


@pytest.mark.parametrize(
    ("heading", "part"),
    [("promt,seed", 'rename "promt"'), ("a,b", "no column"), ("prompt,Prompt", "two columns"), ("", "empty")],
)
def test_a_table_without_a_prompt_column_is_refused_with_a_remedy(
    tmp_path: Path, heading: str, part: str
) -> None:
    with pytest.raises(PromptFileError, match=part):
        entries(written(tmp_path, "p.csv", heading and f"{heading}\nx,1\n"))


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("a red apple --steps 10", {"prompt": "a red apple", "steps": 10}),
        ("it's red --steps=10 --cfg 3", {"prompt": "it's red", "steps": 10, "guidance_scale": 3}),
        ("\u2014prompt \u201ca cat\u201d \u2013steps 5", {"prompt": "a cat", "steps": 5}),
        ("a cat \u2014steps 5", {"prompt": "a cat", "steps": 5}),
        # As text is that was pasted: blanks that do not break, wide ones and those without width.
        ("--prompt \u201ca cat\u201d\u00a0--steps\u00a05", {"prompt": "a cat", "steps": 5}),
        ("a cat\u3000--steps\u30005\u200b--seed\u200b7", {"prompt": "a cat", "steps": 5, "seed": 7}),
        ("a cat \u200b--steps 5", {"prompt": "a cat", "steps": 5}),
        ('--prompt "a\u00a0cat" --steps 5', {"prompt": "a\u00a0cat", "steps": 5}),
        ("--prompt \u2018a cat\u2019s hat\u2019 --steps 5", {"prompt": "a cat\u2019s hat", "steps": 5}),
        ("--prompt a cat\u2019s hat --steps 5", {"prompt": "a cat\u2019s hat", "steps": 5}),
        ('--prompt "a sign: --steps 9" --steps 5', {"prompt": "a sign: --steps 9", "steps": 5}),
        ('--prompt "--steps" --steps 5', {"prompt": "--steps", "steps": 5}),
        ("\u2014Alice, a cat \u2014the best\u2014 and well--known --", {}),
        ("--prompt 'a cat' --customer ann", {"prompt": "a cat", "metadata": {"customer": "ann"}}),
    ],
)
def test_options_are_read_wherever_they_begin_and_other_dashes_are_text(
    tmp_path: Path, line: str, fields: dict[str, Any]
) -> None:
    path = written(tmp_path, "p.txt", line)
    assert entries(path) == [Entry(1, fields or {"prompt": line})]


# JSON lines and Parquet.


def test_json_lines_are_objects_or_prompts(tmp_path: Path) -> None:
    path = written(tmp_path, "p.jsonl", '{"prompt": "cat", "steps": 3}\n\n"dog"\n[1]\n{"prompt"\n')
    first, second, *bad = entries(path)
    assert (first, second) == (Entry(1, {"prompt": "cat", "steps": 3}), Entry(3, {"prompt": "dog"}))
    assert [(each.line, type(each)) for each in bad] == [(4, BadEntry), (5, BadEntry)]


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5_000, '"\\ud800"', "nul"])
def test_hostile_json_is_a_bad_line_at_worst(tmp_path: Path, line: str) -> None:
    [each] = entries(written(tmp_path, "p.jsonl", line))
    assert isinstance(each, BadEntry) or each.fields == {"prompt": "\ud800"}


def test_parquet_is_read_by_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    rows = 2_500
    table = pyarrow.table(
        {
            "Prompt": [f"cat {n}" for n in range(rows)],
            "steps": [None if n % 2 else 20.0 for n in range(rows)],
            "shop": [{"id": n} for n in range(rows)],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    found = entries(tmp_path / "p.parquet")
    assert len(found) == rows
    assert found[0] == Entry(1, {"prompt": "cat 0", "steps": 20, "metadata": {"shop": {"id": 0}}})
    assert found[-1] == Entry(rows, {"prompt": f"cat {rows - 1}", "metadata": {"shop": {"id": rows - 1}}})
    with pytest.raises(PromptFileError, match="no Parquet"):
        entries(written(tmp_path, "q.parquet", "nothing of the kind"))


def test_parquet_without_pyarrow_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PromptFileError, match="pip install"):
        entries(written(tmp_path, "p.parquet", "x"))


# Sources.


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.tsv", "p.jsonl"])
@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_are_recognised_by_their_bytes(tmp_path: Path, name: str, ending: str) -> None:
    texts: dict[str, Any] = {"txt": "cat\ndog\n", "jsonl": '{"prompt": "cat"}\n"dog"\n'}
    text = texts.get(name.partition(".")[2], "prompt\ncat\ndog\n").encode()
    half = len(text) // 2
    pack = gzip.compress if ending == ".gz" else zstandard.ZstdCompressor().compress
    path = written(tmp_path, name + ending, pack(text[:half]) + pack(text[half:]))
    assert [each.fields["prompt"] for each in entries(path) if isinstance(each, Entry)] == ["cat", "dog"]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_damaged_file_is_refused_with_a_remedy(tmp_path: Path, ending: str) -> None:
    text = b"a cat\n" * 10_000 + bytes(range(97, 123)) * 3_000
    pack = gzip.compress if ending == ".gz" else zstandard.ZstdCompressor().compress
    path = written(tmp_path, f"p.txt{ending}", pack(text)[:-20])
    with pytest.raises(PromptFileError, match="damaged"):
        entries(path)


def test_standard_input_can_be_read_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"prompt\na cat\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    found = source("-", "csv")
    assert found.name == "stdin"
    assert list(read(found)) == list(read(found)) == [Entry(2, {"prompt": "a cat"})]


def test_a_source_that_is_not_there_or_has_no_known_format_or_changes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match="cannot be read"):
        source(str(tmp_path / "none.txt"))
    with pytest.raises(PromptFileError, match="--format"):
        source(str(written(tmp_path, "p.dat", "cat")))
    assert entries(tmp_path / "p.dat", "txt") == [Entry(1, {"prompt": "cat"})]
    path = written(tmp_path, "p.txt", "cat")
    found = source(str(path))
    path.write_text("another cat")
    with pytest.raises(PromptFileError, match="has changed"):
        list(read(found))


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_skipping_gives_the_rest_with_its_lines(tmp_path: Path, name: str) -> None:
    texts = {"txt": "a\n# x\n\nb\nc\n", "jsonl": '"a"\n\n"b"\n"c"\n', "csv": 'prompt\na\n"b\nb"\nc\n'}
    path = written(tmp_path, name, texts[name.partition(".")[2]])
    whole = entries(path)
    assert len(whole) == 3
    for skip in range(4):
        assert entries(path, skip=skip) == whole[skip:]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["txt", "csv", "tsv", "jsonl"]))
def test_no_bytes_whatever_raise_anything_else(tmp_path_factory: Any, data: bytes, form: str) -> None:
    path = written(tmp_path_factory.getbasetemp(), f"any.{form}", data)
    try:
        for each in entries(path):
            assert isinstance(each, Entry | BadEntry)
            json.dumps(each.fields if isinstance(each, Entry) else each.reason)
    except PromptFileError:
        pass
