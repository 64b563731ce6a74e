"""Streams of events: how many there may be, when they end, and what each is sent."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from producer.http import activity_events, auth, events
from producer.http.activity import Activity, Watcher
from producer.http.activity_events import _Sent
from producer.http.auth import Rights
from producer.http.caller import Caller
from producer.http.problems import RefusedError
from producer.http.streams import Streams
from worker.contract.errors import QueueError

CALLER = Caller("site", frozenset(("submit", "read")))


async def _none() -> Any:
    for each in ():
        yield each


def test_a_key_and_a_tenant_have_a_part_of_the_connections() -> None:
    streams = Streams(8)
    acme, acme_2 = replace(CALLER, tenant="acme"), replace(CALLER, tenant="acme", name="app")

    async def scenario() -> None:
        first = streams.open(acme, _none())
        streams.open(acme_2, _none())
        with pytest.raises(RefusedError, match=r"The tenant acme has 2 open .* limit is 2, 1/4") as error:
            streams.open(acme, _none())
        assert error.value.status == 429
        streams.open(CALLER, _none())
        streams.open(CALLER, _none())
        with pytest.raises(RefusedError, match='The key "site" has 2'):
            streams.open(CALLER, _none())
        streams.open(replace(CALLER, name="another"), _none())

        async def receive() -> Any:
            await asyncio.sleep(10)

        async def gone(message: Any) -> None:
            raise OSError

        with pytest.raises(ClientDisconnect):
            await first({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, gone)
        streams.open(acme, _none())

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("now", "have_ended"),
    [
        (CALLER, False),
        (replace(CALLER, scopes=frozenset(("submit",))), True),
        (replace(CALLER, tenant="acme"), True),
        (RefusedError(401, "There is no such key."), True),
        (RefusedError(403, "The tenant was removed."), True),
        (RefusedError(503, "Too many wait."), False),
        (QueueError("Redis is away."), False),
    ],
)
@pytest.mark.parametrize("kind", ["activity", "job"])
def test_a_stream_ends_with_the_rights_of_its_caller(
    now: Any, have_ended: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "BELIEVED_S", 0.0)
    monkeypatch.setattr(events, "BEAT_S", 0.01)
    request = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace()))

    async def caller(_: Any) -> Caller:
        if isinstance(now, Exception):
            raise now
        return now  # type: ignore[no-any-return]

    request.app.state.authentication = SimpleNamespace(caller=caller)
    rights = Rights(request, CALLER)  # type: ignore[arg-type]

    @contextmanager
    def watch(audience: Any) -> Any:
        yield Watcher(audience)

    async def scenario() -> list[str]:
        follower = SimpleNamespace(changed=asyncio.Event(), seen=None, error=None)
        backend: Any = SimpleNamespace(
            draining=asyncio.Event(),
            watching=SimpleNamespace(watch=watch),
            following=SimpleNamespace(follow=lambda *_: nullcontext(follower)),
        )
        record: Any = SimpleNamespace(
            state=SimpleNamespace(is_final=False), job=SimpleNamespace(priority=5, tenant="")
        )
        handle: Any = SimpleNamespace(id="j", submission="s")
        stream = (
            activity_events._events(backend, CALLER, rights)
            if kind == "activity"
            else events._events(backend, CALLER, rights, handle, record, "")
        )
        found = []
        async for text in stream:
            found.append(text)
            if len(found) == 3:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        return found

    assert len(asyncio.run(scenario())) == (1 if have_ended else 3)


def test_rights_are_asked_for_every_few_seconds_alone() -> None:
    rights = Rights(SimpleNamespace(), CALLER)  # type: ignore[arg-type]
    assert asyncio.run(rights.have_ended()) is False


def test_who_came_during_an_outage_gets_what_the_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity_events, "may_see", lambda caller, job: True)
    monkeypatch.setattr(activity_events, "row", lambda job, caller: {"id": job})
    jobs: Any = {"a": "a"}
    seen = [
        Activity(4, jobs, {"workers": []}),
        Activity(5, trouble="Redis is away."),
        Activity(6, jobs, {"workers": []}),
    ]
    watcher = Watcher(None)  # type: ignore[arg-type]
    early, late, as_late = _Sent(CALLER), _Sent(CALLER), _Sent(CALLER)
    watcher.seen = seen[0]
    assert "event: jobs" in "".join(early.news(watcher))
    watcher.seen = seen[1]
    for each in (early, late, as_late):
        assert "Redis is away." in "".join(each.news(watcher))
    watcher.seen = seen[2]
    assert "event: jobs" not in "".join(early.news(watcher))
    text = "".join(late.news(watcher))
    assert "event: jobs" in text
    assert "event: fleet" in text
    assert "".join(as_late.news(watcher)) == text
    # Those that go in step are composed for once.
    assert len(seen[2].events) == 2
