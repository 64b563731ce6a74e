"""The limits of a number, as an error names them: both, whichever of them a value is beyond."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from annotated_types import Ge, Gt, Le, Lt

from worker.contract.stored_jobs import NarrowedTo

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

#: Kinds of pydantic's findings that are about a limit.
_BEYOND = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
#: And those that are about a number's form.
_NO_NUMBER = ("int_", "float_", "finite_number")


def limits_of(metadata: Iterable[Any]) -> str:
    """The limits in a field's annotation, such as "1 to 150" or "at least 1": those of new jobs.

    Empty where it has none.
    """
    least = most = ""
    is_range = True
    for each in (each.limit if isinstance(each, NarrowedTo) else each for each in metadata):
        match each:
            case Ge():
                least = _shown(each.ge)
            case Gt():
                least, is_range = f"above {_shown(each.gt)}", False
            case Le():
                most = _shown(each.le)
            case Lt():
                most, is_range = f"below {_shown(each.lt)}", False
    if least and most:
        return f"{least} to {most}" if is_range else f"{least} and up to {most}"
    if least:
        return f"at least {least}" if is_range else least
    return (f"at most {most}" if is_range else most) if most else ""


def requirement(finding: ErrorDetails | Mapping[str, Any], limits: str) -> str:
    """What a value must be, by pydantic's finding and its field's limits: the end of "it must be"."""
    said, kind = str(finding["msg"]).removeprefix("Input should be "), str(finding["type"])
    if limits and kind in _BEYOND:
        return limits
    return f"{said}, {limits}" if limits and kind.startswith(_NO_NUMBER) else said


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.10g}"
