"""The subjects: the emoji with their names, and how often each is shown in training.

Names and tags come from emojibase-data 17.0.0 (`en/data.json`). The words that people use instead of the
Unicode name ("car" for "automobile") come from `common_subjects.txt` beside this file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.demo.training import packages

#: Words for the most common subjects, in order of importance.
COMMON_FILE = Path(__file__).with_name("common_subjects.txt")
#: Words of `COMMON_FILE`, from the first on, over which the score is taken.
SCORED = 200

#: Weight in training by emoji group (emojibase's numbers). A common subject has `_COMMON_WEIGHT` instead.
#: People (group 1, 361 pictures, mostly one for each profession and gender) and symbols (8) are rarely asked
#: for.
_GROUP_WEIGHT = {0: 1.2, 1: 0.5, 3: 1.6, 4: 1.6, 5: 1.2, 6: 1.4, 7: 1.4, 8: 0.5, 9: 0.8}
_COMMON_WEIGHT = 9.0
#: The 24 clock faces, which differ by their hands alone.
_CLOCK = re.compile(r"o'clock|-thirty$")
#: Pictures that may share a tag. A tag of more pictures ("face", "person") is too general for a caption.
_MAX_TAG_PICTURES = 12


@dataclass(frozen=True)
class Subject:
    """One emoji."""

    #: The common word if there is one, else the Unicode name. Unique, lower case.
    name: str
    #: Other unambiguous names, lower case.
    synonyms: tuple[str, ...]
    #: Words that fit it and some other pictures, lower case.
    tags: tuple[str, ...]
    #: Relative frequency in training, > 0.
    weight: float
    #: Whether its name is one of `common_subjects.txt`.
    common: bool
    #: The picture's file name in the npm package, without folder.
    filename: str


def common_words() -> dict[str, str]:
    """The words of `common_subjects.txt`, in its order: word -> Unicode name, lower case."""
    words: dict[str, str] = {}
    for line in COMMON_FILE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            word, _, label = (part.strip() for part in line.partition("="))
            words[word] = clean(label or word)
    return words


def scored_words() -> list[str]:
    """The common subjects over which the score is taken."""
    return list(common_words())[:SCORED]


def clean(text: str) -> str:
    """A name as captions write it: lower case, plain apostrophes, no colons, quotes or brackets."""
    text = text.lower().replace("’", "'")
    return " ".join(re.sub(r"[“”\":()!&]", " ", text).split())


def load_subjects(folder: Path) -> list[Subject]:
    """All subjects with a picture, without national flags and skin tones. `folder` holds the npm tarballs."""
    archive = packages.fetch(packages.NAMES, folder)
    entries: list[dict[str, Any]] = json.loads(
        packages.members(archive, "package/en/data.json")["en/data.json"]
    )
    pictures = packages.members(packages.fetch(packages.PICTURES, folder), ".webp")
    files = {_without_variation(Path(name).stem): Path(name).name for name in pictures}
    kept = []
    for entry in entries:
        file = files.get(_without_variation(str(entry["hexcode"]).lower()))
        if file is not None and not entry["label"].startswith("flag:"):
            kept.append((entry, file))
    return _named(kept)


def _without_variation(code_points: str) -> str:
    """Code points joined by "-", without U+FE0F, which only one of the two packages writes."""
    return "-".join(part for part in code_points.split("-") if part != "fe0f")


def _named(entries: list[tuple[dict[str, Any], str]]) -> list[Subject]:
    """The entries as subjects, with the name, synonyms and tags that captions use."""
    word_of: dict[str, list[str]] = {}
    for word, label in common_words().items():
        word_of.setdefault(label, []).append(word)
    labels = [clean(entry["label"]) for entry, _ in entries]
    if unknown := sorted(set(word_of) - set(labels)):
        raise ValueError(
            f"common_subjects.txt has labels that no emoji has: {unknown}. Correct or remove them."
        )
    owned = set(labels) | set(common_words())
    pictures = Counter(tag for entry, _ in entries for tag in {clean(tag) for tag in entry.get("tags", [])})
    subjects = []
    for label, (entry, file) in zip(labels, entries, strict=True):
        words = word_of.get(label, [])
        tags = sorted({clean(tag) for tag in entry.get("tags", [])} - owned - {""})
        # A common word may be the label of another emoji, too: the other one is then called "... emoji".
        names = [*words, *([label] if label not in common_words() or label in words else [])]
        names = list(dict.fromkeys(names)) or [f"{label} emoji"]
        subjects.append(
            Subject(
                name=names[0],
                synonyms=(*names[1:], *(tag for tag in tags if pictures[tag] == 1)),
                tags=tuple(tag for tag in tags if 1 < pictures[tag] <= _MAX_TAG_PICTURES),
                weight=_weight(label, entry, bool(words)),
                common=bool(words),
                filename=file,
            )
        )
    return subjects


def _weight(label: str, entry: dict[str, Any], common: bool) -> float:
    if common:
        return _COMMON_WEIGHT
    return 0.4 if _CLOCK.search(label) else _GROUP_WEIGHT.get(entry.get("group", 8), 0.5)
