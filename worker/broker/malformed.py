"""Messages of someone else's making, refused before Celery sees them."""

from __future__ import annotations

from typing import Any, Final

#: Headers of a task's message that must be text, and those that may be absent.
TEXT_HEADERS: Final = (("id", "task"), ("shadow", "root_id", "parent_id", "group"))
#: What reading a message of someone else's making may raise, in kombu or in Celery. Anything else that a
#: callback raises is about the worker.
MALFORMED: Final = (AttributeError, KeyError, TypeError, ValueError, RecursionError)


def refuse_malformed_task(message: Any) -> None:
    """Raise for what Celery would see in the pool's thread only, where an error takes a place for good."""
    headers = message.headers
    if not isinstance(headers, dict) or "task" not in headers:
        return
    needed, optional = TEXT_HEADERS
    for name in (*needed, *optional):
        if not isinstance(headers.get(name), str if name in needed else (str, type(None))):
            raise TypeError(f"its header {name!r} is not text")
    args, kwargs, embed = message.decode()
    if not (isinstance(args, list) and isinstance(kwargs, dict) and isinstance(embed, (dict, type(None)))):
        raise TypeError("its body is not a task's list, object and options")
