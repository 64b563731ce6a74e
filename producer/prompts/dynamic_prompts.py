"""What a prompt file's line becomes: its alternatives, its seeds, and the cells of a grid.

    {red|green|blue}        one picture for each; they nest, and {2$$a|b|c} takes two of them at a time
    __colours__             one for each line of colours.txt in the folder of wildcards
    --images 4              four seeds a prompt
    --grid steps=20,30      values crossed with all of the above

The syntax is that of dynamic prompts: weights (`{3::red|blue}`) count when a sample is drawn, `\\{` and
`\\__` are the characters themselves, and braces without a bar are left as they are. Expansion is lazy:
however many combinations a line has, what is in memory is one. The order is always the same, and so are
samples and seeds, which are drawn from the line itself: a run that is resumed or repeated makes the same
jobs, and a line that was not edited keeps its pictures. Nothing here knows Redis.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from producer.prompts.reader import Entry, LineError

#: Wildcards in wildcards, and braces in braces, at most.
MAX_DEPTH = 20
#: Times that a sample is drawn again where it has been drawn already, for each one that is wanted.
_DRAWS = 20
#: How many alternatives are counted; above, a line has "many".
_MANY = 10**12

_MARK = re.compile(r"\\[{}|_\\]|[{}|]|__[\w*./ -]+?__")
_WEIGHT = re.compile(r"\s*(\d+(?:\.\d+)?)::")
_PICK = re.compile(r"\s*(\d+)?(?:(-)(\d+)?)?\$\$(?:([^|{}$]*)\$\$)?")


@dataclass(frozen=True)
class Choice:
    """`{a|b}`: one of several, or with `least` and `most` some of them, joined by `joint`."""

    #: The alternatives.
    options: tuple[Template, ...]
    #: How often each is drawn, relative to the others.
    weights: tuple[float, ...]
    least: int = 1
    most: int = 1
    joint: str = ", "


@dataclass(frozen=True)
class Wildcard:
    """`__name__`: one line of a file."""

    name: str


#: A text with holes in it.
Template: TypeAlias = "tuple[str | Choice | Wildcard, ...]"


class Wildcards:
    """A folder of text files with alternatives, one a line; None: there is no such folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._known: dict[str, Choice] = {}
        #: How many texts a wildcard can be, by its name.
        self.sizes: dict[str, int] = {}

    @property
    def digest(self) -> str:
        """A hash over all files, hexadecimal: with other files a run is another one."""
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(self._folder.rglob("*.txt")) if self._folder else ():
            data = path.read_bytes()
            digest.update(f"{path.relative_to(self._folder or path)}\0{len(data)}\0".encode() + data)
        return digest.hexdigest()

    def choice(self, name: str) -> Choice:
        """The alternatives that `__name__` means; * stands for any part of a name. Raises `LineError`."""
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


def parse(text: str) -> Template:
    """The template in a prompt. Braces that are not closed, or hold no bar, are plain text."""
    if "{" not in text and "__" not in text and "\\" not in text:
        return (text,)
    template, _ = _sequence(_tokens(text), 0, depth=0)
    return template


def all_of(template: Template, wildcards: Wildcards, depth: int = 0) -> Iterator[str]:
    """Every text that a template can be, lazily. Raises `LineError`."""
    if depth > MAX_DEPTH:
        raise LineError("prompt", f"Wildcards are nested deeper than {MAX_DEPTH} levels: is one in itself?")
    if not template:
        yield ""
        return
    first, rest = template[0], template[1:]
    for head in [first] if isinstance(first, str) else _all_of_hole(first, wildcards, depth):
        if not rest:
            yield head
            continue
        for tail in all_of(rest, wildcards, depth):
            yield head + tail


def count(template: Template, wildcards: Wildcards, depth: int = 0) -> int:
    """How many texts `all_of` gives, up to a very large number. Raises `LineError`."""
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
    """Up to `number` different texts, drawn at random by weight; all of them where there are no more."""
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


@dataclass(frozen=True)
class Variant:
    """One job to be: its fields, and where it is in the grid."""

    #: Job fields, the seed among them.
    fields: dict[str, Any]
    #: The values of the grid's axes.
    grid: Mapping[str, Any]


