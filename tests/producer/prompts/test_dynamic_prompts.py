"""Dynamic prompts stand for what the package dynamicprompts 0.31.0 makes of them.

The oracle is its combinatorial generator; where that leaves out texts that its own syntax guide and its
random generator have (`=!`, alternatives in a wildcard's name), the oracle is the random one.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from dynamicprompts.generators import CombinatorialPromptGenerator, RandomPromptGenerator
from dynamicprompts.wildcards.wildcard_manager import WildcardManager
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.prompts.dynamic_prompts import MAX_BRACES, MAX_TAKEN, parse
from producer.prompts.entries import LineError
from producer.prompts.expansion import all_of, sample
from producer.prompts.wildcards import Wildcards

#: Texts that are compared of each prompt.
SOME = 3_000

FILES = {
    "ab.txt": "# a comment\nb\n\n  a \n",
    "abc.txt": "c\n__ab__\n",
    "soft.txt": "high quality # soft\nbest\n2::as text\n",
    "animals/small.txt": "cat\nmouse\n",
    "animals/large.txt": "__ab__ whale\n",
    "clothes.txt": "In ${season}, a ${season:warm} coat\n",
    "default.txt": "${season:{spring|fall}} rain\n",
    "kept.txt": "${v?=x} ${v} kept\n",
    "nested.txt": "{a|b}\nc\n",
    "yaml.yaml": "hats:\n- red\n- 3::blue\n- {text: green, weight: 2}\nmore:\n  deep: one\n  1: [2]\n",
    "animals/list.json": '["wolf", "{fox|bear}"]',
    "json.json": '{"tea": ["green", "black"]}',
}

#: From the README and docs/SYNTAX.md of dynamicprompts, and what else its grammar has.
PROMPTS = r"""
{summer|autumn|winter|spring} is coming
{0.5::summer|0.1::autumn|0.3::winter|0.1::spring}
{2$$chocolate|vanilla|strawberry}
{2$$ and $$chocolate|vanilla|strawberry}
{1-2$$ and $$chocolate|vanilla|strawberry}
{-2$$a|b|c} {1-$$a|b}
{4$$a|b|c} {2-1$$a|b} {0$$a|b} {0-1$$a|b}
{2$$ | $$a|b} {2$$a, $$a|b} {3$$-$$a||b}
{ a | b }c{  d|e  }
{a|b|a} {2$$a|b|a} {|a} {a|} {a||b} {} {cat} {9$$cat}
{3::a|1.5::b|.5::c|1.::d} {1.5 ::a|b} {-1::a|b} {5::|a}
{{3::a|b}|c} {2$$3::a|b} {2$$ x$$3::a|b} {2$$a|{b|c}} {{{a|b}|c}|d}
__ab__ is coming
{2$$__ab__} {1$$__ab__} {__ab__} {5$$__ab__}
{1-2$$ and $$__abc__}
{__ab__|z} {2$$__ab__|z}
{2$$ and $$__ab__|z|y}
{2-$$__ab__} {ab, __ab__} {2$$a__ab__}
__nested__ {2$$__nested__}
__abc__ __abc__
__soft__, a cat
__animals/*__
__*/small__ __small__ __anim*__
__animals/[ls]*__ __animals/smal?__ __/ab__ __\ab__
__animals/**__
__hats__ __more/deep__ __tea__ __animals/list__
{2$$__hats__}
${season={summer|autumn}} __clothes__
__clothes(season=winter)__
__clothes(season={winter|fall})__
__default(season=__ab__)__ __default( season = w , x=y )__ __default__
${v=a|b}
${v=a}${v} b
${v={a|b}, c}${v} ${v}
${v=__ab__}${v} ${w:d} ${w: d } ${w:{a|b}}
${ v = a } ${ v }
${v=x}${v?=a}${v} b
${v=y}__kept__
__kept__
${a=b${c}}${c={d|e}} ${a}
${v={a|b}}{2$${${v}|c}}
${person={blond|brunette}, {tall|short}} A ${person} man and a ${person} woman
__${q:ab}__ ${q=ab}__${q}__
%{a photo of ... at night$$ {a cat|a dog}}
%{{x|y} … b$$ {c|d} } %{a$$b} %{a...b...c$$d}
{a%{b...$$c}|d}
a {b|c} # a comment {d|e}
// a comment
/* a comment */ a {b|c}
{a|b} /* c */ d // e
{a|/* x */b} ${v=/* q */a}${v} {a/* x */|b}
x // no comment, http://x.y /* nor this */
{@a|b} {c|d} {e|f}
{c|d} {@a {x|y}|b} {1|2|3|4}
{@2$$a|b|c} {1|2|3|4|5|6|7}
__@ab__ {c|d|e}
{@a|b} {@c|d|e}
{!a|b} {c|d} {!2$$a|b}
{a {@x|y}|b} {c|d}
{2$$@a|b} ~a !b @c
[a|b:0.3] (x:1.3) ((y)) BREAK <lora:x:1> AND c | d } e
(masterpiece:1.2), {1girl|1boy}, [from:to:0.5], \(artist\), <lora:{x|y}:0.8>
a_b_c _d_ a  b  c
""".strip().split("\n")  # fmt: skip

#: What both refuse, and a part of our sentence.
REFUSED = {
    "{a": "not closed",
    "a {b|{c}": "not closed",
    "{a # b|c}": "not closed",
    "{2 $$a|b}": "behind their number",
    "{$$a|b}": "behind their number",
    "{2$$$$a|b}": "behind their number",
    "__x": "__name__",
    "snake__case": "__name__",
    "__ab(": "__name__",
    "{${v=a}|b}": "assignment",
    "${3a=b}": "variable without a name",
    "${v=a|b}${v}": "bar",
    "%{a|b}": "bar",
    "%{a}": "wrap without",
    "a ${v} cat": "variable v",
    "${a=${a}} ${a}": "in itself",
    "__clothes__": "variable season",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wildcards")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def combinatorial(prompt: str, folder: Path, most: int = SOME) -> list[str]:
    """The oracle's texts in their order, each once."""
    texts = CombinatorialPromptGenerator(WildcardManager(folder)).generate(prompt, most)
    return list(dict.fromkeys(texts))


