"""Scenes and their captions: what a training picture shows, in one of many wordings.

The scene (subjects, sizes, background) is drawn first, and then described, so a caption is always true.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from worker.demo.training.subjects import Subject

#: Background colours by name, sRGB 0..255. A caption that names none means the first, white.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (24, 24, 28),
    "gray": (148, 152, 158),
    "red": (226, 58, 58),
    "orange": (250, 136, 40),
    "yellow": (255, 218, 77),
    "green": (72, 178, 92),
    "blue": (58, 120, 228),
    "light blue": (168, 216, 250),
    "purple": (134, 80, 212),
    "pink": (250, 168, 200),
    "brown": (136, 94, 62),
}
#: Words for the three sizes. A caption without one means the middle size.
SIZES: tuple[tuple[str, ...], ...] = (
    ("small", "small", "little", "tiny"),
    ("",),
    ("big", "big", "large", "huge"),
)
SMALL, MEDIUM, BIG = range(3)

_COLOUR_WORDS = {"gray": ("gray", "grey"), "light blue": ("light blue", "sky blue")}
_KINDS = ("picture", "image", "photo", "drawing", "illustration", "3d render", "painting", "icon", "emoji")
_PRAISE = ("cute", "happy", "nice", "beautiful", "shiny", "funny", "lovely", "friendly", "fluffy", "colorful")
_STYLES = ("high quality", "4k", "cartoon style", "3d", "digital art", "highly detailed", "cute", "simple")
_BACKGROUND_FORMS = (
    "on a {} background",
    "on a {} background",
    "on a {} background",
    "with a {} background",
    "on {}",
    "against a {} background",
    "in front of a {} background",
    "on a plain {} background",
)
_JOINS = ("and", "and", "and", "and", "next to", "beside", "with")


@dataclass(frozen=True)
class Scene:
    """What one training picture shows, and its caption."""

    #: The caption. Empty: the picture trains the unconditional prediction that guidance needs.
    caption: str
    #: One or two indexes into the list of subjects, left to right.
    subjects: tuple[int, ...]
    #: One of SMALL, MEDIUM, BIG per subject.
    sizes: tuple[int, ...]
    #: Index into `BACKGROUNDS`.
    background: int


class SceneWriter:
    """Draws scenes with captions. Equal seeds give equal scenes."""

    def __init__(self, subjects: list[Subject], seed: int) -> None:
        self._subjects = subjects
        self._random = random.Random(seed)  # noqa: S311 (training data, no secret)
        self._everything = range(len(subjects))
        self._weights = _running_sum([subject.weight for subject in subjects])
        self._common = [index for index, subject in enumerate(subjects) if subject.common] or [0]

    def draw(self) -> Scene:
        """One scene: 74% one subject, 26% two; 8% have an empty caption."""
        rng = self._random
        background, words = self._background()
        if rng.random() < 0.74:
            subjects: tuple[int, ...] = (self._any(),)
            sizes: tuple[int, ...] = (rng.choices((SMALL, MEDIUM, BIG), (30, 50, 20))[0],)
            text = self._phrase(subjects[0], sizes[0])
        else:
            subjects, sizes, text = self._pair()
        if rng.random() < 0.15:
            kind = rng.choice(_KINDS)
            text = f"{_article(kind)} {kind} of {text}"
        text += words
        if rng.random() < 0.06:
            text += f", {rng.choice(_STYLES)}"
        return Scene("" if rng.random() < 0.08 else text, subjects, sizes, background)

    def _any(self) -> int:
        return self._random.choices(self._everything, cum_weights=self._weights)[0]

    def _pair(self) -> tuple[tuple[int, ...], tuple[int, ...], str]:
        rng = self._random
        left = rng.choice(self._common) if rng.random() < 0.75 else self._any()
        if rng.random() < 0.08:
            words = SIZES[size := rng.choices((SMALL, MEDIUM), (1, 4))[0]]
            return (left, left), (size, size), f"two {rng.choice(words)} {plural(self._subjects[left].name)}"
        right = rng.choice(self._common) if rng.random() < 0.75 else self._any()
        sizes = (
            tuple(rng.choices((SMALL, MEDIUM, BIG), (1, 4, 1), k=2))
            if rng.random() < 0.3
            else (MEDIUM, MEDIUM)
        )
        words_left, words_right = self._phrase(left, sizes[0]), self._phrase(right, sizes[1])
        return (left, right), sizes, f"{words_left} {rng.choice(_JOINS)} {words_right}"

    def _phrase(self, subject: int, size: int) -> str:
        """The subject with its size: "a small cat"."""
        rng = self._random
        name = self._name(self._subjects[subject])
        adjectives = [word for word in (rng.choice(SIZES[size]),) if word]
        if rng.random() < 0.08:
            adjectives.insert(rng.randint(0, len(adjectives)), rng.choice(_PRAISE))
        words = " ".join([*adjectives, name])
        form = rng.random()
        if form < 0.35:
            return words
        return f"the {words}" if form < 0.4 else f"{_article(words)} {words}"

    def _name(self, subject: Subject) -> str:
        rng = self._random
        choice = rng.random()
        if subject.tags and choice < (0.02 if subject.common else 0.1):
            return rng.choice(subject.tags)
        if subject.synonyms and choice < 0.25:
            return rng.choice(subject.synonyms)
        return subject.name

    def _background(self) -> tuple[int, str]:
        """The background's index and the words for it, which are empty for most white backgrounds."""
        rng = self._random
        if rng.random() < 0.6:
            return 0, ""
        index = rng.randrange(len(BACKGROUNDS))
        name = list(BACKGROUNDS)[index]
        word = rng.choice(_COLOUR_WORDS.get(name, (name,)))
        if rng.random() < 0.1:
            return index, f", {word} background"
        words = rng.choice(_BACKGROUND_FORMS).format(word)
        return index, " " + (words.replace("a orange", "an orange"))


def plural(name: str) -> str:
    """The English plural by rule, without exceptions: "cats", "boxes", "candies"."""
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es" if not name.endswith("s") or name.endswith("ss") else name
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


def _article(words: str) -> str:
    return "an" if words[:1] in "aeiou" else "a"


def _running_sum(values: list[float]) -> list[float]:
    total, sums = 0.0, []
    for value in values:
        total += value
        sums.append(total)
    return sums
