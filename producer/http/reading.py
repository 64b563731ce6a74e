"""Reading the bodies of requests: JSON, strictly, with an error that says what is wrong and where."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from starlette.requests import Request

from producer.http.problems import RefusedError
from worker.contract.explain import short


async def read_json(request: Request, *, any_type: bool = False, or_form: bool = False) -> Any:
    """The JSON of a request's body. Raises `RefusedError` (400, 415).

    `any_type` takes it whatever Content-Type says. Elsewhere the type is needed: a page of another site
    cannot send it unasked. `or_form`: the caller reads forms with files, which the refusal then names.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not any_type and kind != "application/json" and not kind.endswith("+json"):
        shown = short(kind) if kind else "missing"
        form = ", or a form as multipart/form-data" if or_form else ""
        raise RefusedError(
            415, f"The Content-Type is {shown}: send JSON with `Content-Type: application/json`{form}."
        )
    body = await request.body()
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant, object_pairs_hook=_refuse_twice)
    except UnicodeDecodeError as error:
        raise RefusedError(400, f"The body is not UTF-8: byte {error.start} cannot be read.") from None
    except RecursionError:
        raise RefusedError(
            400, "The body is nested too deeply: send lists and objects of fewer levels."
        ) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RefusedError(400, f"The body is not JSON: {error.msg} at {where}.") from None
    except ValueError as error:
        raise RefusedError(400, f"The body is not JSON: {error}.") from None


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"it has {text}, which JSON does not have")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has {short(twice)} twice")
    return found
