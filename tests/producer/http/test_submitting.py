"""What checks jobs, on the event loop or beside it."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from producer.http.caller import ANYBODY
from producer.http.submitting import check


@pytest.mark.parametrize(
    ("items", "is_beside"),
    [
        ([{"prompt": "a cat", "seed": 1}], False),
        ([{"prompt": "((a:1.1)" * 1_000, "seed": 1}], True),
        ([{"prompt": "a", "negative_prompt": "b" * 9_000, "seed": 1}], True),
        ([{"prompt": "a cat", "seed": seed} for seed in range(1_000)], True),
    ],
)
def test_many_jobs_and_long_texts_are_checked_while_other_requests_go_on(
    items: list[dict[str, Any]], is_beside: bool
) -> None:
    seen = set[threading.Thread]()

    class Templates:
        def fill(self, fields: Any, tenant: str) -> Any:
            seen.add(threading.current_thread())
            return fields

    async def templates() -> Templates:
        return Templates()

    backend: Any = SimpleNamespace(
        sender=SimpleNamespace(templates=templates),
        run=asyncio.to_thread,
        settings=SimpleNamespace(webhook_hosts=""),
    )
    assert asyncio.run(check(backend, ANYBODY, items)) == items
    assert (seen == {threading.current_thread()}) is not is_beside
