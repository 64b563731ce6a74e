"""What is read as a message, and what is not: decided on its JSON, without kombu, Celery or Redis."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.broker.malformed import check
from worker.contract.errors import NewerMessageError
from worker.contract.job import FORMAT_VERSION
from worker.contract.message import MAX_MESSAGE, OURS

STORED = [
    path.read_bytes().rstrip(b"\n")
    for path in sorted((Path(__file__).parents[1] / "contract" / "messages").iterdir())
]
TAG = json.loads(STORED[0])["properties"]["delivery_tag"]
PAYLOAD: dict[str, Any] = json.loads(base64.b64decode(json.loads(STORED[0])["body"]))[0][0]


def body(*parts: object) -> str:
    return base64.b64encode(json.dumps(parts).encode()).decode()


def message(**changes: Any) -> dict[str, Any]:
    return {**json.loads(STORED[0]), **changes}


def headers(**changes: Any) -> dict[str, Any]:
    return message(headers={**message()["headers"], **changes})


def properties(**changes: Any) -> dict[str, Any]:
    return message(properties={**message()["properties"], **changes})


def checked(found: dict[str, Any]) -> Any:
    return check(json.dumps(found).encode(), TAG)


@pytest.mark.parametrize("raw", STORED)
def test_messages_of_every_version_are_read(raw: bytes) -> None:
    message = json.loads(raw)
    read = check(raw, message["properties"]["delivery_tag"])
    assert read.body == [json.loads(base64.b64decode(message["body"]))[0], {}, {}]
    assert read.headers["id"] == message["headers"]["id"]
    assert read.properties["priority"] == message["properties"]["priority"]


#: Celery's features beside a call with arguments, and kombu's beside JSON in UTF-8.
FEATURES: dict[str, Any] = {
    "chain": "x",
    "callbacks": [{"task": "t"}],
    "errbacks": [{}],
    "chord": {"task": "t"},
    "group": "g",
    "group_index": 1,
    "eta": "2036-01-01T00:00:00",
    "expires": "2036-01-01T00:00:00",
    "timelimit": [1, None],
    "shadow": "another name",
    "stamps": {"a": 1},
    "stamped_headers": ["a"],
    "compression": "application/x-gzip",
    "replies": "x",
    "called_directly": True,
    "utc": False,
    "hostname": "h",
}


@pytest.mark.parametrize(("name", "value"), FEATURES.items())
@pytest.mark.parametrize(
    "place",
    [
        lambda name, value: headers(**{name: value}),
        lambda name, value: properties(**{name: value}),
        lambda name, value: message(body=body([PAYLOAD], {}, {name: value})),
        lambda name, value: message(body=body([PAYLOAD], {name: value}, {})),
    ],
    ids=["header", "property", "option", "keyword"],
)
def test_no_other_feature_of_celery_is_used_by_sending_it(
    name: str, value: object, place: Callable[[str, object], dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match=r"it has the|its body has|its task is not|its header"):
        checked(place(name, value))
    read = checked(place(name, None))
    assert name not in {**read.headers, **read.properties}
    assert read.body == [[PAYLOAD], {}, {}]


@pytest.mark.parametrize(
    "found",
    [
        headers(task="celery.backend_cleanup"),
        headers(task=None),
        headers(id=None),
        headers(id="x" * 256),
        headers(id="a\nb"),
        headers(root_id=5),
        headers(origin=["x"]),
        headers(argsrepr="\ud800"),
        headers(retries="1"),
        headers(traceparent={}),
        properties(priority=10),
        properties(priority=-1),
        properties(priority=True),
        properties(priority=1.5),
        properties(body_encoding=None),
        properties(body_encoding="rot13"),
        properties(delivery_tag="another"),
        properties(reply_to=1),
        message(**{"content-type": "application/x-python-serialize"}),
        message(**{"content-type": "application/data"}),
        message(**{"content-encoding": "utf-16"}),
        message(**{"content-encoding": "binary"}),
        message(headers=None),
        message(headers=[["task", "smallcat.render"]]),
        message(properties=None),
        message(body=None),
        message(body="no base64!"),
        message(body=base64.b64encode(zlib.compress(b"x" * 10**6)).decode()),
        message(body=base64.b64encode(b"[" * 100_000).decode()),
        message(body=body()),
        message(body=body([], {}, {})),
        message(body=body([PAYLOAD, PAYLOAD], {}, {})),
        message(body=body({"a": PAYLOAD}, {}, {})),
        message(body=body([PAYLOAD], [], {})),
        message(body=body([PAYLOAD], {}, 186)),
        message(body=body(["x"], {}, {})),
        message(body=body([{}], {}, {})),
        message(body=body([{"version": True}], {}, {})),
        message(body=body([{"version": 0}], {}, {})),
        message(body=body([{"version": 10**9}], {}, {})),
        message(body=body([{"version": "1"}], {}, {})),
        message(body=body([PAYLOAD | {"x": "x" * MAX_MESSAGE}], {}, {})),
    ],
)
def test_what_no_producer_of_ours_wrote_is_refused_with_a_reason(found: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^it"):
        checked(found)


@pytest.mark.parametrize("raw", [b"", b"\xff", b"null", b"17", b"[]", b"[" * 100_000, b"1" * 5_000, b"{}"])
def test_what_is_no_message_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"^it"):
        check(raw, TAG)


_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["headers", "properties", ""]), st.data(), _JSON)
def test_one_thing_changed_is_read_or_refused_and_nothing_else(
    where: str, data: st.DataObject, value: object
) -> None:
    found = message()
    place = found[where] if where else found
    place[data.draw(st.sampled_from(sorted(place)) | st.text(max_size=12))] = value
    try:
        read = checked(found)
    except (ValueError, NewerMessageError):
        return
    assert {type(each) for each in read.headers.values()} <= {str, int, bool, type(None)}
    assert read.properties["delivery_tag"] == TAG


def test_traces_travel_and_what_is_ours_to_come_is_ignored() -> None:
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
    read = checked(headers(**trace, **{f"{OURS}new": {"of": "a later version"}}))
    assert read.headers.items() >= trace.items()
    assert f"{OURS}new" not in read.headers


def test_a_newer_version_is_told_from_a_malformed_message_before_all_else() -> None:
    newer = headers(chain="x") | {"content-type": "application/new"}
    newer["body"] = body([PAYLOAD | {"version": FORMAT_VERSION + 1, "x": "x" * MAX_MESSAGE}], {}, {})
    with pytest.raises(NewerMessageError) as caught:
        checked(newer)
    assert caught.value.version == FORMAT_VERSION + 1


def test_a_payload_is_plain_json() -> None:
    """kombu makes a UUID of this, and a date of others."""
    payload = PAYLOAD | {"job": PAYLOAD["job"] | {"metadata": {"__type__": "uuid", "__value__": "x"}}}
    assert checked(message(body=body([payload], {}, {}))).body[0] == [payload]
