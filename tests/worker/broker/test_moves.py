"""Where a held message goes: decided without Redis."""

from __future__ import annotations

import json
from typing import Any

import pytest

from worker.broker.layout import Layout, json_name
from worker.broker.moves import LAST, NEXT, Move, given_back, restored, set_aside

LAYOUT = Layout(
    unacked="p:unacked",
    index="p:index",
    undecodable="p:undecodable",
    bindings="p:binding.%s",
    prefix="p:",
    priority_steps=(0, 3, 6),
)
SEPARATOR = "\x06\x16"


def message(**properties: Any) -> dict[str, Any]:
    properties = {"delivery_tag": "t", "delivery_info": {"routing_key": "q"}, **properties}
    return {"body": "x", "headers": {"task": "t"}, "properties": properties}


def marked(payload: dict[str, Any]) -> dict[str, Any]:
    """The same, with the marks of a message that was delivered before."""
    payload = json.loads(json.dumps(payload))
    payload["headers"]["redelivered"] = payload["properties"]["delivery_info"]["redelivered"] = True
    return payload


def no_bindings(exchange: str) -> list[bytes]:
    raise AssertionError(f"the bindings of {exchange!r} are not needed")


@pytest.mark.parametrize(
    ("priority", "name"),
    [
        *((low, "p:q") for low in (0, 2, -1, None, "high")),
        *((middle, f"p:q{SEPARATOR}3") for middle in (3, 5, "4")),
        *((high, f"p:q{SEPARATOR}6") for high in (6, 9, 99)),
    ],
)
def test_a_priority_has_its_list(priority: object, name: str) -> None:
    assert LAYOUT.list_of("q", priority) == name
    payload = message(priority=priority)
    move = given_back(LAYOUT, json.dumps(payload), "q", NEXT)
    assert (move.keys, move.push) == ([name], NEXT)
    assert json.loads(move.message) == marked(payload)


@pytest.mark.parametrize("raw", [b"no JSON", b"[]", b"{}", b'{"properties": 1}', b"\xff"])
def test_a_message_that_cannot_be_read_is_set_aside_as_it_is(raw: bytes) -> None:
    expected = Move(["p:undecodable"], raw, LAST)
    assert given_back(LAYOUT, raw, "q", NEXT) == set_aside(LAYOUT, raw) == expected
    assert restored(LAYOUT, raw, no_bindings) == expected


def entry(payload: object, exchange: object = "", routing_key: object = "q") -> bytes:
    return json.dumps([payload, exchange, routing_key]).encode()


def test_an_entry_of_our_own_needs_no_bindings() -> None:
    payload = message(priority=3)
    move = restored(LAYOUT, entry(payload), no_bindings)
    assert (move.keys, move.push) == ([f"p:q{SEPARATOR}3"], NEXT)
    assert json.loads(move.message) == marked(payload)


def test_an_entry_of_kombu_goes_where_its_exchange_is_bound() -> None:
    asked = []

    def bindings(exchange: str) -> list[bytes]:
        asked.append(exchange)
        return [
            SEPARATOR.join(parts).encode() for parts in [("k", "", "a"), ("x", "^k$", "b"), ("x", "", "c")]
        ]

    move = restored(LAYOUT, entry(message(), "e", "k"), bindings)
    assert (move.keys, asked) == (["p:a", "p:b"], ["e"])
    # Bound to nothing, a person sees it.
    assert restored(LAYOUT, entry(message(), "e", "y"), bindings).keys == ["p:undecodable"]


@pytest.mark.parametrize("binding", [b"two\x06\x16parts", b"\xff\x06\x16\x06\x16q", b"x\x06\x16(\x06\x16q"])
def test_bindings_that_cannot_be_read_set_the_message_aside(binding: bytes) -> None:
    found = entry(message(), "e", "k")
    assert restored(LAYOUT, found, lambda _: [binding]) == set_aside(LAYOUT, found)


def test_what_reading_the_bindings_raises_is_raised() -> None:
    def bindings(_: str) -> list[bytes]:
        raise ConnectionError("lost")

    with pytest.raises(ConnectionError, match="lost"):
        restored(LAYOUT, entry(message(), "e"), bindings)


def test_an_entry_that_is_gone_leaves_only_the_index_to_clear() -> None:
    assert restored(LAYOUT, None, no_bindings).keys == []


def test_a_queue_s_name_is_json_in_an_entry() -> None:
    assert json.loads(json_name('a "queue"\n')) == 'a "queue"\n'