@dataclass(frozen=True)
class Variations:
    """How lines become jobs. `expand` is the same for the same line and options, every time."""

    #: Job fields of lines that do not name them.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    #: Seeds a prompt, >= 1.
    images: int = 1
    #: The first seed of prompts that name none; None: drawn from the line.
    seed_start: int | None = None
    #: Axis -> its values. All are crossed.
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    #: Combinations to draw from a line's alternatives; None: all of them.
    sample: int | None = None
    #: Where `__name__` is looked up.
    wildcards: Wildcards = field(default_factory=lambda: Wildcards(None))
    #: Leave braces and wildcards as they are.
    literal: bool = False

    def expand(self, entry: Entry, file: int) -> Iterator[Variant]:
        """The jobs of one line of file number `file`. Raises `LineError` for a wildcard that is not there."""
        merged = {**self.defaults, **entry.fields}
        if "metadata" in self.defaults and isinstance(entry.fields.get("metadata"), dict):
            merged["metadata"] = self.defaults["metadata"] | entry.fields["metadata"]
        cells = self._cells()
        for texts in self._texts(merged, f"{file}\0{entry.line}\0"):
            for image in range(self.images * entry.images):
                seed = self._seed(merged, texts, image, f"{file}\0{entry.line}\0")
                for cell in cells:
                    yield Variant({**merged, **texts, "seed": seed, **cell}, cell)

    def _cells(self) -> list[dict[str, Any]]:
        return [
            dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())
        ]

    def _seed(self, fields: Mapping[str, Any], texts: Mapping[str, Any], image: int, place: str) -> Any:
        start = fields.get("seed", self.seed_start)
        if start is None:
            return _hash(f"seed\0{place}{image}\0{texts.get('prompt', '')}")
        # What is no number is left as it is, for the job's own error to say so.
        return start + image if type(start) is int else start

    def _texts(self, fields: Mapping[str, Any], place: str) -> Iterator[dict[str, Any]]:
        texts = {name: fields[name] for name in ("prompt", "negative_prompt") if name in fields}
        if self.literal or not all(isinstance(text, str) for text in texts.values()):
            yield texts
            return
        templates = {name: parse(text) for name, text in texts.items()}
        if all(len(each) == 1 and isinstance(each[0], str) for each in templates.values()):
            yield {name: each[0] for name, each in templates.items()}
            return
        # Both are one template, parted by a character that no prompt may hold: sampling is over their pairs.
        joined: Template = (*templates.get("prompt", ()), "\0", *templates.get("negative_prompt", ()))
        if self.sample is None:
            found = all_of(joined, self.wildcards)
        else:
            rng = random.Random(_hash(f"sample\0{place}{texts}"))  # noqa: S311 - repeatable on purpose
            found = sample(joined, self.wildcards, self.sample, rng)
        for text in found:
            prompt, _, negative = text.partition("\0")
            yield {"prompt": prompt} | ({"negative_prompt": negative} if "negative_prompt" in texts else {})


def _hash(text: str) -> int:
    """32 bits that depend on `text` alone."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "big"
    )


def _all_of_hole(hole: Choice | Wildcard, wildcards: Wildcards, depth: int) -> Iterator[str]:
    choice = wildcards.choice(hole.name) if isinstance(hole, Wildcard) else hole
    for size in range(choice.least, choice.most + 1):
        for picked in itertools.combinations(choice.options, size):
            yield from _joined(picked, choice.joint, wildcards, depth + 1)


def _joined(picked: Sequence[Template], joint: str, wildcards: Wildcards, depth: int) -> Iterator[str]:
    if not picked:
        yield ""
        return
    for head in all_of(picked[0], wildcards, depth):
        if len(picked) == 1:
            yield head
            continue
        for tail in _joined(picked[1:], joint, wildcards, depth):
            yield head + joint + tail


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
            choice.joint.join(_draw(choice.options[each], wildcards, rng, depth + 1) for each in picked)
        )
    return "".join(parts)


def _weighted(line: str) -> tuple[float, Template]:
    weight = _WEIGHT.match(line)
    return (float(weight[1]), parse(line[weight.end() :])) if weight else (1.0, parse(line))


def _choice(options: Sequence[tuple[float, Template]]) -> Choice:
    return Choice(tuple(option for _, option in options), tuple(weight for weight, _ in options))


def _tokens(text: str) -> list[str]:
    """Texts, wildcards, escaped characters, bars and braces. Braces that do not match are texts."""
    tokens, end = [], 0
    for match in _MARK.finditer(text):
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
    """The template from token `at` up to the bar or brace that ends it, and where that is."""
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
    """What stands between the brace at `at` and the one that closes it, and what comes after."""
    options: list[Template] = []
    while tokens[at] != "}" or not options:
        option, at = _sequence(tokens, at + 1, depth + 1)
        options.append(option)
    at += 1
    if len(options) == 1:
        return ["{", *options[0], "}"], at
    least = most = 1
    joint = ", "
    if isinstance(head := (options[0] or ("",))[0], str) and (pick := _PICK.match(head)):
        options[0] = _merged([head[pick.end() :], *options[0][1:]])
        least = int(pick[1] or 0) if pick[2] or pick[1] else 1
        most = int(pick[3] or len(options)) if pick[2] else least
        joint = pick[4] if pick[4] is not None else joint
    weights = []
    for number, option in enumerate(options):
        weight = _WEIGHT.match(option[0]) if option and isinstance(option[0], str) else None
        weights.append(float(weight[1]) if weight else 1.0)
        if weight:
            options[number] = _merged([str(option[0])[weight.end() :], *option[1:]])
    most = min(most, len(options))
    return [Choice(tuple(options), tuple(weights), min(least, most), most, joint)], at


def _merged(parts: Sequence[str | Choice | Wildcard]) -> Template:
    """Neighbouring texts made one, empty ones left out."""
    merged: list[str | Choice | Wildcard] = []
    for is_text, group in itertools.groupby(parts, key=lambda part: isinstance(part, str)):
        if not is_text:
            merged += group
        elif text := "".join(str(part) for part in group):
            merged.append(text)
    return tuple(merged)


def size_of_grid(grid: Mapping[str, Sequence[Any]]) -> int:
    """Cells of a grid."""
    return math.prod(len(values) for values in grid.values())
