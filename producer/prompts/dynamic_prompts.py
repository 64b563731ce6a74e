"""Dynamic prompts: a prompt with alternatives, wildcards and variables, and its parts.

    {red|green}  {2$$ and $$a|b|c}  {3::a|b}    alternatives; how many, what joins them, weights
    __colours__  __animals/*__  __x(v=red)__    a line of the files that the name means
    ${v={red|blue}}  ${v=!{red|blue}}  ${v}     a variable: drawn at each use; drawn once; used
    %{a photo of ... at night$$ a cat}          a text around another one
    # comment                                   and // or /* */ before a part and behind one

The syntax is that of the package dynamicprompts 0.31 (sd-dynamic-prompts). A backslash before a character or
mark of the syntax makes it plain text; that is our own. What dynamicprompts refuses is refused by name, but
for `%` and `$` that open nothing. A text is read in one pass, without going back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from producer.prompts.entries import LineError

#: The version of the syntax. A change to what a prompt stands for, or to the order, is a new number: a run
#: goes on with the version that it was begun with.
SYNTAX: Final = 2
#: Braces in braces, at most.
MAX_BRACES: Final = 20
#: Alternatives that are taken at once, at most: the number before `$$`.
MAX_TAKEN: Final = 1_000
#: The largest weight.
MAX_WEIGHT: Final = 1e9


@dataclass(frozen=True)
class Choice:
    """`{a|b}`: one of several alternatives, or some of them in any order."""

    #: The alternatives, each once.
    options: tuple[Template, ...]
    #: How often each is drawn, relative to the others; >= 0.
    weights: tuple[float, ...]
    #: How many are taken, at least and at most.
    least: int = 1
    most: int = 1
    #: What stands between those that are taken.
    separator: str = ","
    #: "@": each text takes the next one; "~": each draws one; else they are crossed.
    sampler: str = ""


@dataclass(frozen=True)
class Wildcard:
    """`__name__`: one line of the files that the name means."""

    #: What the name is made of.
    name: Template
    #: As for `Choice`.
    sampler: str = ""
    #: Variables that its lines see.
    variables: tuple[tuple[str, Template], ...] = ()


@dataclass(frozen=True)
class Assignment:
    """`${v=value}`: the whole prompt around it sees the variable."""

    name: str
    value: Template
    #: `=!`: one text for all uses.
    is_immediate: bool
    #: `?=`: a variable that is there already stays.
    keeps: bool


@dataclass(frozen=True)
class Variable:
    """`${v}` or `${v:default}`."""

    name: str
    default: Template | None


@dataclass(frozen=True)
class Wrap:
    """`%{a ... b$$c}`: c in the place of the dots."""

    wrapper: Template
    inner: Template


@dataclass(frozen=True)
class Scope:
    """A prompt whose variables no other part sees."""

    template: Template


Part: TypeAlias = "str | Choice | Wildcard | Assignment | Variable | Wrap | Scope"
#: The parts of a prompt, one after the other.
Template: TypeAlias = "tuple[Part, ...]"

_ESCAPED = re.compile(r"\\(__(?:(?:(?!__)[^(){}#$%\\])+__)?|\$\$|[$%]\{|[{}|#])")
_TEXT = re.compile(r"[^{}|$%#_\\]+")
_BLANKS = re.compile(r"\s*")
#: `2$$`, `1-3$$`, `-3$$`, `1-$$`, with ` and $$` behind it: how many are taken, and what joins them.
_TAKEN = re.compile(r"(?:(\d+)-(\d+)|-(\d+)|(\d+)(-?))\$\$(?:([^${}]+)\$\$)?", re.ASCII)
_WEIGHT = re.compile(r"(\d+\.?\d*|\.\d+)::", re.ASCII)
_NAME = re.compile(r"\s*([A-Za-z_-][A-Za-z0-9_-]*)\s*(\?=|=|:|\})(!?)")
_WILDCARD_TEXT = re.compile(r"(?:(?!__)[^(){}#$%])+")
_VARIABLES = re.compile(r"\(([^)]+)\)__")

#: Where a template ends: nowhere, at a bar or brace, at a brace, at `$$`.
_PROMPT, _OPTION, _VALUE, _WRAPPER = "prompt", "option", "value", "wrapper"


def parse(text: str) -> Template:
    """The parts of a prompt. Raises `LineError` that names what is not offered."""
    return _Reader(text).template(_PROMPT) if is_dynamic(text) else (text,)


def is_dynamic(text: str) -> bool:
    """Whether a prompt may have anything of the syntax in it: most have nothing."""
    return (
        "{" in text
        or "__" in text
        or "#" in text
        or "\\" in text
        or ("/" in text and text.lstrip().startswith(("//", "/*")))
    )


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        #: Where the last comment of the form /* */ ends: none is searched for behind it.
        self._last_comment = text.rfind("*/")

    def template(self, kind: str) -> Template:
        """The parts from here to what ends a template of that kind, which is not read."""
        parts: list[Part] = []
        is_boundary = True
        while True:
            if is_boundary or self._text.startswith("#", self._at):
                self._skip_comments()
            if self._at >= len(self._text) or self._ends(kind):
                return merged(parts)
            is_boundary = True
            if self._text.startswith("{", self._at):
                parts.append(self._braces())
            elif self._text.startswith("${", self._at):
                parts.append(self._variable(kind))
            elif self._text.startswith("%{", self._at):
                parts.append(self._wrap())
            elif self._text.startswith("__", self._at):
                parts.append(self._wildcard())
            else:
                parts.append(self._plain())
                is_boundary = False

    def _ends(self, kind: str) -> bool:
        char = self._text[self._at]
        if kind == _PROMPT:
            return False
        if char == "}" or (char == "|" and kind == _OPTION):
            return True
        if char == "|":
            raise self._error("a bar outside of its own braces: write {a|b} there, as in ${v={a|b}}")
        if not self._text.startswith("$$", self._at):
            return False
        if kind == _WRAPPER:
            return True
        raise self._error("$$ in braces that is not behind their number: write {2$$a|b}, or \\$$")

    def _plain(self) -> str:
        if escaped := _ESCAPED.match(self._text, self._at):
            self._at = escaped.end()
            return escaped[1]
        text = _TEXT.match(self._text, self._at)
        end = text.end() if text else self._at + 1
        plain, self._at = self._text[self._at : end], end
        return plain

    def _braces(self) -> Choice:
        start = self._open(1)
        sampler = self._sampler()
        taken = self._taken()
        found: dict[Template, float] = {}
        number = 0
        while True:
            self._skip_blanks()
            weight = self._weight()
            option = self.template(_OPTION)
            found[option] = found.get(option, 0.0) + weight
            number += 1
            if self._closes(start):
                break
        least, most, separator = taken or (1, 1, ",")
        least, most = sorted((least, number if most < 0 else most))
        options = tuple(found)
        if number > 1 or wildcard_in(options) is None:
            least, most = min(least, number), min(most, number)
        return Choice(options, tuple(found.values()), least, most, separator, sampler)

    def _closes(self, start: int) -> bool:
        """Whether a brace ends the braces from `start` on here, and not a bar."""
        if self._at >= len(self._text):
            raise self._error("a brace that is not closed: close it, or write \\{", start)
        self._at += 1
        if self._text[self._at - 1] == "|":
            return False
        self._depth -= 1
        return True

    def _open(self, length: int) -> int:
        """Read an opening mark. Returns where it is."""
        start = self._at
        self._depth += 1
        if self._depth > MAX_BRACES:
            raise self._error(f"braces in braces, deeper than {MAX_BRACES} levels")
        self._at += length
        self._skip_blanks()
        return start

    def _sampler(self) -> str:
        char = self._text[self._at : self._at + 1]
        if char not in ("@", "~", "!"):
            return ""
        self._at += 1
        return char

    def _taken(self) -> tuple[int, int, str] | None:
        match = _TAKEN.match(self._text, self._at)
        if not match:
            return None
        both_least, both_most, upto, exactly, onwards, separator = match.groups()
        for digits in (both_least, both_most, upto, exactly):
            if digits and (len(digits.lstrip("0")) > 4 or int(digits[-9:]) > MAX_TAKEN):
                raise self._error(f"a number before $$ above {MAX_TAKEN:,}, the limit: take fewer")
        self._at = match.end()
        least = int(both_least or exactly or 1)
        most = int(both_most or upto or (-1 if onwards else least))
        return least, most, "," if separator is None else separator

    def _weight(self) -> float:
        match = _WEIGHT.match(self._text, self._at)
        if not match:
            return 1.0
        if (weight := float(match[1])) > MAX_WEIGHT:
            raise self._error(f"a weight above {MAX_WEIGHT:,.0f}, the limit: write a smaller one")
        self._at = match.end()
        return weight

    def _variable(self, kind: str) -> Assignment | Variable:
        start = self._open(2)
        match = _NAME.match(self._text, self._at)
        if not match:
            raise self._error("a variable without a name: write ${name=value} or ${name}, or \\${", start)
        name, operator, immediate = match.groups()
        self._at = match.end() - len(immediate)
        if operator == "}":
            self._depth -= 1
            self._at = match.end() - len(immediate)
            return Variable(name, None)
        is_assignment = operator != ":"
        if is_assignment and kind != _PROMPT:
            raise self._error("an assignment in braces: it has to stand outside of them", start)
        self._at += len(immediate) if is_assignment else 0
        self._skip_blanks()
        value = self.template(_VALUE)
        self._closes(start)
        if not is_assignment:
            return Variable(name, value)
        return Assignment(name, value, bool(immediate), operator == "?=")

    def _wrap(self) -> Wrap:
        start = self._open(2)
        wrapper = self.template(_WRAPPER)
        if not self._text.startswith("$$", self._at):
            raise self._error("a wrap without $$: write %{a ... b$$c}, or \\%{", start)
        self._at += 2
        self._skip_blanks()
        inner = self.template(_VALUE)
        self._closes(start)
        return Wrap(wrapper, inner)

    def _wildcard(self) -> Wildcard:
        start = self._at
        self._at += 2
        sampler = self._sampler()
        name: list[Part] = []
        while True:
            if text := _WILDCARD_TEXT.match(self._text, self._at):
                self._at = text.end()
                name.append(text[0])
            elif self._text.startswith("{", self._at):
                name.append(self._braces())
            elif self._text.startswith("${", self._at):
                variable = self._variable(_VALUE)
                assert isinstance(variable, Variable)  # noqa: S101 - assignments are refused there
                name.append(Variable(variable.name, variable.default or (variable.name,)))
            else:
                break
        variables: tuple[tuple[str, Template], ...] = ()
        if name and (given := _VARIABLES.match(self._text, self._at)):
            self._at = given.end()
            variables = tuple(_given(given[1]))
        elif name and self._text.startswith("__", self._at):
            self._at += 2
        else:
            raise self._error("__ that opens a wildcard and does not end one: write __name__, or \\__", start)
        return Wildcard(merged(name), sampler, variables)

    def _skip_blanks(self) -> None:
        match = _BLANKS.match(self._text, self._at)
        self._at = match.end() if match else self._at

    def _skip_comments(self) -> None:
        """Skip comments, and the blanks before each."""
        while True:
            match = _BLANKS.match(self._text, self._at)
            start = match.end() if match else self._at
            if self._text.startswith(("#", "//"), start):
                end = self._text.find("\n", start)
                self._at = len(self._text) if end < 0 else end
            elif self._text.startswith("/*", start) and start + 2 <= self._last_comment:
                self._at = self._text.index("*/", start + 2) + 2
            else:
                return

    def _error(self, what: str, at: int | None = None) -> LineError:
        at = self._at if at is None else at
        shown = self._text[at : at + 20]
        return LineError("prompt", f'"{shown}" at character {at + 1} is {what}.')


def wildcard_in(options: Sequence[Template]) -> Wildcard | None:
    """The wildcard that is all of the alternatives: of `{2$$__name__}` two of its lines are taken."""
    part = options[0][0] if len(options) == 1 and len(options[0]) == 1 else None
    return part if isinstance(part, Wildcard) else None


def _given(text: str) -> Iterator[tuple[str, Template]]:
    """The variables of `__name(v=value,w=value)__`."""
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        yield name.strip(), parse(value.strip())


def merged(parts: Sequence[Part]) -> Template:
    """Neighbouring texts made one, empty ones left out."""
    found: list[Part] = []
    texts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if text := "".join(texts):
            found.append(text)
        texts = []
        found.append(part)
    if text := "".join(texts):
        found.append(text)
    return tuple(found)
