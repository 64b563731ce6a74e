"""How near words are to each other, for the names in "did you mean"."""

from __future__ import annotations

import difflib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Final

#: Names that are compared one by one, at most: those of more that share most groups of three letters.
_COMPARED: Final = 300


def distance(one: str, other: str) -> int:
    """Letters to insert, delete, replace or exchange with a neighbour, 0 to 3 (optimal string alignment)."""
    if abs(len(one) - len(other)) > 2:
        return 3
    before: list[int] = []
    row = list(range(len(other) + 1))
    for at, letter in enumerate(one, 1):
        before, above, row = row, before, [at]
        for column, each in enumerate(other, 1):
            cost = min(before[column] + 1, row[-1] + 1, before[column - 1] + (letter != each))
            if at > 1 and column > 1 and letter == other[column - 2] and one[at - 2] == each:
                cost = min(cost, above[column - 2] + 1)
            row.append(cost)
    return min(row[-1], 3)


class Names:
    """Names that are looked through for those that are like another one, however many they are."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_lower = {unicodedata.normalize("NFC", name).lower(): name for name in names}
        self._by_letters: dict[str, list[str]] = defaultdict(list)
        if len(self._by_lower) > _COMPARED:
            for name in self._by_lower:
                for letters in set(_threes(name)):
                    self._by_letters[letters].append(name)

    def near(self, name: str) -> list[str]:
        """Names that look like `name` in any case and form of Unicode, the nearest first, three at most."""
        lower = unicodedata.normalize("NFC", name).lower()
        compared: Iterable[str] = self._by_lower
        if self._by_letters:
            shared = Counter[str]()
            for letters in set(_threes(lower)):
                shared.update(self._by_letters.get(letters, ()))
            compared = (each for each, _ in shared.most_common(_COMPARED))
        return [self._by_lower[each] for each in difflib.get_close_matches(lower, list(compared), 3)]


def _threes(name: str) -> Iterator[str]:
    padded = f" {name} "
    return (padded[at : at + 3] for at in range(len(padded) - 2))
