"""Names that are like another one are found, however many there are."""

from __future__ import annotations

import difflib
import random
import string

from worker.contract.spelling import _COMPARED, Names, distance


def test_of_many_names_the_near_ones_are_those_that_comparing_all_would_find() -> None:
    drawn = random.Random(1)
    names = ["".join(drawn.choices(string.ascii_letters + "_ ", k=12)) for _ in range(5 * _COMPARED)]
    many = Names(names)
    for name in names[:50]:
        typo = name[:5] + name[6:] + "x"
        lower = {each.lower(): each for each in names}
        assert (
            many.near(typo)
            == [lower[each] for each in difflib.get_close_matches(typo.lower(), lower, 3)]
            == [name]
        )
    assert many.near("0000") == []
    assert Names(["Detail"]).near("DETIAL") == ["Detail"]


def test_letters_to_change_are_counted_up_to_three() -> None:
    assert [distance("detail", each) for each in ("detail", "detial", "details", "dtls", "x")] == [
        0,
        1,
        1,
        3,
        3,
    ]
