"""Text of others is shown with nothing hidden in it."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest

from worker.contract.plain_text import plain, plain_json

SHOWN = ["a cat", "Ä 猫 🐈", "\u200c\u200d", "👩\u200d🎨", ""]
HIDDEN = {
    "\x1b[31m": "\\x1b[31m",
    "\x9b31m": "\\x9b31m",
    "a\rb\nc\td": "a\\rb\\nc\\td",
    "\x00\x7f": "\\x00\\x7f",
    "\u202egnp.exe": "\\u202egnp.exe",
    "\u2066\u2069\u200e\u200f\u061c": "\\u2066\\u2069\\u200e\\u200f\\u061c",
    "\u2028\u2029\ufeff": "\\u2028\\u2029\\ufeff",
    "\ud800": "\\ud800",
    "\U000e0041": "\\U000e0041",
}


@pytest.mark.parametrize("text", SHOWN)
def test_what_is_seen_is_shown_as_it_is(text: str) -> None:
    assert plain(text) == text


@pytest.mark.parametrize("text", HIDDEN, ids=ascii)
def test_what_is_not_seen_is_escaped(text: str) -> None:
    assert plain(text) == HIDDEN[text]
    assert plain(text, keep="\n") == HIDDEN[text].replace("\\n", "\n")


def test_no_character_moves_a_cursor_or_changes_the_direction() -> None:
    for number in range(sys.maxunicode + 1):
        if unicodedata.category(chr(number)) in ("Cc", "Zl", "Zp", "Cs"):
            assert plain(chr(number)).isascii()
        if unicodedata.bidirectional(chr(number)) in {
            *("LRE", "LRO", "RLE", "RLO", "PDF"),
            *("LRI", "RLI", "FSI", "PDI"),
        }:
            assert plain(chr(number)).isascii()


@pytest.mark.parametrize("text", [*SHOWN, *HIDDEN], ids=ascii)
def test_json_is_the_same_to_its_reader(text: str) -> None:
    written = plain_json({text: [text, 1]})
    assert json.loads(written) == {text: [text, 1]}
    assert plain(written, keep="\n") == written
