"""Dynamic prompts as version 1 of their syntax had them: runs that were begun with it go on with it.

It changes no more: a run that is resumed must make the jobs that it began with. New runs have
`producer.prompts.dynamic_prompts`. Texts are made as they are asked for, in an order that is always the same.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from producer.prompts.entries import LineError

#: Levels of braces in braces, and of wildcards in wildcards, at most.
MAX_DEPTH = 20
#: Draws for each text of a sample, at most: the same text may be drawn several times.
_DRAWS = 20
#: Texts are counted up to this number.
_MANY = 10**12

#: An escaped character, a brace or bar, or a wildcard.
_TOKEN = re.compile(r"\\[{}|_\\]|[{}|]|__[\w*./ -]+?__")
#: `3::` before an alternative.
_WEIGHT = re.compile(r"\s*(\d+(?:\.\d+)?)::")
#: `2$$`, `1-3$$` or `2$$ and $$` before the first alternative: how many are taken, and what joins them.
_NUMBER = re.compile(r"\s*(\d+)?(?:(-)(\d+)?)?\$\$(?:([^|{}$]*)\$\$)?")


@dataclass(frozen=True)
class Choice:
    """`{a|b}`: one of several alternatives, or some of them."""

    #: The alternatives.
    options: tuple[Template, ...]
    #: How often each is drawn, relative to the others; >= 0.
    weights: tuple[float, ...]
    #: How many are taken, at least and at most.
    least: int = 1
    most: int = 1
    #: What stands between those that are taken.
    separator: str = ", "


@dataclass(frozen=True)
class Wildcard:
    """`__name__`: one line of the files that the name means."""

    #: Relative to the folder of wildcards, without `.txt`; `*` stands for any part of a name.
    name: str


#: The parts of a prompt: plain texts, and what stands for several texts.
Template: TypeAlias = "tuple[str | Choice | Wildcard, ...]"


class Wildcards:
    """A folder of text files with an alternative a line. Each file is read once."""

    def __init__(self, folder: Path | None) -> None:
        """Without a folder every wildcard is a `LineError`."""
        self._folder = folder
        self._known: dict[str, Choice] = {}
        #: How many texts a wildcard stands for, by its name.
        self.sizes: dict[str, int] = {}

    def choice(self, name: str) -> Choice:
        """The alternatives that `__name__` means. Raises `LineError`."""
        if name not in self._known:
            self._known[name] = self._read(name)
        return self._known[name]

    def _read(self, name: str) -> Choice:
        if self._folder is None:
            raise LineError(
                "prompt",
                f"__{name}__ needs a folder of wildcards: add --wildcards DIR, or write \\__{name}__.",
            )
        if ".." in name.split("/") or name.startswith("/"):
            raise LineError("prompt", f"__{name}__ leads out of the folder of wildcards.")
        files = sorted(self._folder.glob(f"{name.strip()}.txt"))
        lines = []
        for file in files:
            try:
                lines += file.read_text("utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise LineError("prompt", f"__{name}__: {file} cannot be read: {error}.") from None
        kept = [line for each in lines if (line := each.strip()) and not line.startswith("#")]
        if not kept:
            raise LineError("prompt", f"__{name}__: there is no {self._folder / name}.txt with a line in it.")
        return _choice([_weighted(line) for line in kept])


def texts(
    prompt: str, negative: str, wildcards: Wildcards, number: int | None, rng: random.Random
) -> Iterator[str]:
    """The texts of both prompts, with \\0 between them; `number` of them, or all. Raises `LineError`."""
    joined: Template = (*parse(prompt), "\0", *parse(negative))
    return all_of(joined, wildcards) if number is None else sample(joined, wildcards, number, rng)


def parse(text: str) -> Template:
    """The parts of a prompt. Braces that are not closed, or have no bar in them, are plain text."""
    if "{" not in text and "__" not in text and "\\" not in text:
        return (text,)
    template, _ = _sequence(_tokens(text), 0, depth=0)
    return template


def all_of(template: Template, wildcards: Wildcards, depth: int = 0) -> Iterator[str]:
    """Every text that a template stands for, lazily. Raises `LineError`."""
    if depth > MAX_DEPTH:
        raise LineError("prompt", f"Wildcards are nested deeper than {MAX_DEPTH} levels: is one in itself?")
    if not template:
        yield ""
        return
    first, rest = template[0], template[1:]
    for head in [first] if isinstance(first, str) else _all_of_part(first, wildcards, depth):
        if not rest:
            yield head
            continue
        for tail in all_of(rest, wildcards, depth):
            yield head + tail


def count(template: Template, wildcards: Wildcards, depth: int = 0) -> int:
    """The number of texts that `all_of` gives, counted up to 10^12. Raises `LineError`."""
    if depth > MAX_DEPTH:
        raise LineError("prompt", f"Wildcards are nested deeper than {MAX_DEPTH} levels: is one in itself?")
    total = 1
    for part in template:
        if isinstance(part, str):
            continue
        if isinstance(part, Choice):
            size = _count_of(part, wildcards, depth)
        elif (size := wildcards.sizes.get(part.name, -1)) < 0:
            size = wildcards.sizes[part.name] = _count_of(wildcards.choice(part.name), wildcards, depth)
        total = min(_MANY, total * size)
    return total


def _count_of(choice: Choice, wildcards: Wildcards, depth: int) -> int:
    sizes = [count(option, wildcards, depth + 1) for option in choice.options]
    if choice.least == choice.most == 1:
        return sum(sizes)
    # The number of ways to pick k: the k-th elementary symmetric polynomial of the sizes.
    ways = [1] + [0] * len(sizes)
    for size in sizes:
        for picked in range(len(sizes), 0, -1):
            ways[picked] = min(_MANY, ways[picked] + ways[picked - 1] * size)
    return sum(ways[choice.least : choice.most + 1])


def sample(template: Template, wildcards: Wildcards, number: int, rng: random.Random) -> Iterator[str]:
    """`number` different texts, drawn at random by weight; all there are where these are not more.

    They may be fewer where some texts are drawn rarely. Raises `LineError`.
    """
    if count(template, wildcards) <= number:
        yield from all_of(template, wildcards)
        return
    seen: set[str] = set()
    for _ in range(number * _DRAWS):
        text = _draw(template, wildcards, rng, 0)
        if text not in seen:
            seen.add(text)
            yield text
        if len(seen) == number:
            return


def _all_of_part(part: Choice | Wildcard, wildcards: Wildcards, depth: int) -> Iterator[str]:
    choice = wildcards.choice(part.name) if isinstance(part, Wildcard) else part
    for size in range(choice.least, choice.most + 1):
        for picked in itertools.combinations(choice.options, size):
            yield from _joined(picked, choice.separator, wildcards, depth + 1)


def _joined(picked: Sequence[Template], separator: str, wildcards: Wildcards, depth: int) -> Iterator[str]:
    if not picked:
        yield ""
        return
    for head in all_of(picked[0], wildcards, depth):
        if len(picked) == 1:
            yield head
            continue
        for tail in _joined(picked[1:], separator, wildcards, depth):
            yield head + separator + tail


def _draw(template: Template, wildcards: Wildcards, rng: random.Random, depth: int) -> str:
    parts = []
    for part in template:
        if isinstance(part, str):
            parts.append(part)
            continue
        choice = wildcards.choice(part.name) if isinstance(part, Wildcard) else part
        # The k largest of u^(1/w) are a weighted sample of k (Efraimidis and Spirakis, 2006).
        keys = [rng.random() ** (1 / weight) if weight else 0.0 for weight in choice.weights]
        order = sorted(range(len(keys)), key=keys.__getitem__, reverse=True)
        picked = order[: rng.randint(choice.least, choice.most)]
        parts.append(
            choice.separator.join(_draw(choice.options[each], wildcards, rng, depth + 1) for each in picked)
        )
    return "".join(parts)


def _weighted(line: str) -> tuple[float, Template]:
    weight = _WEIGHT.match(line)
    return (float(weight[1]), parse(line[weight.end() :])) if weight else (1.0, parse(line))


def _choice(options: Sequence[tuple[float, Template]]) -> Choice:
    return Choice(tuple(option for _, option in options), tuple(weight for weight, _ in options))


def _tokens(text: str) -> list[str]:
    """A prompt's texts, wildcards, escaped characters, bars and braces. Unmatched braces are escaped."""
    tokens, end = [], 0
    for match in _TOKEN.finditer(text):
        if match.start() > end:
            tokens.append(text[end : match.start()])
        tokens.append(match[0])
        end = match.end()
    if end < len(text):
        tokens.append(text[end:])
    opened: list[int] = []
    matched: set[int] = set()
    for number, each in enumerate(tokens):
        if each == "{":
            opened.append(number)
        elif each == "}" and opened:
            if len(opened) <= MAX_DEPTH:
                matched |= {opened[-1], number}
            opened.pop()
    return [
        f"\\{each}" if each in ("{", "}") and number not in matched else each
        for number, each in enumerate(tokens)
    ]


