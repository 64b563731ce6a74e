from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.csv_cells import neutral, plain


@given(st.text("'=+-@\t\r\n 1.ax") | st.text())
def test_a_cell_comes_back_and_begins_no_formula(text: str) -> None:
    cell = neutral(text)
    assert plain(cell) == text
    # OWASP, "CSV Injection". A number is no formula.
    assert cell[:1] not in tuple("=@\t\r") or not cell
    if cell[:1] in ("+", "-"):
        float(cell)


@pytest.mark.parametrize("value", [-5, -0.5, None, "-5", "-5.25e3", "a=b", "5"])
def test_numbers_and_other_texts_stay(value: object) -> None:
    assert neutral(value) == value


def test_a_formula_is_a_text() -> None:
    assert neutral('=HYPERLINK("http://x")') == '\'=HYPERLINK("http://x")'
