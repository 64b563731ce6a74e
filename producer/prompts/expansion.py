"""The texts that a dynamic prompt stands for: all of them in order, or a sample by weight.

Texts are made as they are asked for, one at a time, however many there are, and their order is always the
same: that of the combinatorial sampler of the package dynamicprompts 0.31, without texts that were there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from producer.prompts.draws import drawn, looped
from producer.prompts.dynamic_prompts import Choice, Scope, Template, Variable, Wildcard, Wrap, wildcard_in
from producer.prompts.entries import LineError
from producer.prompts.expansion_context import (
    Context,
    NoTextError,
    assigned,
    joined,
    looping,
    numbers_of,
    options_of,
    value_of,
    wrapped,
)
from producer.prompts.wildcards import Wildcards

#: Texts of one prompt that are remembered, so that each comes once.
_REMEMBERED = 100_000
#: Draws for each text of a sample, at most: the same text may be drawn several times.
_DRAWS = 20


def all_of(template: Template, wildcards: Wildcards, rng: random.Random | None = None) -> Iterator[str]:
    """Every text that a template stands for, lazily, each once. Raises `LineError`, also where there is none.

    `rng` draws what `{~a|b}` and `__~name__` say.
    """
    context = Context(wildcards, rng or random.Random(0))  # noqa: S311 - repeatable on purpose
    seen: set[str] = set()
    text = None
    for text in _texts(template, context):
        if text in seen:
            context.work.step()
            continue
        if len(seen) < _REMEMBERED:
            seen.add(text)
        context.work.steps = 0
        yield text
    if text is None:
        raise LineError("prompt", "It stands for no text: it takes more than there are different ones.")


def sample(template: Template, wildcards: Wildcards, number: int, rng: random.Random) -> Iterator[str]:
    """`number` different texts, drawn at random by weight; all there are where these are not more.

    They may be fewer where some texts are drawn rarely. Raises `LineError`.
    """
    first = list(itertools.islice(all_of(template, wildcards), number + 1))
    if len(first) <= number:
        yield from first
        return
    context = Context(wildcards, rng)
    seen: set[str] = set()
    for _ in range(number * _DRAWS):
        context.work.steps = 0
        try:
            text = drawn(template, context)
        except NoTextError:
            continue
        if text not in seen:
            seen.add(text)
            yield text
        if len(seen) == number:
            return
    if not seen:
        yield first[0]


def _texts(template: Template, context: Context) -> Iterator[str]:
    context = context.deeper()
    parts, variables, immediate = assigned(template, context)
    if len(parts) == 1 and (choice := looping(parts[0])):
        # Nothing is beside it whose combinations it could go along with.
        parts = (replace(choice, sampler=""),)
    for values in _product([each.value for each in immediate], context):
        fixed = {each.name: (value,) for each, value in zip(immediate, values, strict=True)}
        inner = replace(context, variables={**context.variables, **variables, **fixed})
        for texts in _product([(part,) for part in parts], inner):
            yield joined(texts, "")


def _product(templates: Sequence[Template], context: Context) -> Iterator[list[str]]:
    """One text of each template, in all combinations; the last one changes first.

    `{@a|b}` and `{~a|b}` take no part in that: each combination of the others takes their next text.
    """
    texts = [""] * len(templates)
    crossed, loops = [], []
    for number, template in enumerate(templates):
        if len(template) == 1 and (part := looping(template[0])):
            loops.append((number, looped(part, context)))
        elif len(template) <= 1 and (not template or isinstance(template[0], str)):
            texts[number] = str(template[0]) if template else ""
        else:
            crossed.append(number)
    iterators: list[Iterator[str]] = []
    while True:
        if len(iterators) == len(crossed):
            for number, loop in loops:
                texts[number] = next(loop)
            yield texts.copy()
        else:
            iterators.append(_texts_of(templates[crossed[len(iterators)]], context))
        while iterators:
            if (text := next(iterators[-1], None)) is not None:
                texts[crossed[len(iterators) - 1]] = text
                break
            iterators.pop()
            context.work.step()
        else:
            return


def _texts_of(template: Template, context: Context) -> Iterator[str]:
    """As `_texts`; a template of one part has no variables of its own."""
    if len(template) != 1:
        return _texts(template, context)
    part = template[0]
    if isinstance(part, Choice):
        return _texts_of_choice(part, context.deeper())
    if isinstance(part, Wildcard):
        return _texts_of_wildcard(part, context)
    if isinstance(part, Variable):
        return _texts_of(*value_of(part, context))
    if isinstance(part, Wrap):
        inner = context.deeper()
        return (wrapped(*texts) for texts in _product([part.wrapper, part.inner], inner))
    if isinstance(part, Scope):
        return _texts(part.template, context)
    return iter([part] if isinstance(part, str) else [""])


def _texts_of_wildcard(wildcard: Wildcard, context: Context) -> Iterator[str]:
    for name in _texts(wildcard.name, context):
        inner = context.within(f"The wildcard {name}", dict(wildcard.variables))
        for value, _ in context.wildcards.values(name):
            yield from _texts(value, inner)


def _texts_of_choice(choice: Choice, context: Context) -> Iterator[str]:
    wildcard = wildcard_in(choice.options)
    for name in _texts(wildcard.name, context) if wildcard else ("",):
        options, _, inner = options_of(choice, name, context)
        for number in numbers_of(choice, options):
            for picked in itertools.permutations(options, number):
                for texts in _product(picked, inner):
                    if len(set(texts)) == number:
                        yield joined(texts, choice.separator)
                    else:
                        context.work.step()