def ours(prompt: str, folder: Path | None, most: int = SOME) -> list[str]:
    return list(itertools.islice(all_of(parse(prompt), Wildcards(folder)), most))


@pytest.mark.parametrize("prompt", [each for each in PROMPTS if each != "${v=a|b}"])
def test_a_prompt_stands_for_what_it_stands_for_in_dynamicprompts(prompt: str, folder: Path) -> None:
    expected = combinatorial(prompt, folder)
    if len(expected) > 1_000 or "@" in prompt:
        # The oracle may repeat texts and go round for ever.
        assert ours(prompt, folder)[: len(expected)] == expected
    else:
        assert ours(prompt, folder) == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "${v=!{a|b}} ${v} and ${v}",
        "${v=!__ab__} ${v} ${v} {c|d}",
        "${w={x|y}} ${v=!{a|b}} ${v}${w}${v}",
        "__{ab|nested}__",
        "__kept__ {c|d}",
        "{~a|b} {c|d}",
        "__~ab__",
    ],
)
def test_what_is_drawn_once_stands_for_all_that_can_be_drawn(prompt: str, folder: Path) -> None:
    """SYNTAX.md lists all of them; the combinatorial generator takes the first alone."""
    generator = RandomPromptGenerator(WildcardManager(folder), seed=1)
    drawn = {generator.generate(prompt)[0] for _ in range(80)}
    # `~` draws: ours are some of what it may draw.
    found = set(ours(prompt, folder))
    assert found <= drawn if "~" in prompt else found == drawn


