"""Where a held message goes: decided without Redis."""

from __future__ import annotations

import json
from typing import Any

import pytest

from worker.broker.layout import Layout, json_name, words_of
from worker.broker.moves import (
    KEPT_BYTES,
    NEXT,
    Move,
    Parked,
    SetAside,
    given_back,
    parked,
    restored,
    set_aside,
    waiting,
)
from worker.contract.found_message import fingerprint
from worker.contract.message import RETURNS

LAYOUT = Layout(
    unacked="p:unacked",
    index="p:index",
    undecodable="p:undecodable",
    parked="p:parked",
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
    assert isinstance(move, Move)
    assert (move.keys, move.push) == ([name], NEXT)
    assert json.loads(move.message) == marked(payload)


@pytest.mark.parametrize("raw", [b"no JSON", b"[]", b"{}", b'{"properties": 1}', b"\xff"])
def test_a_message_that_cannot_be_read_is_set_aside_as_it_is(raw: bytes) -> None:
    for move in (given_back(LAYOUT, raw, "q", NEXT), restored(LAYOUT, raw, 9)):
        assert isinstance(move, SetAside)
        head, _, kept = move.entry.partition(b"\n")
        assert kept == raw
        assert json.loads(head)["reason"] == move.reason
        assert (move.raw, move.is_poison) == (raw, False)


def test_of_a_message_that_is_set_aside_so_much_is_kept() -> None:
    move = set_aside(b"x" * 100_000, "why " * 1_000, "q")
    head, _, kept = move.entry.partition(b"\n")
    assert kept == b"x" * KEPT_BYTES
    assert json.loads(head).items() >= {"queue": "q", "bytes": 100_000}.items()
    assert len(move.entry) - len(kept) < 600
    assert move.raw == b"x" * 100_000


@pytest.mark.parametrize(
    ("priority", "step"), [(0, 0), (4, 4), (-1, 0), (99, 9), (None, 0), ("x", 0), (1e999, 0)]
)
def test_a_newer_message_is_parked_as_it_is_by_its_version(priority: object, step: int) -> None:
    raw = json.dumps(message(priority=priority)).encode()
    assert parked(LAYOUT, raw, "q", 7) == Parked(f"p:q{SEPARATOR}{step}{SEPARATOR}v7", raw)


def is_set_aside(move: object) -> bool:
    return isinstance(move, SetAside) and bool(move.reason)


def entry(payload: object, exchange: object = "", routing_key: object = "q") -> bytes:
    return json.dumps([payload, exchange, routing_key]).encode()


def test_a_message_whose_lease_ran_out_is_next_in_its_queue() -> None:
    payload = message(priority=3)
    move = restored(LAYOUT, entry(payload), 9)
    assert isinstance(move, Move)
    assert (move.keys, move.push) == ([f"p:q{SEPARATOR}3"], NEXT)
    payload["headers"] = payload["headers"] | {RETURNS: 1}
    assert json.loads(move.message) == marked(payload)


def came_back(move: object) -> dict[str, Any]:
    """The message as a worker would have registered it again."""
    assert isinstance(move, Move)
    found: dict[str, Any] = json.loads(move.message)
    return found


def test_a_message_whose_workers_died_so_often_is_set_aside_as_poison() -> None:
    payload = message()
    for _ in range(3):
        payload = came_back(restored(LAYOUT, entry(payload), 3))
    move = restored(LAYOUT, entry(payload), 3)
    assert isinstance(move, SetAside)
    assert move.is_poison
    assert "fetched 4 times" in move.reason
    assert fingerprint(move.raw) == fingerprint(json.dumps(message()))


def test_what_comes_back_because_a_worker_chose_so_is_no_death() -> None:
    payload = message()
    for _ in range(20):
        wait = waiting(json.dumps(payload).encode(), "q", 1.0, counts=False)
        payload = came_back(restored(LAYOUT, wait.entry.encode(), 3))
        payload = came_back(given_back(LAYOUT, json.dumps(payload), "q", NEXT))
    assert payload == marked(message())


def test_what_comes_back_though_nobody_chose_so_counts() -> None:
    """As after an error that nobody foresaw, in a worker that lives on."""
    payload = message()
    raw = json.dumps(payload).encode()
    assert waiting(raw, "q", 1.0, counts=True).entry == ""  # What is registered stays: it counts.
    for number in range(1, 4):
        move = given_back(LAYOUT, json.dumps(payload), "q", NEXT, counts=True, limit=3)
        payload = came_back(move)
        assert payload["headers"][RETURNS] == number
    assert is_set_aside(given_back(LAYOUT, json.dumps(payload), "q", NEXT, counts=True, limit=3))


@pytest.mark.parametrize("said", [-1_000_000, "x", None, True, 1.5, [1]])
def test_a_forged_number_of_returns_buys_nothing(said: object) -> None:
    payload = message()
    payload["headers"] = {**payload["headers"], RETURNS: said}
    assert came_back(restored(LAYOUT, entry(payload), 3))["headers"][RETURNS] == 1


def test_an_entry_with_an_exchange_is_not_ours_and_is_set_aside() -> None:
    assert is_set_aside(restored(LAYOUT, entry(message(), "e", "k"), 9))


def test_an_entry_that_is_gone_leaves_only_the_index_to_clear() -> None:
    assert restored(LAYOUT, None, 9) == Move([], b"", NEXT)


def test_a_fetch_names_each_queue_once() -> None:
    assert words_of([("q", "1"), ("q", ""), ("r", ""), ("", "")]) == [b"010-1-2-", '"q"', '"r"', ""]


def test_a_queue_s_name_is_json_in_an_entry() -> None:
    assert json.loads(json_name('a "queue"\n')) == 'a "queue"\n'
