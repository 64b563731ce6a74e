"""`/v1/jobs/{id}/events`: against the real server and Redis; the worker is played by hand."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.producer.http.conftest import NOBODYS, Api
from worker.contract.errors import RenderError
from worker.contract.record import JobRecord, State
from worker.state.records import Records
from worker.state.redis_client import connect


@pytest.fixture
def records(api: Api) -> Iterator[Records]:
    with connect(api.stack.valkey.url, 2) as client:
        yield Records(client, 1_000)


class Stream:
    """A stream of server-sent events."""

    def __init__(self, api: Api, path: str, last: str = "", key: str | None = None) -> None:
        where = urlsplit(api.url)
        self.connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=20)
        headers = {"Authorization": f"Bearer {key or api.key}", "Accept": "text/event-stream"}
        self.connection.request("GET", path, headers=headers | ({"Last-Event-ID": last} if last else {}))
        self.answer = self.connection.getresponse()

    def next(self) -> dict[str, Any] | None:
        """The next event; None at the end."""
        event: dict[str, Any] = {}
        while line := self.answer.readline().decode():
            name, _, value = line.rstrip("\n").partition(": ")
            if name == "data":
                event["data"] = json.loads(value)
            elif name in ("id", "event"):
                event[name] = value
            elif not name and event:
                return event
        return None


def queued(api: Api, **fields: Any) -> Any:
    return api.call("POST", "/v1/jobs", {"prompt": "followed", "model": NOBODYS, **fields}).json


def claim(records: Records, job: Any) -> Any:
    made = records.get(job["id"]).job
    records.claim(made, "m1", worker="w1", lease_s=30, max_attempts=3, queue="q")
    return made


def test_a_job_is_followed_to_its_end(api: Api, records: Records) -> None:
    before = [queued(api, model="m-of-its-own", revision="r") for _ in range(3)]
    job = queued(api, model="m-of-its-own", revision="r", metadata={"mine": 1})
    stream = Stream(api, job["links"]["events"])
    assert stream.answer.headers["content-type"].startswith("text/event-stream")
    event = stream.next()
    assert event == {
        "id": f"queued-{len(before)}",
        "event": "queued",
        "data": {"id": job["id"], "state": "queued", "ahead": 3},
    }
    made = claim(records, job)
    event = stream.next()
    assert event is not None
    assert event["data"] == {"id": job["id"], "state": "running", "step": 0, "steps": 0}
    records.progress({job["id"]: (7, 20)}, 30)
    event = stream.next()
    assert event is not None
    assert (event["id"], event["data"]["step"], event["data"]["steps"]) == ("running-7", 7, 20)
    assert records.done(JobRecord(id=job["id"], state=State.DONE, job=made, uri="s3://b/x.png"))
    event = stream.next()
    assert event is not None
    assert (event["event"], event["data"]["state"]) == ("done", "done")
    assert event["data"]["job"]["metadata"] == {"mine": 1}
    assert stream.next() is None


def test_jobs_of_a_higher_priority_alone_are_ahead(api: Api) -> None:
    for priority in (9, 9, 2, 2, 2):
        queued(api, model="m-of-priorities", revision="r", priority=priority)
    job = queued(api, model="m-of-priorities", revision="r", priority=6)
    event = Stream(api, job["links"]["events"]).next()
    assert event is not None
    assert event["data"]["ahead"] == 2


def test_a_failed_job_ends_its_stream(api: Api, records: Records) -> None:
    job = queued(api)
    stream = Stream(api, job["links"]["events"])
    stream.next()
    claim(records, job)
    assert records.failed(job["id"], "m1", RenderError("it did not work"))
    while (event := stream.next()) is not None and event["event"] == "running":
        pass
    assert event is not None
    assert (event["event"], event["data"]["error"]) == ("failed", "it did not work")


def test_a_submission_that_is_given_up_ends_its_own_stream(api: Api) -> None:
    fields = {"seed": 1, "revision": "shared"}
    mine, key = queued(api, **fields), api.new_key("follower")
    theirs = api.call("POST", "/v1/jobs", {"prompt": "followed", "model": NOBODYS, **fields}, key=key).json
    assert mine["id"] == theirs["id"]
    stream, other = Stream(api, mine["links"]["events"]), Stream(api, theirs["links"]["events"], key=key)
    assert stream.next() is not None
    assert other.next() is not None
    api.call("DELETE", mine["links"]["self"])
    event = stream.next()
    assert event is not None
    assert event["event"] == "cancelled"
    assert api.call("GET", theirs["links"]["self"], key=key).json["state"] == "queued"


def test_who_comes_back_gets_what_is_new(api: Api, records: Records) -> None:
    job = queued(api)
    claim(records, job)
    records.progress({job["id"]: (3, 20)}, 30)
    path = job["links"]["events"]
    first = Stream(api, path).next()
    assert first is not None
    assert first["id"] == "running-3"
    stream = Stream(api, path, last=first["id"])
    threading.Timer(0.5, lambda: records.progress({job["id"]: (4, 20)}, 30)).start()
    event = stream.next()
    assert event is not None
    assert event["id"] == "running-4"


def test_who_has_seen_the_end_is_told_not_to_come_back(api: Api) -> None:
    job = api.call("POST", "/v1/jobs", {"prompt": "done soon"}).json
    api.wait(job)
    end = Stream(api, job["links"]["events"]).next()
    assert end is not None
    assert end["event"] == "done"
    assert Stream(api, job["links"]["events"], last=end["id"]).answer.status == 204
    assert Stream(api, job["links"]["events"], last="running-3").answer.status == 200


def test_many_follow_one_job(api: Api) -> None:
    job = queued(api)
    streams = [Stream(api, job["links"]["events"]) for _ in range(50)]
    assert {(stream.next() or {}).get("event") for stream in streams} == {"queued"}
    api.call("DELETE", job["links"]["self"])
    assert {(stream.next() or {}).get("event") for stream in streams} == {"cancelled"}
