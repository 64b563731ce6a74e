"""AUTOMATIC1111's prompt syntax, as text: what a prompt of it says, before any token of it is known.

    a (red:1.3) [cat:dog:0.5], by night BREAK on a roof AND a full moon :0.8

A prompt is taken apart in the web UI's own order (its version 1.10.1: modules/processing_scripts/comments.py,
extra_networks.py and prompt_parser.py):

    comments ─► extra networks ─► `parts` by AND ─► each one's `schedule` by step ─► each text's `pieces`

A negative prompt has no extra networks and no parts. Written from the rules; tests/worker/contract/
test_a1111_syntax.py has expectations from the web UI itself. Time is linear in the text, but a bracket
costs as much as it holds: `check` limits how many are open at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

#: Parts by AND in a prompt, at most: each one is a row of the model's forward.
MAX_PARTS = 16
#: Brackets that are open at a time, at most: what is in a bracket is read once more for each one around it.
MAX_OPEN = 100
#: The weight of a piece of text and of an AND part, at most, and at least with a minus.
MAX_WEIGHT = 1_000
#: Characters of the different texts that a prompt has by step, at most: each counts as much as the longest
#: one, since an encoder makes them equally long.
MAX_TEXTS = 64_000
#: Characters that BREAK counts as in a text that changes by step: a chunk's tokens.
BREAK_SIZE = 75

_COMMENT = re.compile(r"#[^\n]*")
_NETWORK = re.compile(r"<(\w+):([^>]+)>")
_AND = re.compile(r"\bAND\b")
_PART_WEIGHT = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")
_BRACKET = re.compile(r"\\.|[()\[\]]", re.DOTALL)
_CLOSES = {")": "(", "]": "["}
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


def without_comments(text: str) -> str:
    """The text without what stands between a # and the end of its line."""
    return _COMMENT.sub("", text)


def networks(prompt: str) -> tuple[str, ...]:
    """The extra networks that a prompt asks for, as they are written: `<lora:name:0.8>`."""
    return tuple(found[0] for found in _NETWORK.finditer(without_comments(prompt)))


def check(prompt: str, negative: str, steps: int | None, done: int = 0) -> None:
    """Refuse what is not offered, or no number, or too much, with a `ValueError`.

    Its text is the end of a sentence that begins with "prompt_syntax". `steps`: None where not yet known;
    `done`: as in `schedule`.
    """
    if asked := networks(prompt):
        shown = ", ".join(dict.fromkeys(each if len(each) <= 60 else f"{each[:57]}..." for each in asked[:3]))
        # LoRAs are out of the prompt by now, but for those whose kind is written otherwise.
        is_lora = all(each[1:6].lower() in ("lora:", "lyco:") for each in asked)
        remedy = "write <lora:...> in small letters" if is_lora else "not offered, take it out"
        raise ValueError(f"is a1111, and the prompt asks for {shown}: {remedy}")
    composed = parts(prompt)
    if len(composed) > MAX_PARTS:
        raise ValueError(
            f"is a1111, and AND parts the prompt into {len(composed)}, the limit is {MAX_PARTS}: take fewer"
        )
    for part in composed:
        if not abs(part.weight) <= MAX_WEIGHT:
            raise ValueError(
                f"is a1111, and a part of the prompt ends with the weight :{part.weight:g}, the limit is "
                f"{MAX_WEIGHT:,} with either sign: take a smaller number, or end the prompt without one"
            )
    texts = [*(part.text for part in composed), without_comments(negative)]
    if (most := max(map(_most_open, texts))) > MAX_OPEN:
        raise ValueError(
            f"is a1111, and the prompt has {most:,} brackets open at a time, the limit is {MAX_OPEN}: close "
            r"them sooner, or write \( and \[ for brackets"
        )
    for text in texts if steps is None else _texts_by_step(texts, steps, done):
        _check_weights(text)


def _most_open(text: str) -> int:
    """How many brackets are open at a time, at most; in linear time."""
    most = 0
    now = {"(": 0, "[": 0}
    for match in _BRACKET.finditer(text):
        word = match[0]
        if word in now:
            now[word] += 1
            most = max(most, sum(now.values()))
        elif word in _CLOSES:
            now[_CLOSES[word]] = max(0, now[_CLOSES[word]] - 1)
    return most


