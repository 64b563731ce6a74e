"""Messages that no producer of ours wrote, refused before Celery sees them."""

from __future__ import annotations

from typing import Any, Final

#: Headers of a task's message that must be text, and those that may be absent.
TEXT_HEADERS: Final = (("id", "task"), ("shadow", "root_id", "parent_id", "group"))
#: What kombu and Celery raise on reading a malformed message. Any other error of a callback is the worker's.
MALFORMED: Final = (AttributeError, KeyError, TypeError, ValueError, RecursionError)


def refuse_malformed_task(message: Any) -> None:
    """Raise `TypeError` for what Celery would find in a thread of the pool, whose slot the error leaks."""
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
