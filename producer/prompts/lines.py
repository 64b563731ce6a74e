"""From the bytes of a text file to its lines: encodings and line ends, a piece of the file at a time."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from typing import Any, cast

from producer.prompts.entries import LineError, Raw
from worker.contract.errors import PromptFileError

#: Bytes in a line, at most: far more than a job can hold, and few enough to keep memory flat.
MAX_LINE = 1 << 20
#: Bytes that are read together.
_CHUNK = 1 << 16
#: Bytes that are not UTF-8, as `surrogateescape` decodes them.
_BAD_BYTE = re.compile("[\udc80-\udcff]")


def lines_of(name: str, stream: Any) -> Iterator[Raw]:
    """(number, text without its line end) of each line, or (number, `LineError`).

    A line ends with LF, CRLF or CR, and with nothing else. Bytes that are not UTF-8 are surrogates in the
    text: see `refuse_bad_bytes`. Raises `PromptFileError` for what is no text.
    """
    buffered = stream if isinstance(stream, io.BufferedIOBase) else io.BufferedReader(stream)
    head = buffered.read(64)
    for bom in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        if head.startswith(bom):
            raise PromptFileError(f"{name} is UTF-32: save it as UTF-8.")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _utf16_lines(name, head, buffered)
    if head.count(0) * 4 > len(head):
        raise PromptFileError(f"{name} is no text, or UTF-16 without a BOM: save it as UTF-8.")
    return _utf8_lines(head.removeprefix(codecs.BOM_UTF8), buffered)


def refuse_bad_bytes(text: str) -> None:
    """Raise `LineError` where the line was not UTF-8."""
    if not text.isascii() and (bad := _BAD_BYTE.search(text)):
        byte, before = ord(bad[0]) - 0xDC00, bad.start()
        raise LineError("", f"Byte 0x{byte:02x} after character {before} is not UTF-8: save it as UTF-8.")


def _utf8_lines(head: bytes, stream: Any) -> Iterator[Raw]:
    number, rest, is_too_long = 0, head, False
    while True:
        chunk = stream.read(_CHUNK)
        # For bytes these are LF, CR and CRLF alone.
        whole = (rest + chunk).splitlines(keepends=True)
        # The last line may go on in the next piece; so may a CRLF.
        rest = whole.pop() if chunk and whole and not whole[-1].endswith(b"\n") else b""
        for line in whole:
            number += 1
            if is_too_long or len(line) > MAX_LINE:
                is_too_long = False
                yield number, LineError("", f"The line is longer than {MAX_LINE:,} bytes: split it.")
            else:
                yield number, line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
        if len(rest) > MAX_LINE:
            # Kept so that its end is recognised: CR, or the first half of CRLF.
            rest, is_too_long = rest[-1:], True
        if not chunk:
            return


def _utf16_lines(name: str, head: bytes, stream: Any) -> Iterator[Raw]:
    # newline="": CR, LF and CRLF end a line, and no character is changed.
    text = io.TextIOWrapper(cast(Any, _Rejoined(head, stream)), "utf-16", "surrogatepass", newline="")
    number = 0
    while True:
        number += 1
        try:
            line = text.readline(MAX_LINE)
            if len(line) >= MAX_LINE and not line.endswith(("\n", "\r")):
                while (more := text.readline(MAX_LINE)) and not more.endswith(("\n", "\r")):
                    pass
                yield number, LineError("", f"The line is longer than {MAX_LINE:,} characters: split it.")
                continue
        except UnicodeError as error:
            # Where the next line begins is not known any more.
            yield number, LineError("", f"It is not UTF-16 ({error}): save {name} as UTF-8.")
            return
        if not line:
            return
        yield number, line.rstrip("\r\n")


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
