"""Rows of a Parquet file, a few at a time, so that a small file of many values does not fill the memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from producer.prompts.entries import LineError, Raw
from worker.contract.errors import PromptFileError

#: Rows that are decoded together, at most.
_ROWS = 1_000
#: Bytes of values that become Python objects together, about, at most.
_BATCH = 16 << 20
#: Decoded bytes of one row group, and rows of a file, that are too many for a file of far fewer bytes.
_MANY_BYTES, _MANY_ROWS = 256 << 20, 10_000_000
#: How many times larger than the file that is.
_EXPANSION = 100


class ParquetTable:
    """A Parquet file that is open."""

    def __init__(self, name: str, stream: BinaryIO) -> None:
        """Raises `PromptFileError` without pyarrow, and for what is no Parquet or holds too much."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise PromptFileError(
                f"{name} needs pyarrow to be read: pip install 'smallcat[parquet]'."
            ) from None
        self._name = name
        #: What pyarrow raises for a file that is damaged.
        self._errors = (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError)
        size = stream.seek(0, 2)
        stream.seek(0)
        try:
            schema = pyarrow.parquet.read_schema(stream)
            stream.seek(0)
            # A value that stands in many rows is in memory once.
            texts = [
                field.name
                for field in schema
                if pyarrow.types.is_string(field.type) or pyarrow.types.is_binary(field.type)
            ]
            self._file = pyarrow.parquet.ParquetFile(stream, read_dictionary=texts)
        except self._errors as error:
            raise PromptFileError(f"{name} is no Parquet file ({error}).") from None
        self.names: list[str] = list(schema.names)
        self._refuse_bomb(size)

    def rows(self) -> Iterator[Raw]:
        """(number from 1, values) of each row, or (number, `LineError`)."""
        line = 0
        try:
            for batch in self._file.iter_batches(_ROWS, use_threads=False):
                for row in self._rows_of(batch):
                    line += 1
                    yield line, row
        except self._errors as error:
            raise PromptFileError(f"{self._name} is damaged after row {line} ({error}).") from None

    def _rows_of(self, batch: Any) -> Iterator[Any]:
        """The rows of a batch: together where they are small, else each by itself."""
        width = sum(_largest(column) for column in batch.columns)
        step = max(1, min(batch.num_rows, _BATCH // max(1, width)))
        if width > _BATCH:
            reason = f"Rows near it have up to {width:,} bytes, the limit is {_BATCH:,}: split the file."
            yield from (LineError("", reason) for _ in range(batch.num_rows))
            return
        for start in range(0, batch.num_rows, step):
            columns = [_values(column.slice(start, step)) for column in batch.columns]
            yield from zip(*columns, strict=True)

    def _refuse_bomb(self, size: int) -> None:
        data = self._file.metadata
        most = max((data.row_group(each).total_byte_size for each in range(data.num_row_groups)), default=0)
        if most > max(_MANY_BYTES, _EXPANSION * size):
            raise PromptFileError(
                f"{self._name} has {size:,} bytes and a row group of {most:,}, which are more than "
                f"{_EXPANSION} times as many: write it with smaller row groups, or as JSON lines."
            )
        if data.num_rows > max(_MANY_ROWS, _EXPANSION * size):
            raise PromptFileError(
                f"{self._name} has {size:,} bytes and {data.num_rows:,} rows: split it into smaller files."
            )


def _values(column: Any) -> list[Any]:
    """The values of a column; a map is an object, and times are cut to microseconds, which Python has."""
    import pyarrow

    if (cut := _in_microseconds(column.type)) is not column.type:
        column = column.cast(cut, safe=False)
    try:
        return list(column.to_pylist(maps_as_pydicts="lossy"))
    except (ValueError, OverflowError):
        # A date that Python does not have, such as one of the year 10,000.
        return list(column.cast(pyarrow.string()).to_pylist())


def _in_microseconds(kind: Any) -> Any:
    """The type with microseconds in the place of nanoseconds, as pandas and Spark write; else itself."""
    import pyarrow as pa

    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return pa.time64("us")
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if pa.types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        new = [each.with_type(_in_microseconds(each.type)) for each in fields]
        return kind if new == fields else pa.struct(new)
    if pa.types.is_map(kind):
        pair = (_in_microseconds(kind.key_type), _in_microseconds(kind.item_type))
        return kind if pair == (kind.key_type, kind.item_type) else pa.map_(*pair)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = _in_microseconds(kind.value_type)
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return kind if inner == kind.value_type else make(inner)
    return kind


def _largest(column: Any) -> int:
    """Bytes of the column's largest value, about: of a dictionary all its values, else the mean."""
    import pyarrow.compute

    if pyarrow.types.is_dictionary(column.type):
        lengths = pyarrow.compute.binary_length(column.dictionary)
        return int(pyarrow.compute.max(lengths).as_py() or 0)
    return int(column.nbytes) // max(1, len(column))
