"""What stands in a queue is checked here, on its own JSON, before kombu or Celery see any of it.

Whoever reaches Redis can push into a queue. A message is read only if it is what our producers write: one
call of our task with one argument, and none of Celery's other features, each of which does something to the
worker that reads it (a chain leaks a slot of its pool, a compressed body fills its memory, a callback
publishes with its rights). Bodies are read by plain JSON: kombu's reader makes objects of some of it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from types import NoneType
from typing import Any, Final, NamedTuple

from worker.contract.job import FORMAT_VERSION
from worker.contract.job_parameters import MAX_PRIORITY
from worker.contract.message import (
    MAX_MESSAGE,
    NEEDED_HEADERS,
    NUMBER_HEADERS,
    NUMBER_PROPERTIES,
    OURS,
    TASK,
    TEXT_HEADERS,
    TEXT_PROPERTIES,
    newer,
    version_in,
)

#: Characters of an id of a message, at most.
_MAX_ID: Final = 255


class CheckedMessage(NamedTuple):
    """A message of ours, with nothing in it that was not checked."""

    headers: dict[str, Any]
    properties: dict[str, Any]
    #: As Celery takes it: the argument in a list, keyword arguments, options.
    body: list[Any]


def check(raw: bytes, tag: str) -> CheckedMessage:
    """The message `raw`, which was registered under the delivery tag `tag` ('': it was not registered).

    Raises `NewerMessageError` for one of a version that this worker does not read, whatever else is in it,
    and `ValueError`, with the reason, for one that no producer of ours wrote.
    """
    try:
        message = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise ValueError("it is not a JSON object")
    arguments = _arguments(message)
    if isinstance(arguments, list) and arguments and version_in(arguments[0]) > FORMAT_VERSION:
        raise newer(version_in(arguments[0]))
    if len(raw) > MAX_MESSAGE:
        raise ValueError(f"it has {len(raw)} bytes, more than {MAX_MESSAGE}")
    for name, only in (("content-type", "application/json"), ("content-encoding", "utf-8")):
        if message.get(name) != only:
            raise ValueError(f"its {name} is not {only}")
    headers = _headers(_object(message, "headers"))
    properties = _properties(_object(message, "properties"), tag)
    if isinstance(arguments, ValueError):
        raise arguments
    if len(arguments) != 1:
        raise ValueError(f"it has {len(arguments)} arguments, not one")
    if not version_in(arguments[0]):
        raise ValueError("its argument has no version")
    return CheckedMessage(headers, properties, [arguments, {}, {}])


def _arguments(message: dict[str, Any]) -> list[Any] | ValueError:
    """The arguments in the body; what is wrong with it, where it cannot be read."""
    try:
        body = json.loads(base64.b64decode(message["body"], validate=True).decode())
    except (KeyError, TypeError, ValueError, RecursionError):
        return ValueError("its body is not JSON in base64")
    if not (isinstance(body, list) and len(body) == 3 and isinstance(body[0], list)):
        return ValueError("its body is not a task's list, object and options")
    for part, what in ((body[1], "keyword arguments"), (body[2], "options")):
        if not (isinstance(part, dict) and all(map(_says_nothing, part.values()))) and part is not None:
            return ValueError(f"its body has {what}")
    arguments: list[Any] = body[0]
    return arguments


def _object(message: dict[str, Any], name: str) -> dict[str, Any]:
    found = message.get(name)
    if not isinstance(found, dict):
        raise ValueError(f"its {name} are not an object")
    return found


def _headers(headers: dict[str, Any]) -> dict[str, Any]:
    if headers.get("task") != TASK:
        raise ValueError(f"its task is not {TASK}")
    _is_id(headers.get("id"), "header 'id'")
    return _known(headers, (*NEEDED_HEADERS, *TEXT_HEADERS), NUMBER_HEADERS, "header")


def _properties(properties: dict[str, Any], tag: str) -> dict[str, Any]:
    priority, info = properties.get("priority"), properties.get("delivery_info")
    if priority is not None and not (type(priority) is int and 0 <= priority <= MAX_PRIORITY):
        raise ValueError("its priority is not 0 to 9")
    if properties.get("body_encoding") != "base64":
        raise ValueError("its body_encoding is not base64")
    _is_id(properties.get("delivery_tag"), "property 'delivery_tag'")
    if tag and properties["delivery_tag"] != tag:
        raise ValueError("it has two delivery tags")
    own = ("priority", "delivery_info", "body_encoding", "delivery_tag")
    others = {name: value for name, value in properties.items() if name not in own}
    redelivered = isinstance(info, dict) and info.get("redelivered") is True
    return _known(others, TEXT_PROPERTIES, NUMBER_PROPERTIES, "property") | {
        "priority": priority,
        "delivery_info": {"exchange": "", "routing_key": "", "redelivered": redelivered},
        "delivery_tag": properties["delivery_tag"],
    }


def _known(found: dict[str, Any], texts: Sequence[str], numbers: Sequence[str], what: str) -> dict[str, Any]:
    """Those of `found` that are known. The others must say nothing, or be ours to come."""
    for name, value in found.items():
        if name in texts:
            if not isinstance(value, (str, NoneType)):
                raise ValueError(f"its {what} {name!r} is not text")
            _is_text(value or "", f"{what} {name!r}")
        elif name in numbers:
            if not isinstance(value, (int, NoneType)):
                raise ValueError(f"its {what} {name!r} is not a number")
        elif not (_says_nothing(value) or name.startswith(OURS)):
            raise ValueError(f"it has the {what} {name[:80]!r}, which no job has")
    return {name: value for name, value in found.items() if name in texts or name in numbers}


def _is_id(value: object, what: str) -> None:
    if not (isinstance(value, str) and 0 < len(value) <= _MAX_ID and value.isascii() and value.isprintable()):
        raise ValueError(f"its {what} is not a text of up to {_MAX_ID} printable characters")


def _is_text(value: str, what: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"its {what} has half a character") from None


def _says_nothing(value: object) -> bool:
    """Whether a feature of Celery's with this value is not used."""
    return value is None or value in ([], {}, "", [None, None])