def _sequence(tokens: Sequence[str], at: int, depth: int) -> tuple[Template, int]:
    """The template from token `at` on, and the index of the bar or brace that ends it."""
    parts: list[str | Choice | Wildcard] = []
    while at < len(tokens):
        each = tokens[at]
        if depth and each in ("|", "}"):
            break
        if each == "{":
            found, at = _braces(tokens, at, depth)
            parts += found
            continue
        if each.startswith("__") and len(each) > 4:
            parts.append(Wildcard(each[2:-2]))
        else:
            parts.append(each[1:] if each[0] == "\\" and len(each) == 2 else each)
        at += 1
    return _merged(parts), at


def _braces(tokens: Sequence[str], at: int, depth: int) -> tuple[list[str | Choice | Wildcard], int]:
    """The parts from the brace at `at` to the one that closes it, and the index after that."""
    options: list[Template] = []
    while tokens[at] != "}" or not options:
        option, at = _sequence(tokens, at + 1, depth + 1)
        options.append(option)
    at += 1
    if len(options) == 1:
        return ["{", *options[0], "}"], at
    least = most = 1
    separator = ", "
    if isinstance(head := (options[0] or ("",))[0], str) and (pick := _NUMBER.match(head)):
        options[0] = _merged([head[pick.end() :], *options[0][1:]])
        least = int(pick[1] or 0) if pick[2] or pick[1] else 1
        most = int(pick[3] or len(options)) if pick[2] else least
        separator = pick[4] if pick[4] is not None else separator
    weights = []
    for number, option in enumerate(options):
        weight = _WEIGHT.match(option[0]) if option and isinstance(option[0], str) else None
        weights.append(float(weight[1]) if weight else 1.0)
        if weight:
            options[number] = _merged([str(option[0])[weight.end() :], *option[1:]])
    most = min(most, len(options))
    return [Choice(tuple(options), tuple(weights), min(least, most), most, separator)], at


def _merged(parts: Sequence[str | Choice | Wildcard]) -> Template:
    """Neighbouring texts made one, empty ones left out."""
    merged: list[str | Choice | Wildcard] = []
    for is_text, group in itertools.groupby(parts, key=lambda part: isinstance(part, str)):
        if not is_text:
            merged += group
        elif text := "".join(str(part) for part in group):
            merged.append(text)
    return tuple(merged)
