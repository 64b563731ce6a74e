"""The limits around the app, with an app and a client played by hand."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from producer.http import guard
from producer.http.guard import Guard

App = Callable[[Any, Any, Any], Awaitable[None]]


def guarded(app: App, *, logs_values: bool = False) -> Guard:
    return Guard(app, max_body=10, max_upload=100, is_open=False, logs_values=logs_values)


async def call(app: Guard, *pieces: bytes, path: str = "/", send: Any = None) -> list[Any]:
    """Send a request in pieces; a last piece `None` never comes. Returns the messages of the answer."""
    messages = [{"type": "http.request", "body": each, "more_body": True} for each in pieces]
    if messages:
        messages[-1]["more_body"] = False
    sent: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def keep(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [], "method": "POST"}
    await app(scope, receive, send or keep)
    return sent


def refused(**headers: str) -> Any:
    """What a server without keys says to a request with these headers."""
    app = Guard(read_all, max_body=10, max_upload=100, is_open=True, logs_values=False)
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def keep(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "path": "/", "headers": raw, "method": "POST"}
    asyncio.run(app(scope, receive, keep))
    return sent[0]["status"], sent[-1]["body"]


@pytest.mark.parametrize("text", ["[", "[::1", "]", "[x]", "\xff", "", "a b", "127.0.0.1.example.com", ":80"])
def test_a_head_that_names_no_host_of_this_machine_is_refused(text: str) -> None:
    for headers in ({"host": text}, {"host": "localhost", "origin": f"http://{text}"}):
        status, body = refused(**headers)
        assert (status, b"use http://localhost" in body) == (403, True), headers


@pytest.mark.parametrize("host", ["localhost", "localhost:80", "[::1]:80", "127.0.0.1"])
def test_names_of_this_machine_are_taken(host: str) -> None:
    assert refused(host=host)[0] == 200
    assert refused(host=host, origin=f"http://{host}")[0] == 200


async def read_all(scope: Any, receive: Any, send: Any) -> None:
    """An app that reads the body, and answers by its length."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def test_a_body_within_its_limit_is_handed_on() -> None:
    assert asyncio.run(call(guarded(read_all), b"12345", b"67890"))[-1]["body"] == b"10"


def test_a_larger_one_is_refused_wherever_it_becomes_so() -> None:
    answer = asyncio.run(call(guarded(read_all), b"12345", b"67890", b"1"))
    assert answer[0]["status"] == 413


def test_uploads_have_a_limit_of_their_own() -> None:
    answer = asyncio.run(call(guarded(read_all), b"x" * 50, path="/v1/runs"))
    assert answer[-1]["body"] == b"50"


def test_a_body_that_stops_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PIECE_S", 0.05)
    answer = asyncio.run(call(guarded(read_all)))
    assert answer[0]["status"] == 408


def test_a_body_that_trickles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece comes in time, and all together do not."""
    monkeypatch.setattr(guard, "WHOLE_S", 0.1)

    async def trickle() -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(0.03)
            return {"type": "http.request", "body": b"", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/", "headers": [], "method": "POST"}
        await guarded(read_all)(scope, receive, send)
        return sent

    assert asyncio.run(trickle())[0]["status"] == 408


def test_who_does_not_read_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard, "READ_S", 0.05)

    async def never(_: Any) -> None:
        await asyncio.Event().wait()

    with caplog.at_level(logging.WARNING, logger="smallcat.http"):
        asyncio.run(call(guarded(read_all), b"1", send=never))
    assert "did not read its answer within 0.05 s" in caplog.text


PROMPT = "a very private prompt"


async def fail(scope: Any, receive: Any, send: Any) -> None:
    raise ZeroDivisionError(PROMPT)


@pytest.mark.parametrize("logs_values", [False, True])
def test_a_fault_is_a_500_and_says_where_but_not_what(
    logs_values: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, logger="smallcat.http"):
        answer = asyncio.run(call(guarded(fail, logs_values=logs_values)))
    assert answer[0]["status"] == 500
    assert b"private" not in answer[-1]["body"]
    assert "in fail" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert (PROMPT in caplog.text) is logs_values
