"""AUTOMATIC1111's infotext taken apart, as many tools write it, and as other programs change it.

    a small cat
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 5, Size: 512x512, Model hash: ..., Version: v1.10.1

The source is modules/infotext_utils.py of version 1.10. Time and memory are linear in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

#: A name of a pair. Longer ones are none.
_NAME = re.compile(r"\w[\w \-/+().]{0,79}")
#: A quoted value. It may have line ends in it.
_QUOTED = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_END = re.compile(r"[,\n]")
#: Where the pairs begin: at the start of a line, or, where line ends were lost, after white space.
_AT_LINE = re.compile(r"^[ \t]*(?=Steps: )", re.MULTILINE)
_ANYWHERE = re.compile(r"(?:(?<=\s)|^)(?=Steps: ?\d)")
_NEGATIVE = re.compile(r"(?:^|(?<=\n))[ \t]*Negative prompt:[ \t]?")
#: A negative prompt behind the pairs: it is not known whose it is.
_LATE = re.compile(r"\n[ \t]*Negative prompt:")
_NEGATIVE_ANYWHERE = re.compile(r"(?:^|(?<=\s))Negative prompt:[ \t]?")
#: Pairs that nearly every infotext has: where none follows "Steps", it is part of a prompt.
_USUAL = frozenset(("Sampler", "CFG scale", "Seed", "Size", "Model", "Model hash"))
#: Places where the pairs may begin that are looked at, from the last one.
_TRIED = 8
#: Values that are taken for JSON, at most.
_JSON_VALUES = 32


def split(text: str) -> tuple[str, str, dict[str, str]] | None:
    """Prompt, negative prompt and pairs; None where there are no pairs.

    Reads line ends of any kind, further lines after the pairs, values with line ends in quotes, and a text
    whose line ends were lost. Prompts come without white space around them, as AUTOMATIC1111 reads them.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\0 \t\n")
    for pattern, least in ((_AT_LINE, 1), (_ANYWHERE, 2)):
        starts = [found.end() for found in pattern.finditer(text)]
        for start in reversed(starts[-_TRIED:]):
            if _LATE.search(text, start):
                return None
            pairs = pairs_of(text[start:])
            is_last_line = pattern is _AT_LINE and "\n" not in text[start:]
            if is_last_line or len(_USUAL & pairs.keys()) >= least:
                return *_prompts(text[:start]), pairs
    return None


def pairs_of(text: str) -> dict[str, str]:
    """The pairs `name: value, ...` up to the end of the line.

    A value is quoted as JSON where it has a comma, colon or line end. What is neither is left out. Of a name
    that stands twice the last value counts, as it does in AUTOMATIC1111's own reader.
    """
    return dict(_pairs(text))


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    at, end, decoder, left = 0, len(text), json.JSONDecoder(), _JSON_VALUES
    while at < end:
        colon = text.find(":", at)
        if colon < 0:
            return
        before = text[at:colon]
        if "\n" in before:
            return
        name = before.rpartition(",")[2].strip()
        at = colon + 1
        while at < end and text[at] == " ":
            at += 1
        value: str | None = None
        if text.startswith('"', at) and (quoted := _QUOTED.match(text, at)) and _ends(text, quoted.end()):
            value, at = _unquoted(quoted[0]), quoted.end()
        elif text.startswith(("{", "["), at) and left:
            left -= 1
            try:
                _, stop = decoder.raw_decode(text, at)
            except (ValueError, RecursionError):
                stop = at
            if stop > at and _ends(text, stop):
                value, at = text[at:stop], stop
        if value is None:
            stop = _first(text, at)
            value, at = text[at:stop].rstrip(), stop
        if _NAME.fullmatch(name):
            yield name, value
        if text.startswith("\n", at):
            return
        at += 1


def _ends(text: str, at: int) -> bool:
    return at == len(text) or text[at] in ",\n"


def _first(text: str, at: int) -> int:
    """Where the value ends that begins at `at` and is not quoted."""
    found = _END.search(text, at)
    return found.start() if found else len(text)


def _unquoted(value: str) -> str:
    """What the quotes hold; as it stands where another tool's quotes are no JSON."""
    try:
        return str(json.loads(value, strict=False))
    except ValueError:
        return value


def _prompts(body: str) -> tuple[str, str]:
    mark = _NEGATIVE.search(body) or _NEGATIVE_ANYWHERE.search(body)
    if mark is None:
        return _lines(body), ""
    return _lines(body[: mark.start()]), _lines(body[mark.end() :])


def _lines(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().split("\n"))
