"""Files that are made to hurt: bounded memory and time, and one sentence each."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import zstandard

from producer.prompts.reader import BadEntry, Entry, read
from producer.prompts.sources import source
from worker.contract.errors import PromptFileError


def refused(path: Path) -> str:
    """The sentence with which a file is refused, having taken little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(PromptFileError) as caught:
            for _ in read(source(str(path))):
                pass
        assert tracemalloc.get_traced_memory()[1] < 80 << 20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize("name", ["p.zip", "p.csv", "p.txt", "p.jsonl", "p.xlsx"])
def test_a_zip_archive_is_named_for_what_it_is(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("p.txt", "a cat")
    assert "unpack it" in refused(tmp_path / name)


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("unit", [b" ", b"x", b"\nx" + b" " * 5_000])
def test_a_bomb_is_refused(tmp_path: Path, ending: str, unit: bytes) -> None:
    file = io.BytesIO()
    piece = b"a cat\n" + unit * ((1 << 22) // len(unit))
    if ending == "gz":
        with gzip.open(file, "wb", 6) as packed:
            for _ in range(20):
                packed.write(piece)
    else:
        with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as packed:
            for _ in range(20):
                packed.write(piece)
    path = tmp_path / f"p.txt.{ending}"
    path.write_bytes(file.getvalue())
    assert "becomes more than" in refused(path)


def test_a_parquet_file_of_few_bytes_and_very_many_rows_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1_000_000, "int32"), ["a cat"])
    table = pyarrow.table({"prompt": column})
    with parquet.ParquetWriter(tmp_path / "p.parquet", table.schema) as file:
        for _ in range(11):
            file.write_table(table)
    assert "rows: split it" in refused(tmp_path / "p.parquet")


def test_a_parquet_value_that_stands_in_many_rows_is_held_once(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    huge = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1_000, "int32"), ["x" * (20 << 20)])
    parquet.write_table(pyarrow.table({"prompt": huge}), tmp_path / "p.parquet", compression="zstd")
    found = list(read(source(str(tmp_path / "p.parquet"))))
    assert len(found) == 1_000
    assert all(isinstance(each, BadEntry) and "split the file" in each.reason for each in found)


@pytest.mark.parametrize("cut", [4, 200, -9])
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, cut: int) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"prompt": ["a cat"] * 100}), tmp_path / "p.parquet")
    data = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "p.parquet").write_bytes(data[:cut])
    assert "Parquet" in refused(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "x", "steps": ' + "9" * 400 + "}",
        '{"prompt": "x", "steps": ' + "9" * 500_000 + "}",
        '{"prompt": "x", "guidance_scale": -Infinity}',
        '{"prompt": "x", "prompt": "y"}',
        '{"prompt": "x", "metadata": ' + "[" * 50_000,
    ],
)
def test_json_that_is_made_to_hurt_is_one_bad_line_or_one_refused_value(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text(f'{line}\n{{"prompt": "a cat", "seed": NaN}}\n')
    first, second = read(source(str(tmp_path / "p.jsonl")))
    assert second == Entry(2, {"prompt": "a cat"})
    assert isinstance(first, BadEntry) or first.fields["steps"] == int("9" * 400)
    assert len(json.dumps(getattr(first, "reason", ""))) < 300
