"""How near two words are to each other, for the names in "did you mean"."""

from __future__ import annotations


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
