from __future__ import annotations

import contextlib
import itertools
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.prompts.dynamic_prompts import Wildcards, all_of, count, parse, sample
from producer.prompts.reader import LineError

NONE = Wildcards(None)


def texts(prompt: str, wildcards: Wildcards = NONE) -> list[str]:
    return list(all_of(parse(prompt), wildcards))


@pytest.fixture
def wildcards(tmp_path: Path) -> Wildcards:
    (tmp_path / "animals").mkdir()
    (tmp_path / "colours.txt").write_text("# all there are\nred\n\n3::green\n")
    (tmp_path / "animals" / "small.txt").write_text("cat\nmouse\n")
    (tmp_path / "animals" / "large.txt").write_text("__colours__ whale\n")
    (tmp_path / "self.txt").write_text("a __self__\n")
    return Wildcards(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", ["a cat"]),
        ("a {red|green} cat", ["a red cat", "a green cat"]),
        ("{a|b} {c|d}", ["a c", "a d", "b c", "b d"]),
        ("{a|b {c|d}}", ["a", "b c", "b d"]),
        ("{a|}b", ["ab", "b"]),
        ("{2$$a|b|c}", ["a, b", "a, c", "b, c"]),
        ("{2$$ and $$a|b}", ["a and b"]),
        ("{1-2$$a|b}", ["a", "b", "a, b"]),
        ("{-1$$a|b}", ["", "a", "b"]),
        ("{9$$a|b}", ["a, b"]),
        ("{0.5::a|2::b}", ["a", "b"]),
    ],
)
def test_alternatives_are_expanded_in_order(prompt: str, expected: list[str]) -> None:
    assert texts(prompt) == expected
    assert count(parse(prompt), NONE) == len(expected)


@pytest.mark.parametrize(
    ("prompt", "same"),
    [
        ("a {cat}", "a {cat}"),
        ("a {cat", "a {cat"),
        ("cat} | dog", "cat} | dog"),
        (r"a \{b\|c\}", "a {b|c}"),
        (r"C:\cats", r"C:\cats"),
        (r"\__init__", "__init__"),
        ("(cat:1.2) [a|b]", "(cat:1.2) [a|b]"),
    ],
)
def test_what_is_no_alternative_is_left_as_it_is(prompt: str, same: str) -> None:
    assert texts(prompt) == [same]


def test_wildcards_are_files_of_alternatives(wildcards: Wildcards) -> None:
    assert texts("a __colours__ cat", wildcards) == ["a red cat", "a green cat"]
    assert texts("__animals/*__", wildcards) == ["red whale", "green whale", "cat", "mouse"]
    assert count(parse("__animals/*__ __colours__"), wildcards) == 8


@pytest.mark.parametrize(
    ("prompt", "part"), [("__none__", "none.txt"), ("__../up__", "leads out"), ("__self__", "in itself")]
)
def test_a_wildcard_that_cannot_be_read_is_an_error(wildcards: Wildcards, prompt: str, part: str) -> None:
    with pytest.raises(LineError) as error:
        texts(prompt, wildcards)
    assert part in error.value.reason
    with pytest.raises(LineError, match="--wildcards"):
        texts("__colours__")


def test_expansion_is_lazy() -> None:
    many = "{" + "|".join(map(str, range(50))) + "}"
    huge = " ".join([many] * 20)
    assert count(parse(huge), NONE) >= 10**12
    assert list(itertools.islice(all_of(parse(huge), NONE), 2))[1].endswith(" 1")
    assert len(set(sample(parse(huge), NONE, 5, random.Random(1)))) == 5


@pytest.mark.parametrize("prompt", ["{" * 2000, "{|" * 1000, "{" * 900 + "a|b" + "}" * 900, "{a|b}" * 400])
def test_hostile_braces_take_no_time(prompt: str) -> None:
    began = time.monotonic()
    next(iter(all_of(parse(prompt), NONE)))
    count(parse(prompt), NONE)
    assert time.monotonic() - began < 2


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab{}|\\$_:1- ", max_size=40))
def test_every_text_is_a_template(prompt: str) -> None:
    template = parse(prompt)
    if "__" in prompt:
        with contextlib.suppress(LineError):
            count(template, NONE)
    elif (number := count(template, NONE)) < 500:
        assert len(list(all_of(template, NONE))) == number


def test_a_sample_is_different_texts_and_all_where_there_are_no_more() -> None:
    template = parse("{a|b|c} {d|e|f}")
    drawn = list(sample(template, NONE, 5, random.Random(1)))
    assert len(set(drawn)) == 5
    assert set(drawn) <= set(all_of(template, NONE))
    assert list(sample(template, NONE, 9, random.Random(1))) == list(all_of(template, NONE))


def test_weights_count_when_a_sample_is_drawn() -> None:
    template = parse("{99::often|1::seldom}" + "{a|b|c|d}" * 3)
    drawn = list(sample(template, NONE, 20, random.Random(7)))
    assert sum(text.startswith("often") for text in drawn) > 15
