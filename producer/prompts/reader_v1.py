"""Prompt files as the first version read them: runs that it began go on with it.

It changes no more: a run that is resumed must make the jobs that it began with, and a line that was wrong
stays wrong. New runs have `producer.prompts.reader`.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeAlias, cast

from producer.prompts.entries import BadEntry, Entry, LineError, Raw
from producer.prompts.fields_v1 import Headings, options_of
from producer.prompts.sources import Source
from worker.contract.errors import PromptFileError

#: Bytes in a line, at most.
MAX_LINE = 1 << 20
#: Lines and characters of one row of a CSV file, at most: within these the end of a quote is searched for.
MAX_ROW_LINES, MAX_ROW = 1_000, 64_000
#: Rows of a Parquet file that are decoded together.
_PARQUET_ROWS = 1_000
#: Bytes that are not UTF-8, as `surrogateescape` decodes them.
_BAD_BYTE = re.compile("[\udc80-\udcff]")

#: Makes a line's entry of its number and text or values. Raises `LineError`.
Parse: TypeAlias = Callable[[int, Any], Entry]


def read(source: Source, skip: int = 0) -> Iterator[Entry | BadEntry]:
    """The entries of a prompt file in order, without the first `skip`, which are not parsed.

    Raises `PromptFileError` where the whole file cannot be read.
    """
    with source.open(is_limited=False) as stream:
        raws, parse = _READERS[source.format](source, stream)
        for line, raw in itertools.islice(raws, skip, None):
            try:
                if isinstance(raw, LineError):
                    raise raw
                yield parse(line, raw)
            except LineError as error:
                yield BadEntry(line, error.field, error.reason)


def _txt(source: Source, stream: BinaryIO) -> tuple[Iterator[Raw], Parse]:
    def parse(line: int, text: str) -> Entry:
        _refuse_bad_bytes(text)
        if not text.startswith("--"):
            return Entry(line, {"prompt": text})
        try:
            return Entry(line, *options_of(text))
        except ValueError as error:
            raise LineError("", f"The options cannot be read: {error}") from None

    def raws() -> Iterator[Raw]:
        for line, text in _lines(source.name, stream):
            if isinstance(text, LineError):
                yield line, text
            elif (stripped := text.strip()) and not stripped.startswith("#"):
                yield line, stripped

    return raws(), parse


def _jsonl(source: Source, stream: BinaryIO) -> tuple[Iterator[Raw], Parse]:
    def parse(line: int, text: str) -> Entry:
        _refuse_bad_bytes(text)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LineError("", f"It is not JSON ({error}): write one object a line.") from None
        if isinstance(value, str):
            return Entry(line, {"prompt": value})
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise LineError("", f"It is a JSON {kind}: write an object of job fields, or a string.")
        return Entry(line, value)

    def raws() -> Iterator[Raw]:
        for line, text in _lines(source.name, stream):
            if isinstance(text, LineError) or text.strip():
                yield line, text

    return raws(), parse


def _table(source: Source, stream: BinaryIO) -> tuple[Iterator[Raw], Parse]:
    delimiter = "\t" if source.format == "tsv" else ","
    rows = _rows(_lines(source.name, stream))
    first = next(rows, None)
    if first is None:
        raise PromptFileError(f"{source.name} is empty: its first line must have the headings.")
    number, heading = first
    if isinstance(heading, LineError):
        raise PromptFileError(f"{source.name}, line {number}: {heading.reason}")
    if source.format == "csv" and "," not in heading and ";" in heading:
        delimiter = ";"
    try:
        names = _cells(heading, delimiter)
        _refuse_bad_bytes(heading)
    except LineError as error:
        raise PromptFileError(f"{source.name}, line {number}: {error.reason}") from None
    headings = Headings(names, source.name)

    def parse(line: int, text: str) -> Entry:
        _refuse_bad_bytes(text)
        cells = _cells(text, delimiter)
        if len(cells) > len(names):
            reason = f"It has {len(cells)} cells for {len(names)} headings: put quotes around commas."
            raise LineError("", reason)
        try:
            return Entry(line, headings.fields_of_text(cells))
        except ValueError as error:
            raise LineError("metadata", str(error)) from None

    return rows, parse


def _parquet(source: Source, stream: BinaryIO) -> tuple[Iterator[Raw], Parse]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise PromptFileError(
            f"{source.name} needs pyarrow to be read: pip install 'smallcat[parquet]'."
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(stream)
    except pyarrow.ArrowException as error:
        raise PromptFileError(f"{source.name} is no Parquet file ({error}).") from None
    headings = Headings(file.schema_arrow.names, source.name)

    def parse(line: int, row: tuple[Any, ...]) -> Entry:
        return Entry(line, headings.fields_of_values(row))

    def raws() -> Iterator[Raw]:
        line = 0
        try:
            for batch in file.iter_batches(_PARQUET_ROWS):
                columns = [column.to_pylist() for column in batch.columns]
                for row in zip(*columns, strict=True):
                    line += 1
                    yield line, row
        except (pyarrow.ArrowException, OSError) as error:
            raise PromptFileError(f"{source.name} is damaged after row {line} ({error}).") from None

    return raws(), parse


_READERS: dict[str, Callable[[Source, BinaryIO], tuple[Iterator[Raw], Parse]]] = {
    "txt": _txt,
    "csv": _table,
    "tsv": _table,
    "jsonl": _jsonl,
    "parquet": _parquet,
}


def _lines(name: str, stream: Any) -> Iterator[Raw]:
    """(number, text without its line end, which is LF or CRLF) of each line, or (number, `LineError`).

    Bytes that are not UTF-8 are surrogates in the text: see `_refuse_bad_bytes`.
    """
    buffered = stream if isinstance(stream, io.BufferedIOBase) else io.BufferedReader(stream)
    head = buffered.read(64)
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise PromptFileError(f"{name} is UTF-32: save it as UTF-8.")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _utf16_lines(name, head, buffered)
    if head.count(0) * 4 > len(head):
        raise PromptFileError(f"{name} is no text, or UTF-16 without a BOM: save it as UTF-8.")
    return _utf8_lines(head.removeprefix(codecs.BOM_UTF8), buffered)


def _utf8_lines(head: bytes, stream: Any) -> Iterator[Raw]:
    *whole, rest = head.split(b"\n")
    number = 0
    for number, line in enumerate(whole, 1):
        yield number, _text(line)
    while True:
        line = rest + stream.readline(MAX_LINE)
        rest = b""
        if not line:
            return
        number += 1
        if len(line) >= MAX_LINE and not line.endswith(b"\n"):
            while (more := stream.readline(MAX_LINE)) and not more.endswith(b"\n"):
                pass
            yield number, LineError("", f"The line is longer than {MAX_LINE:,} bytes: split it.")
        else:
            yield number, _text(line)


def _utf16_lines(name: str, head: bytes, stream: Any) -> Iterator[Raw]:
    # newline="\n": nothing else ends a line, and no character is changed.
    text = io.TextIOWrapper(cast(Any, _Rejoined(head, stream)), "utf-16", "surrogatepass", newline="\n")
    number = 0
    while True:
        number += 1
        try:
            line = text.readline(MAX_LINE)
            if len(line) >= MAX_LINE and not line.endswith("\n"):
                while (more := text.readline(MAX_LINE)) and not more.endswith("\n"):
                    pass
                yield number, LineError("", f"The line is longer than {MAX_LINE:,} characters: split it.")
                continue
        except UnicodeError as error:
            # Where the next line begins is not known any more.
            yield number, LineError("", f"It is not UTF-16 ({error}): save {name} as UTF-8.")
            return
        if not line:
            return
        yield number, line.removesuffix("\n").removesuffix("\r")


class _Rejoined(io.RawIOBase):
    """A stream whose first bytes, which were read already, come again before the rest."""

    def __init__(self, head: bytes, stream: Any) -> None:
        self._head, self._stream = head, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data, self._head = self._head or self._stream.read(len(buffer)), b""
        buffer[: len(data)] = data
        return len(data)


def _text(line: bytes) -> str:
    return line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")


def _refuse_bad_bytes(text: str) -> None:
    if not text.isascii() and (bad := _BAD_BYTE.search(text)):
        byte, before = ord(bad[0]) - 0xDC00, bad.start()
        raise LineError("", f"Byte 0x{byte:02x} after character {before} is not UTF-8: save it as UTF-8.")


def _rows(lines: Iterator[Raw]) -> Iterator[Raw]:
    """(number of the first line, text) of each row: a cell with quotes may span lines.

    Where the number of quotes stays odd within `MAX_ROW_LINES` and `MAX_ROW`, the first line alone is wrong:
    the lines behind it are rows themselves.
    """
    again: list[Raw] = []
    while True:
        first = again.pop(0) if again else next(lines, None)
        if first is None:
            return
        number, text = first
        if isinstance(text, LineError) or text.count('"') % 2 == 0:
            if isinstance(text, LineError) or text.strip():
                yield number, text
            continue
        seen: list[Raw] = []
        parts, quotes, size = [text], text.count('"'), len(text)
        while quotes % 2 and len(seen) < MAX_ROW_LINES and size < MAX_ROW:
            following = again.pop(0) if again else next(lines, None)
            if following is None:
                break
            seen.append(following)
            if isinstance(following[1], LineError):
                break
            parts.append(following[1])
            quotes += following[1].count('"')
            size += len(following[1])
        if quotes % 2:
            yield number, LineError("", 'A quote (") opens a cell and is not closed: double it, or close it.')
            again = seen + again
        else:
            yield number, "\n".join(parts)


def _cells(row: str, delimiter: str) -> list[str]:
    lines = [row] if "\n" not in row else io.StringIO(row, newline="")
    try:
        return next(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        reason = f"It is not CSV ({error}): put quotes around the cell, double those in it."
        raise LineError("", reason) from None
