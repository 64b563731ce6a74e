"""Prompts in AUTOMATIC1111's syntax, made at random: the same ones each time."""

from __future__ import annotations

import random

_WORDS = (
    *("a cat", "two small dogs", "masterpiece", "best quality", "1girl", "cinematic light", "oil painting"),
    *(
        "by night",
        "red",
        "a castle on a hill",
        "8k",
        "sharp focus",
        "extremely detailed",
        "fog",
        "\u732b",
        "caf\u00e9",
    ),
    *(r"a cat \(animal\)", r"\[sic\]", "it's 10:30", "50% off!", "<3", "a\nb"),
)


def _phrase(rng: random.Random) -> str:
    return ", ".join(rng.choice(_WORDS) for _ in range(rng.choice((1, 1, 2, 3))))


def _number(rng: random.Random) -> str:
    return rng.choice(("0.5", "0.25", ".7", "3", "6", "1.0", " 0.3 ", "40", "0"))


def _text(rng: random.Random, depth: int) -> str:
    kind = rng.random()
    if depth == 0 or kind < 0.35:
        return _phrase(rng)
    inner = _text(rng, depth - 1)
    if kind < 0.45:
        return f"({inner})"
    if kind < 0.65:
        return f"({inner}:{rng.choice(('1.3', '0.8', ' 1.21 ', '-0.5', '1'))})"
    if kind < 0.7:
        return f"[{inner}]"
    if kind < 0.78:
        return f"[{inner}:{_text(rng, depth - 1)}:{_number(rng)}]"
    if kind < 0.82:
        return f"[{inner}:{rng.choice((':', ''))}{_number(rng)}]"
    if kind < 0.88:
        return f"[{inner}|{_text(rng, depth - 1)}{rng.choice(('', '|', '|fog'))}]"
    return f"{inner}, {_text(rng, depth - 1)}"


def prompt(rng: random.Random) -> str:
    """A prompt of one part: short or up to a few hundred tokens, some with a bracket too many."""
    pieces = [_text(rng, 3) for _ in range(rng.choice((1, 2, 2, 3, 6, 12)))]
    text = pieces[0]
    for piece in pieces[1:]:
        text += rng.choice((", ", ", ", ",", " ", " BREAK ")) + piece
    if rng.random() < 0.1:
        # Apart from all else: next to a bracket, the web UI's parser is free to read it in more than one way.
        text += rng.choice((" )", " (", " ]", " [", " :)"))
    return text


def prompts(count: int, seed: int = 1) -> list[str]:
    """So many different prompts of one part."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[prompt(rng)] = None
    return list(found)