def _texts_by_step(texts: Sequence[str], steps: int, done: int) -> set[str]:
    """All texts that these are by step. Raises `ValueError` where they are too much."""
    found: set[str] = set()
    size = 0
    for text in texts:
        different = {each for _, each in schedule(text, steps, done)}
        if len(different) > 1:
            size += len(different) * max(len(each) + BREAK_SIZE * each.count("BREAK") for each in different)
        found |= different
    if size > MAX_TEXTS:
        raise ValueError(
            f"is a1111, and the prompt's texts by step have {size:,} characters, each text as long as the "
            f"longest and BREAK as {BREAK_SIZE}, the limit is {MAX_TEXTS:,}: let it change less often, or "
            "make it shorter"
        )
    return found


def _check_weights(text: str) -> None:
    try:
        found = pieces(text)
    except ValueError as error:
        raise ValueError(
            f'is a1111, and the prompt has the weight ":{str(error)[:40]})", which is no number: '
            r"write one such as (x:1.2), or \( and \) for brackets"
        ) from None
    for piece in found:
        if not abs(piece.weight) <= MAX_WEIGHT:
            raise ValueError(
                f"is a1111, and brackets in the prompt give the weight {piece.weight:g}, the limit is "
                f"{MAX_WEIGHT:,} with either sign: take a smaller one such as (x:1.2), or fewer brackets"
            )


def without_networks(prompt: str) -> str:
    """The prompt without the extra networks that it asks for."""
    return _NETWORK.sub("", prompt)


# --- AND ----------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """One of the prompts that AND composes to one (Liu et al., 2022)."""

    text: str
    #: Its share of the guidance; may be negative.
    weight: float


def parts(prompt: str) -> list[Part]:
    """The parts of a prompt, at least one. A weight is a number at the end of a part: `a moon :0.8`."""
    return [_part(text) for text in _AND.split(without_networks(without_comments(prompt)))]


def _part(text: str) -> Part:
    text = text.rstrip()
    before, colon, number = text.rpartition(":")
    if colon and _PART_WEIGHT.fullmatch(number.strip()):
        return Part(before.rstrip(), float(number.strip()))
    return Part(text, 1.0)


# --- by step ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Switch:
    """`[before:after:when]`."""

    before: Sequence[_Node]
    after: Sequence[_Node]
    when: str

    def ends(self, steps: int, done: int) -> Iterator[int]:
        """The step that it switches after, unless that is before the first one."""
        if (end := self._end(steps, done)) >= 1:
            yield end

    def at(self, step: int, steps: int, done: int) -> Sequence[_Node]:
        """What stands in its place at a step, from 1."""
        return self.before if step <= self._end(steps, done) else self.after

    def _end(self, steps: int, done: int) -> int:
        # A number with a point is a share of the steps, another one a step. Both go on in a second pass.
        value = float(self.when)
        value = (value - (done > 0)) * steps if "." in self.when else value - done
        return int(max(-1.0, min(steps, value)))


@dataclass(frozen=True)
class _Turns:
    """`[a|b]`: each option for one step, in turns."""

    options: Sequence[Sequence[_Node]]

    def ends(self, steps: int, done: int) -> Iterator[int]:
        """Every step."""
        yield from range(1, steps + 1)

    def at(self, step: int, steps: int, done: int) -> Sequence[_Node]:
        """What stands in its place at a step, from 1."""
        return self.options[(step - 1) % len(self.options)]


_Node: TypeAlias = str | _Switch | _Turns

_TOKEN = re.compile(r"(?:[^\\\[\]():|]|\\.)+|[\[\]():|]")
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")


@dataclass
class _Bracket:
    """A bracket that is open, and what it holds so far: sections, with a mark after each but the last."""

    opening: str
    sections: list[list[_Node]] = field(default_factory=lambda: [[]])
    marks: str = ""

    def nodes(self) -> Iterator[_Node]:
        """All of it as it is written."""
        yield self.opening
        for section, mark in zip(self.sections, [*self.marks, ""], strict=True):
            yield from section
            yield mark

    def closed(self) -> list[_Node] | None:
        """What it means when it closes; None where it means nothing."""
        sections, marks = self.sections, self.marks
        if not marks or (self.opening == "(" and marks == ":"):
            return [*self.nodes(), ")" if self.opening == "(" else "]"]
        if self.opening == "[" and set(marks) == {"|"}:
            return [_Turns(sections)]
        number = None
        if (
            self.opening == "["
            and marks in (":", "::")
            and all(isinstance(each, str) for each in sections[-1])
        ):
            number = _NUMBER.fullmatch("".join(map(str, sections[-1])))
        if number is None:
            return None
        return [_Switch(sections[0] if len(marks) == 2 else [], sections[-2], number[1])]


