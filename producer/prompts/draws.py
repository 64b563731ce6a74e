"""One text of a dynamic prompt after the other: drawn by weight, or in turn."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from producer.prompts.dynamic_prompts import (
    Choice,
    Part,
    Scope,
    Template,
    Variable,
    Wildcard,
    Wrap,
    wildcard_in,
)
from producer.prompts.entries import LineError
from producer.prompts.expansion_context import (
    MAX_STEPS,
    Context,
    NoTextError,
    assigned,
    joined,
    numbers_of,
    options_of,
    value_of,
    wrapped,
)


def looped(part: Choice | Wildcard, context: Context) -> Iterator[str]:
    """Texts without end: in turn for `@`, drawn for `~`."""
    if part.sampler == "@":
        yield from _turns((replace(part, sampler=""),), context)
    plain = (replace(part, sampler=""),)
    while True:
        for _ in range(MAX_STEPS):
            context.work.step()
            try:
                text = drawn(plain, context)
            except NoTextError:
                continue
            yield text
            break


def _turns(template: Template, context: Context) -> Iterator[str]:
    """The texts of a template without end, each part's own in turn."""
    context = context.deeper()
    parts, variables, immediate = assigned(template, context)
    fixed = {each.name: (next(_turns(each.value, context)),) for each in immediate}
    inner = replace(context, variables={**context.variables, **variables, **fixed})
    loops = [_turns_of(part, inner) for part in parts]
    while True:
        yield joined([next(loop) for loop in loops], "")


def _turns_of(part: Part, context: Context) -> Iterator[str]:
    if isinstance(part, Choice | Wildcard) and part.sampler == "~":
        yield from looped(part, context)
    elif isinstance(part, Choice):
        yield from _round([_choice_turns(part, context)])
    elif isinstance(part, Wildcard):
        name = next(_turns(part.name, context))
        inner = context.within(f"The wildcard {name}", dict(part.variables))
        yield from _round([(_turns(value, inner) for value, _ in context.wildcards.values(name))])
    elif isinstance(part, Variable):
        yield from _turns(*value_of(part, context))
    elif isinstance(part, Wrap):
        both = zip(_turns(part.wrapper, context), _turns(part.inner, context), strict=True)
        yield from (wrapped(wrapper, inner) for wrapper, inner in both)
    elif isinstance(part, Scope):
        yield from _turns(part.template, context)
    else:
        yield from itertools.repeat(part if isinstance(part, str) else "")


def _choice_turns(choice: Choice, context: Context) -> Iterator[Iterator[str]]:
    wildcard = wildcard_in(choice.options)
    name = next(_turns(wildcard.name, context)) if wildcard else ""
    options, _, inner = options_of(choice, name, context)
    for number in numbers_of(choice, options):
        for picked in itertools.permutations(options, number):
            loops = [_turns(option, inner) for option in picked]
            yield _row(loops, choice.separator)


def _row(loops: Sequence[Iterator[str]], separator: str) -> Iterator[str]:
    while True:
        yield joined([next(loop) for loop in loops], separator)


def _round(loops: Sequence[Iterator[Iterator[str]]]) -> Iterator[str]:
    """The next text of each in turn, again and again."""
    known: list[Iterator[str]] = []
    for loop in itertools.chain.from_iterable(loops):
        if len(known) >= MAX_STEPS:
            raise LineError("prompt", f"{{@...}} has more than {MAX_STEPS:,} combinations: take fewer.")
        known.append(loop)
        yield next(loop)
    if not known:
        raise LineError("prompt", "{@...} stands for no text: it takes more than there are different ones.")
    for loop in itertools.cycle(known):
        yield next(loop)


def drawn(template: Template, context: Context) -> str:
    """A text, drawn by weight. Raises `NoTextError` where one is taken twice, and `LineError`."""
    context = context.deeper()
    parts, variables, immediate = assigned(template, context)
    fixed = {each.name: (drawn(each.value, context),) for each in immediate}
    inner = replace(context, variables={**context.variables, **variables, **fixed})
    return joined([part if isinstance(part, str) else _drawn_part(part, inner) for part in parts], "")


def _drawn_part(part: Part, context: Context) -> str:
    if isinstance(part, Variable):
        return drawn(*value_of(part, context))
    if isinstance(part, Wrap):
        return wrapped(drawn(part.wrapper, context), drawn(part.inner, context))
    if isinstance(part, Scope):
        return drawn(part.template, context)
    if isinstance(part, Wildcard):
        part = Choice(((part,),), (1.0,))
    if not isinstance(part, Choice):
        return ""
    wildcard = wildcard_in(part.options)
    name = drawn(wildcard.name, context) if wildcard else ""
    options, weights, inner = options_of(part, name, context)
    numbers = numbers_of(part, options)
    number = context.rng.randint(numbers[0], numbers[-1])
    texts = [drawn(options[each], inner) for each in _drawn_numbers(weights, number, context.rng)]
    if len(set(texts)) < number:
        raise NoTextError
    return joined(texts, part.separator)


def _drawn_numbers(weights: Sequence[float], number: int, rng: random.Random) -> list[int]:
    """`number` different indexes, by weight."""
    if number == 1 and any(weights):
        return rng.choices(range(len(weights)), weights)
    # The k largest of u^(1/w) are a weighted sample of k (Efraimidis and Spirakis, 2006).
    keys = [rng.random() ** (1 / weight) if weight else 0.0 for weight in weights]
    return sorted(range(len(keys)), key=keys.__getitem__, reverse=True)[:number]