class TooLongError(BaseException):
    """Raised when the oracle takes too long."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `TooLongError` in what is inside after that time."""

    def stop(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def templates() -> st.SearchStrategy[str]:
    # Not an underscore before a wildcard: `___ab__` is a missing wildcard, text there and a bad line here.
    texts = st.sampled_from(["a", "b", " c", "d ", "(x:1.3)", "_ ", "1", "e, f", "-"])
    names = st.sampled_from(["__ab__", "__animals/*__", "__nested__", "${v:d}", "${v}", "__hats__"])

    def braces(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        taken = st.sampled_from(["", "", "", "2$$", "1-2$$ and $$", "-2$$", "1-$$; $$", "0-1$$", "3$$|$$"])
        weight = st.sampled_from(["", "", "2::", "0.5::", " "])
        option = st.builds(lambda a, b: a + b, weight, inner)
        options = st.lists(option, min_size=1, max_size=4)
        choice = st.builds(lambda how, each: "{" + how + "|".join(each) + "}", taken, options)
        wrap = st.builds(lambda a, b: f"%{{{a}...{a}$${b}}}", texts, inner)
        sequence = st.lists(choice | texts | names | wrap, min_size=1, max_size=3).map("".join)
        return choice | sequence

    return st.recursive(texts | names, braces, max_leaves=10)


@pytest.mark.services
@settings(max_examples=100, deadline=None, derandomize=True)
@given(prompt=templates(), value=st.sampled_from(["{p|q}", "r", "__ab__"]))
def test_made_up_prompts_stand_for_what_they_stand_for_in_dynamicprompts(
    prompt: str, value: str, folder: Path
) -> None:
    prompt = f"${{v={value}}}{prompt}"
    try:
        with within(2):
            expected = combinatorial(prompt, folder, 400)
    except (TooLongError, RuntimeError):
        # The oracle goes round for ever, as for ___ab__ within braces, or breaks off with "generator raised
        # StopIteration", which is no refusal: ours ends.
        with contextlib.suppress(LineError):
            ours(prompt, folder, 400)
        return
    except Exception:  # noqa: BLE001 - the oracle has no error of its own
        with pytest.raises(LineError):
            ours(prompt, folder, 400)
        return
    if not expected:
        # It stands for nothing, or, `{2$$__x__|__x__}` of its syntax guide, for pairs that differ.
        with contextlib.suppress(LineError):
            ours(prompt, folder, 5)
        return
    if len(set(expected)) < 300 and len(found := ours(prompt, folder, 500)) < 400:
        assert found == expected or set(expected) < set(found)


@pytest.mark.parametrize(("prompt", "part"), REFUSED.items())
def test_what_is_not_offered_is_a_bad_line_by_name(prompt: str, part: str, folder: Path) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - the oracle has no error of its own
        combinatorial(prompt, folder)
    with pytest.raises(LineError, match=r".") as error:
        ours(prompt, folder)
    assert part in error.value.reason


@pytest.mark.parametrize("prompt", ["50% off", "$5 and $ and $$", "{a $5|b%}", "cat} | dog"])
def test_marks_that_open_nothing_are_text(prompt: str) -> None:
    assert ours(prompt, None)[0] == prompt.replace("{", "").replace("|b%}", "")


@pytest.mark.parametrize(
    ("prompt", "same"),
    [
        (r"a \{b\|c\}", "a {b|c}"),
        (r"C:\cats \(x\) \_", r"C:\cats \(x\) \_"),
        (r"\__init__ \__ab", "__init__ __ab"),
        (r"\#1 \${v} \%{x\} \$$", "#1 ${v} %{x} $$"),
    ],
)
def test_a_backslash_makes_a_mark_text(prompt: str, same: str) -> None:
    assert ours(prompt, None) == [same]


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("{1-20000$$" + "a|" * 20_000 + "a}", f"{MAX_TAKEN:,}"),
        ("{" + "9" * 5_000 + "$$a|b}", f"{MAX_TAKEN:,}"),
        ("{1-" + "9" * 5_000 + "$$a|b}", f"{MAX_TAKEN:,}"),
        ("{" + "9" * 5_000 + "::a|b}", "weight"),
        ("{" * 5_000 + "a" + "}" * 5_000, f"{MAX_BRACES}"),
        ("{" * 5_000, f"{MAX_BRACES}"),
        ("${v=" * 5_000, "assignment"),
        ("{20$$" + "|".join(f"{{a|b}}{{{'c|' * i}c}}" for i in range(20)) + "}", "combinations"),
        ("{a|{a|a}}" * 40 + "{2$$a|a}", "combinations"),
        ("".join(f"${{v{i}=${{v{i + 1}}}${{v{i + 1}}}}}" for i in range(50)) + "${v50=x}${v0}", ""),
    ],
)
def test_hostile_prompts_are_one_sentence_at_once(prompt: str, part: str) -> None:
    began = time.process_time()
    with pytest.raises(LineError) as error:
        ours(prompt, None, 5)
    assert part in error.value.reason
    assert len(error.value.reason) < 200
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    "prompt",
    ["{a|b}" * 400, "{a}/*" * 20_000, "_" * 100_001 + " a", "\\__" * 30_000, "{a|b} " * 20_000,
     "{" + "a|" * 100_000 + "b}",
     "{2$$" + "|".join(map(str, range(20_000))) + "}", "{a|" * 19 + "b" + "}" * 19],
)  # fmt: skip
def test_long_prompts_take_little_time(prompt: str) -> None:
    began = time.process_time()
    with contextlib.suppress(LineError):
        assert ours(prompt, None, 3)
        assert list(sample(parse(prompt), Wildcards(None), 3, random.Random(1)))
    assert time.process_time() - began < 4


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab{}|\\$_:1-#/*%!@~=?(). ", max_size=50))
def test_every_text_has_texts_or_one_sentence(prompt: str) -> None:
    with contextlib.suppress(LineError):
        assert all(isinstance(text, str) for text in ours(prompt, None, 20))
        for text in sample(parse(prompt), Wildcards(None), 3, random.Random(1)):
            assert text in ours(prompt, None) or "~" in prompt or "@" in prompt


def test_a_sample_is_different_texts_and_all_where_there_are_no_more(folder: Path) -> None:
    for prompt in ("{a|b|c} {d|e|f}", "{2$$__abc__} {d|e|f}", "${v=!{a|b|c}} ${v} ${v} {1|2}"):
        template, wildcards = parse(prompt), Wildcards(folder)
        drawn = list(sample(template, wildcards, 5, random.Random(1)))
        assert len(set(drawn)) == 5
        assert set(drawn) <= set(all_of(template, wildcards))
        assert drawn == list(sample(template, wildcards, 5, random.Random(1)))
        assert drawn != list(sample(template, wildcards, 5, random.Random(2)))
        assert list(sample(template, wildcards, 99, random.Random(1))) == list(all_of(template, wildcards))


def test_weights_count_when_a_sample_is_drawn() -> None:
    template = parse("{99::often|1::seldom}" + "{a|b|c|d}" * 3)
    drawn = list(sample(template, Wildcards(None), 20, random.Random(7)))
    assert sum(text.startswith("often") for text in drawn) > 15


def test_expansion_is_lazy() -> None:
    many = "{" + "|".join(map(str, range(50))) + "}"
    assert ours(" ".join([many] * 20), None, 2)[1].endswith(" 1")
    assert len(set(sample(parse(" ".join([many] * 20)), Wildcards(None), 5, random.Random(1)))) == 5
