"""Where prompt files come from: a path, `-` for standard input, or an s3:// address; plain, gzip or zstd.

A run reads its files more than once: to check them, to feed them, and to write the manifest. So what cannot
be read twice is first copied to a temporary file on disk. A run that is resumed must know that its files are
the same ones: each source has a digest over its stored bytes.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

from worker.contract.errors import PromptFileError

#: The formats, as `--format` takes them and as names end.
FORMATS = ("txt", "csv", "tsv", "jsonl", "parquet")
#: The format of standard input where none is named.
STDIN_FORMAT = "txt"
#: Endings of files that hold files or tables in ways that are not read.
_ARCHIVES = ("zip", "xlsx", "xls", "ods", "7z", "rar", "tar", "tgz", "bz2", "xz")
#: Endings of compressed files; the first bytes decide whether a file is compressed.
_COMPRESSED = (".gz", ".zst", ".zstd")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_CHUNK = 1 << 20
#: Bytes that are decompressed together: what they become, up to 32,768 times as many, is in memory.
_ZSTD_CHUNK = 1 << 9
#: Bytes that a compressed file may become, whatever its size; and how many times its size beyond that.
_MANY_BYTES, _EXPANSION = 64 << 20, 100
#: How files begin that are no text, and what they are.
_FOREIGN = {
    b"PK\x03\x04": "a zip archive or a workbook",
    b"PK\x05\x06": "a zip archive or a workbook",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\xd0\xcf\x11\xe0": "an old workbook or document",
    b"%PDF": "a PDF",
    b"{\\rtf": "rich text (RTF)",
    b"<!DOCT": "a web page",
    b"<!doct": "a web page",
    b"<html": "a web page",
    b"<?xml": "XML",
    b"PAR1": "Parquet",
}


@dataclass(frozen=True)
class Source:
    """A prompt file that can be read from its beginning any number of times, one reader at a time."""

    #: As the user gave it; `stdin` for `-`. Errors and manifests have it.
    name: str
    #: One of `FORMATS`.
    format: str
    #: BLAKE2b over the stored bytes, hexadecimal.
    digest: str
    #: The file, where it is a local one; None for standard input and s3://.
    path: Path | None
    _spool: BinaryIO | None = field(default=None, repr=False, compare=False)
    _seen: tuple[int, int] = (0, 0)

    @contextlib.contextmanager
    def open(self, *, is_limited: bool = True) -> Iterator[BinaryIO]:
        """The decompressed bytes, from the beginning. Parquet files come as they are, and can be sought in.

        With `is_limited`, files that begin as no text does and those that become far more than their size are
        refused. Raises `PromptFileError` for these, and for a file that is gone, has changed, or is no valid
        gzip or zstd, also while it is read.
        """
        with self._raw() as raw:
            try:
                head = raw.read(6)
                raw.seek(0)
                yield self._decompressed(raw, head, is_limited=is_limited)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise PromptFileError(f"{self.name} is damaged ({error}): compress it again.") from None

    def beside(self, ending: str) -> Path:
        """Where a file that belongs to this one goes: beside it, or in the working folder if it is remote."""
        if self.path is not None:
            return self.path.with_name(f"{self.path.name}.{ending}")
        return Path(f"{PurePosixPath(self.name).name}.{ending}")

    @contextlib.contextmanager
    def _raw(self) -> Iterator[BinaryIO]:
        if self._spool is not None:
            with os.fdopen(os.dup(self._spool.fileno()), "rb") as raw:
                raw.seek(0)
                yield raw
            return
        try:
            with cast(Path, self.path).open("rb") as raw:
                if _seen(raw) != self._seen:
                    raise PromptFileError(f"{self.name} has changed since it was first read: run it again.")
                yield raw
        except OSError as error:
            raise _unreadable(self.name, error) from None

    def _decompressed(self, raw: BinaryIO, head: bytes, *, is_limited: bool) -> BinaryIO:
        if self.format == "parquet":
            return raw
        stream = None
        if head.startswith(_GZIP):
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        elif head.startswith(_ZSTD):
            stream = _zstd(raw)
        if stream is not None:
            return _limited(self.name, stream, os.fstat(raw.fileno()).st_size) if is_limited else stream
        for mark, what in _FOREIGN.items():
            if is_limited and head.startswith(mark):
                remedy = (
                    "add --format parquet" if what == "Parquet" else "unpack it, or save it as CSV or text"
                )
                raise PromptFileError(f"{self.name} is {what}, and no {self.format}: {remedy}.")
        return raw


def source(name: str, form: str | None = None) -> Source:
    """The prompt file that `name` means, in the format `form` or that of its ending.

    Raises `PromptFileError` where there is none or its format is unknown, `StorageError` for s3://.
    """
    form = form or _format_of(name)
    if name == "-":
        return _spooled("stdin", form, sys.stdin.buffer)
    if name.startswith("s3://"):
        return _from_bucket(name, form)
    path = Path(name)
    try:
        with path.open("rb") as raw:
            seen, digest = _seen(raw), _digest(raw)
    except OSError as error:
        raise _unreadable(name, error) from None
    return Source(name, form, digest, path, None, seen)


def _unreadable(name: str, error: OSError) -> PromptFileError:
    match error:
        case FileNotFoundError() | NotADirectoryError():
            why = "there is no such file. Check its path"
        case IsADirectoryError():
            why = "that is a folder. Name the files in it"
        case _:
            why = f"{error.strerror or error}. Check who may read it"
    return PromptFileError(f"{name} cannot be read: {why}.")


def _format_of(name: str) -> str:
    if name == "-":
        return STDIN_FORMAT
    if Path(name).is_dir():
        raise PromptFileError(f"{name} is a folder: name the prompt files in it.")
    plain = PurePosixPath(name)
    if plain.suffix.lower() in _COMPRESSED:
        plain = plain.with_suffix("")
    ending = plain.suffix.lower().removeprefix(".")
    if ending == "ndjson":
        return "jsonl"
    if ending in _ARCHIVES:
        raise PromptFileError(
            f"{name} is no prompt file but an archive or a workbook: unpack it, or save it as CSV."
        )
    if ending not in FORMATS:
        known = ", ".join(FORMATS)
        raise PromptFileError(
            f'{name} ends in ".{ending}", which is no known format: add --format ({known}).'
        )
    return ending


def _spooled(name: str, form: str, stream: IO[bytes]) -> Source:
    spool = tempfile.TemporaryFile(prefix="smallcat-")  # noqa: SIM115 - lives as long as the source
    digest = hashlib.blake2b(digest_size=16)
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
        spool.write(chunk)
    spool.flush()
    return Source(name, form, digest.hexdigest(), None, cast(BinaryIO, spool))


def _from_bucket(name: str, form: str) -> Source:
    from producer.session import session

    try:
        with session().bucket_of(name).open(name) as body:
            return _spooled(name, form, body)
    except ValueError as error:
        raise PromptFileError(f"{error}") from None


def _seen(raw: IO[bytes]) -> tuple[int, int]:
    """What changes when a file does: its size and modification time."""
    stat = os.fstat(raw.fileno())
    return stat.st_size, stat.st_mtime_ns


def _digest(raw: BinaryIO) -> str:
    digest = hashlib.blake2b(digest_size=16)
    while chunk := raw.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _limited(name: str, stream: Any, size: int) -> BinaryIO:
    """The stream, which is refused where it becomes far more than its stored `size`."""
    most = max(_MANY_BYTES, _EXPANSION * size)

    class Limited(io.RawIOBase):
        """Counts what is read."""

        _read = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            count = int(stream.readinto(buffer))
            self._read += count
            if self._read > most:
                raise PromptFileError(
                    f"{name} has {size:,} bytes and becomes more than {most:,}: unpack it, and look whether "
                    "it is a prompt file."
                )
            return count

    return cast(BinaryIO, io.BufferedReader(Limited(), _CHUNK))


def _zstd(raw: BinaryIO) -> BinaryIO:
    import zstandard

    class Reader(io.RawIOBase):
        """Decompresses frame after frame. zstandard's own reader does not notice that a file was cut off."""

        def __init__(self) -> None:
            self._frame: Any = None
            self._packed = self._plain = b""

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            while not self._plain and self._more():
                pass
            size = min(len(buffer), len(self._plain))
            buffer[:size], self._plain = self._plain[:size], self._plain[size:]
            return size

        def _more(self) -> bool:
            """Decompress the next few bytes, which may become many; False at the end of the file."""
            self._packed = self._packed or raw.read(_ZSTD_CHUNK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends too early")
                return False
            try:
                self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
                self._plain = self._frame.decompress(self._packed)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
            return True

    return cast(BinaryIO, io.BufferedReader(Reader(), _CHUNK))
