"""Texts in cells of CSV that no spreadsheet takes for formulas: an apostrophe before what begins one."""

from __future__ import annotations

import re
from typing import Any

#: Cells that begin a formula in a spreadsheet (OWASP, CSV Injection), and those with apostrophes before that.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?\d{1,40}(\.\d{1,40})?(e[+-]?\d{1,3})?", re.IGNORECASE)


def neutral(cell: Any) -> Any:
    """A cell that no spreadsheet takes for a formula; numbers stay. `plain` of it is the cell again."""
    if isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell):
        return f"'{cell}"
    return cell


def plain(cell: str) -> str:
    """The cell that `neutral` was given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
