"""The calculation in docs/sizing.md gives what the page says that it gives."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from tests.markdown import codes

PAGE = Path(__file__).parent.parent / "docs" / "sizing.md"


def printed(calculation: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(calculation, {})  # noqa: S102 - our own page
    return said.getvalue()


def test_the_cost_of_a_thousand_pictures() -> None:
    (calculation,) = (code.text for code in codes(PAGE) if code.language == "python")
    (*_, result) = (code.text for code in codes(PAGE) if code.language == "text")
    assert printed(calculation) == result
    (said,) = re.findall(r"\(`images_s = (.+)`, `mb = (.+)`\) .* give (.+), .* is (.+)\.\n", PAGE.read_text())
    images_s, mb, total, gpu = said
    with_sdxl = re.sub(r"images_s, load = [\d.]+", f"images_s, load = {images_s}", calculation)
    with_sdxl = re.sub(r"mb, months, views = [\d.]+", f"mb, months, views = {mb}", with_sdxl)
    assert re.fullmatch(rf"GPU {gpu} .* = {total}\n", printed(with_sdxl))


def test_the_memory_of_a_million_submissions_a_day() -> None:
    (sum_,) = re.findall(r"evenly: ([\d,x+/. ]+) = 1\.0 GB", PAGE.read_text())
    value = eval(sum_.replace(",", "").replace("x", "*"))  # noqa: S307 - our own page
    assert round(value / 1e9, 1) == 1.0
