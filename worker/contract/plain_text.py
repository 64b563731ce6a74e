"""Text of others, made safe to show: at a terminal, in a log, in a table.

Records, messages and announcements are written by whoever reaches Redis. Control characters in them move a
terminal's cursor or forge lines of a log, and those for the direction of writing show another text than the
one that is there.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

#: Categories of characters that are not shown as they are: controls, formats such as marks of direction,
#: surrogates, and the separators of lines and paragraphs.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
#: Formats that belong to writing, and change no direction: joiners, as in emoji and Persian; soft hyphens.
_WRITTEN = frozenset("\u200c\u200d\u00ad")
_ASCII = re.compile(r"[ -~]*")


def plain(text: object, *, keep: str = "") -> str:
    """The text with each character that is not shown written as an escape of Python's: `\\x1b`, `\\u202e`.

    Line breaks are escaped, too, unless they are in `keep`.
    """
    return _escaped(str(text), keep, python=True)


def counted(number: int, one: str, many: str = "") -> str:
    """`1 key`, `2 keys`; with words for several of them, `1 job waits`, `2 jobs wait`."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def plain_json(value: Any, indent: int | None = 2) -> str:
    """The value as JSON that is the same JSON to a reader, and has nothing hidden in it."""
    return _escaped(json.dumps(value, ensure_ascii=False, indent=indent), "\n", python=False)


def _escaped(text: str, keep: str, *, python: bool) -> str:
    if _ASCII.fullmatch(text):
        return text
    return "".join(
        each
        if each in keep or each in _WRITTEN or unicodedata.category(each) not in _HIDDEN
        else each.encode("unicode_escape").decode()
        if python
        else json.dumps(each)[1:-1]
        for each in text
    )