def schedule(text: str, steps: int, done: int = 0) -> list[tuple[int, str]]:
    """The texts that a part is by step: (end, text), by `end`, the last one's being `steps` (>= 1).

    `done`: steps of the pass before, in a second one: there the step 25 of 20 is the fifth, and the share
    1.5 of the steps the half (hires fix, modules/prompt_parser.py of version 1.10); 0: it is the first.

    A text is that of all steps up to its end, counted from 0 as the web UI counts them: `[a:b:5]` is "a" in
    the first six. A bracket that is not closed rightly is text, and a `|` outside brackets makes all text.
    """
    nodes = _nodes(text)
    if nodes is None:
        return [(steps, text)]
    ends = {steps}
    left: list[_Node] = list(nodes)
    while left:
        node = left.pop()
        if isinstance(node, _Switch):
            ends.update(node.ends(steps, done))
            left += [*node.before, *node.after]
        elif isinstance(node, _Turns):
            ends.update(node.ends(steps, done))
            left += [each for option in node.options for each in option]
    return [(end, _text_at(nodes, end, steps, done)) for end in sorted(ends)]


def _text_at(nodes: Sequence[_Node], step: int, steps: int, done: int) -> str:
    texts: list[str] = []
    left = list(reversed(nodes))
    while left:
        node = left.pop()
        if isinstance(node, str):
            texts.append(node)
        else:
            left += reversed(node.at(step, steps, done))
    return "".join(texts)


def _nodes(text: str) -> list[_Node] | None:
    """The text with what changes by step taken out; None where it cannot be read."""
    top: list[_Node] = []
    stack: list[_Bracket] = []

    def give_up() -> bool:
        """Let all open brackets be text, since none of them can close rightly. False: that is no text."""
        for bracket in stack:
            top.extend(bracket.nodes())
        readable = not any("|" in bracket.marks for bracket in stack)
        stack.clear()
        return readable

    at = 0
    for match in _TOKEN.finditer(text):
        if match.start() != at:
            return None  # A backslash with nothing after it.
        at, word = match.end(), match[0]
        if word in "([":
            stack.append(_Bracket(word))
            continue
        if word in ":|" and stack:
            stack[-1].marks += word
            stack[-1].sections.append([])
            continue
        if word == "|":
            return None
        if word in ")]" and stack:
            closed = None
            if stack[-1].opening == _CLOSES[word]:
                closed = stack[-1].closed()
            if closed is not None:
                stack.pop()
                (stack[-1].sections[-1] if stack else top).extend(closed)
                continue
            if not give_up():
                return None
        (stack[-1].sections[-1] if stack else top).append(word)
    if at != len(text) or not give_up():
        return None
    return top


# --- weights ------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A piece of a text, whose tokens have one weight; or, without a text, BREAK: a new chunk begins."""

    text: str | None
    weight: float


_EMPHASIS = re.compile(r"\\[()\[\]\\]?|[()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")
#: What a pair of round brackets multiplies the weight with; square ones divide by it.
_STEP = 1.1


def pieces(text: str) -> list[Piece]:
    """The pieces of a text, at least one, neighbours of one weight as one.

    Raises `ValueError`, with the number, for a weight such as `(x:1.2.3)`.
    """
    texts: list[str | None] = []
    weights: list[float] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        for index in range(start, len(weights)):
            weights[index] *= factor

    for match in _EMPHASIS.finditer(text):
        word, number = match[0], match[1]
        if word.startswith("\\"):
            texts.append(word[1:])
            weights.append(1.0)
        elif word in open_at:
            open_at[word].append(len(texts))
        elif number is not None and open_at["("]:
            multiply(open_at["("].pop(), _weight(number))
        elif word in _CLOSES and open_at[_CLOSES[word]]:
            multiply(open_at[_CLOSES[word]].pop(), _STEP if word == ")" else 1 / _STEP)
        else:
            for index, words in enumerate(_BREAK.split(word)):
                texts += [None, words] if index else [words]
                weights += [-1.0, 1.0] if index else [1.0]
    for bracket, factor in (("(", _STEP), ("[", 1 / _STEP)):
        for start in open_at[bracket]:
            multiply(start, factor)
    return _merged(texts, weights)


def _merged(texts: Sequence[str | None], weights: Sequence[float]) -> list[Piece]:
    merged: list[tuple[list[str], float]] = []
    for text, weight in zip(texts, weights, strict=True):
        if merged and merged[-1][1] == weight:
            merged[-1][0].append("BREAK" if text is None else text)
        else:
            merged.append((["BREAK" if text is None else text], weight))
    # As the web UI has it: BREAK is one while nothing has changed its weight. In brackets it is a word.
    return [
        Piece(None if words == ["BREAK"] and weight == -1 else "".join(words), weight)
        for words, weight in merged
    ] or [Piece("", 1.0)]


def _weight(number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(number)
    return weight
