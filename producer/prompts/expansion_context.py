"""What the texts of a dynamic prompt depend on, and what the ways to make them have in common."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from producer.prompts.dynamic_prompts import (
    Assignment,
    Choice,
    Part,
    Template,
    Variable,
    Wildcard,
    wildcard_in,
)
from producer.prompts.entries import LineError
from producer.prompts.wildcards import Wildcards

#: Templates in templates, wildcards and variables included, at most.
MAX_DEPTH = 60
#: Steps between two texts, at most: combinations that are no text, such as the same one taken twice.
MAX_STEPS = 100_000
#: Characters in a text, at most: far more than a prompt may have.
MAX_TEXT = 100_000
#: Where the inner text of a wrap goes: dots, or one of the characters for them.
_DOTS = re.compile("[\u1801\u2026\u22ee\u22ef\u22f0\u22f1\ufe19]+|\\.{3,}")


class NoTextError(Exception):
    """Raised when what was drawn is no text: the same one was taken twice."""


@dataclass
class Work:
    """Steps since the last text."""

    steps: int = 0

    def step(self) -> None:
        """Count a step. Raises `LineError` where there are too many without a text."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise LineError("prompt", f"No text was found in {MAX_STEPS:,} combinations: take fewer at once.")


@dataclass(frozen=True)
class Context:
    """What the texts of a template depend on."""

    wildcards: Wildcards
    #: Draws what `{~a|b}` says, and samples.
    rng: random.Random
    variables: Mapping[str, Template] = field(default_factory=dict)
    #: Names of the wildcards and variables that the template is in.
    inside: frozenset[str] = frozenset()
    depth: int = 0
    work: Work = field(default_factory=Work)

    def within(self, name: str, variables: Mapping[str, Template] | None = None) -> Context:
        """The context of a wildcard's or variable's text. Raises `LineError` where it is in itself."""
        if name in self.inside:
            raise LineError("prompt", f"{name} is in itself: it would never end.")
        return replace(
            self, inside=self.inside | {name}, variables={**self.variables, **(variables or {})}
        ).deeper()

    def deeper(self) -> Context:
        """The context one level deeper. Raises `LineError`."""
        if self.depth >= MAX_DEPTH:
            raise LineError("prompt", f"Dynamic prompts are nested deeper than {MAX_DEPTH} levels.")
        self.work.step()
        return replace(self, depth=self.depth + 1)


def assigned(template: Template, context: Context) -> tuple[Template, dict[str, Template], list[Assignment]]:
    """The parts without assignments, the variables that these make, and those that are drawn at once."""
    variables: dict[str, Template] = {}
    immediate: dict[str, Assignment] = {}
    for part in template:
        if isinstance(part, Assignment):
            variables.pop(part.name, None)
            immediate.pop(part.name, None)
            if part.keeps and part.name in context.variables:
                variables[part.name] = context.variables[part.name]
            elif part.is_immediate:
                immediate[part.name] = part
            else:
                variables[part.name] = part.value
    parts = tuple(part for part in template if not isinstance(part, Assignment))
    return parts, variables, list(immediate.values())


def looping(part: Part) -> Choice | Wildcard | None:
    """The part, if it is one that takes its next text each time: `{@a|b}` and `{~a|b}`."""
    return part if isinstance(part, Choice | Wildcard) and part.sampler in ("@", "~") else None


def options_of(
    choice: Choice, name: str, context: Context
) -> tuple[Sequence[Template], Sequence[float], Context]:
    """The alternatives, their weights and context; of `{2$$__name__}` the values of that name."""
    wildcard = wildcard_in(choice.options)
    if wildcard is None:
        return choice.options, choice.weights, context
    values = context.wildcards.values(name)
    inner = context.within(f"The wildcard {name}", dict(wildcard.variables))
    return [value for value, _ in values], [weight for _, weight in values], inner


def numbers_of(choice: Choice, options: Sequence[Template]) -> range:
    """How many of the alternatives may be taken: of a wildcard no more than it has."""
    if wildcard_in(choice.options) is None:
        return range(choice.least, choice.most + 1)
    return range(min(choice.least, len(options)), min(choice.most, len(options)) + 1)


def value_of(variable: Variable, context: Context) -> tuple[Template, Context]:
    """What a variable stands for, and its context. Raises `LineError` where it is not there or in itself."""
    value = context.variables.get(variable.name, variable.default)
    if value is None:
        raise LineError(
            "prompt",
            f"There is no variable {variable.name}: write ${{{variable.name}=...}} before it, or a default, "
            f"${{{variable.name}:...}}.",
        )
    return value, context.within(f"The variable {variable.name}")


def joined(texts: Sequence[str], separator: str) -> str:
    """The texts with the separator between them; it does not begin or end what is made of several."""
    if len(texts) == 1:
        return texts[0]
    if sum(map(len, texts)) > MAX_TEXT:
        raise LineError("prompt", f"A text is longer than {MAX_TEXT:,} characters.")
    text = separator.join(texts)
    return text.removeprefix(separator).removesuffix(separator) if separator else text


def wrapped(wrapper: str, inner: str) -> str:
    """The inner text in the place of the dots, or behind the wrapper where it has none."""
    match = _DOTS.search(wrapper)
    start, end = (match.start(), match.end()) if match else (len(wrapper), len(wrapper))
    return wrapper[:start] + inner + wrapper[end:]
