"""`/v1/jobs`: against the real server, Redis and bucket, beside a fake worker."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from deploy.embedded.stack import Stack
from producer import JobHandle, submit_job
from tests.full_redis import full
from tests.producer.http.conftest import AWAY, NOBODYS, Api
from worker.contract.job import WRITTEN_FIELDS
from worker.state.fleet import Fleet
from worker.state.keys import job_key
from worker.state.redis_client import connect


def test_a_job_becomes_a_picture(api: Api) -> None:
    answer = api.call("POST", "/v1/jobs", {"prompt": "a cat", "seed": 7, "metadata": {"mine": 1}})
    job = answer.json
    assert answer.status == 202
    assert answer.headers["location"] == job["links"]["self"]
    assert job["seed"] == 7

    done = api.wait(job)
    assert done["state"] == "done"
    assert done["job"]["metadata"] == {"mine": 1}
    link = api.call("GET", job["links"]["image"])
    assert link.status == 307
    with urllib.request.urlopen(link.headers["location"]) as body:  # noqa: S310
        by_link = body.read()
    whole = api.call("GET", job["links"]["image"] + "&redirect=false")
    assert whole.headers["content-type"] == "image/png"
    assert whole.body == by_link
    assert Image.open(io.BytesIO(whole.body)).size == (8, 8)


@pytest.mark.parametrize("tenant", ["", "crowded"])
def test_a_full_redis_takes_no_job_and_lets_one_read_and_cancel(api: Api, tenant: str) -> None:
    """Also who was not seen before, and whose requests are counted."""
    settings = {"tenant": tenant, "requests_per_s": 100.0, "models": [AWAY]} if tenant else {}
    key, other = (api.new_key(f"{name}{tenant}", **settings) for name in ("full", "full-2"))
    job = api.call("POST", "/v1/jobs", {"prompt": "a cat", "model": AWAY}, key=key).json
    with connect(api.stack.valkey.url, 2) as client:
        lengths = Fleet(client, 1_000).waiting()
        with full(client):
            refused = api.call("POST", "/v1/jobs", {"prompt": "a dog", "model": AWAY}, key=other)
            assert refused.status == 503
            assert "is full" in refused.json["detail"]
            assert Fleet(client, 1_000).waiting() == lengths
            assert api.call("GET", "/v1/jobs", key=other).status == 200
            assert api.call("GET", job["links"]["self"], key=key).json["state"] == "queued"
            assert api.call("DELETE", job["links"]["self"], key=key).json["state"] == "cancelled"


def test_a_picture_can_be_waited_for(api: Api) -> None:
    job = api.call("POST", "/v1/jobs", {"prompt": "a cat to wait for"}).json
    answer = api.call("GET", f"{job['links']['image']}&redirect=false&wait=30")
    assert (answer.status, answer.body[:4]) == (200, b"\x89PNG")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/jobs?limt=3", "There is no parameter 'limt': did you mean limit?"),
        ("/v1/fleet?x=1", "There is no parameter 'x': known are none."),
        ("/v1/jobs?limit=abc", "The parameter limit is 'abc': it must be a valid integer, 1 to 1,000."),
        (f"/v1/jobs/{'0' * 32}/image?wiat=3", "There is no parameter 'wiat': did you mean wait?"),
    ],
)
def test_a_parameter_that_means_nothing_is_refused(api: Api, path: str, said: str) -> None:
    answer = api.call("GET", path)
    assert (answer.status, answer.json["detail"]) == (422, said)


def test_a_picture_that_is_not_there_yet_is_a_conflict(api: Api) -> None:
    job = api.call("POST", "/v1/jobs", {"prompt": "a", "model": NOBODYS}).json
    answer = api.call("GET", job["links"]["image"])
    assert (answer.status, answer.headers["retry-after"]) == (409, "2")
    assert "is queued: it has no picture yet" in answer.json["detail"]


def test_a_failed_job_says_why(api: Api) -> None:
    job = api.call("POST", "/v1/jobs", {"prompt": "fail please"}).json
    assert api.wait(job)["error"] == "It was asked to fail."
    answer = api.call("GET", job["links"]["image"])
    assert answer.json["detail"] == "It was asked to fail."
    assert 400 <= answer.status < 500


def test_every_job_field_is_taken_and_handed_back(api: Api) -> None:
    given = {
        "prompt": "a cat",
        "negative_prompt": "dogs",
        "seed": 3,
        "width": 64,
        "height": 128,
        "steps": 5,
        "guidance_scale": 2.5,
        "guidance_start": 0.1,
        "guidance_stop": 0.9,
        "scheduler": "Euler a",
        "model": NOBODYS,
        "revision": "r1",
        "format": "jpg",
        "priority": 8,
        "metadata": {"a": [1]},
    }
    job = api.call("POST", "/v1/jobs", given).json
    seen = api.call("GET", job["links"]["self"]).json["job"]
    expected = given | {"scheduler": "euler_ancestral", "format": "jpeg"}
    assert {name: seen[name] for name in given} == expected
    document = api.call("GET", "/openapi.json", key="").json["components"]["schemas"]["Job"]
    assert set(document["properties"]) == {*WRITTEN_FIELDS, "webhook"}


def test_equal_jobs_are_one_job_and_two_submissions(api: Api, environment: None) -> None:
    fields = {"prompt": "shared", "seed": 1, "model": NOBODYS, "revision": "r"}
    mine = api.call("POST", "/v1/jobs", fields | {"metadata": {"who": "me"}}).json
    others_key = api.new_key("other")
    others = api.call("POST", "/v1/jobs", fields | {"metadata": {"who": "you"}}, key=others_key).json
    assert mine["id"] == others["id"] == submit_job("shared", seed=1, model=NOBODYS, revision="r").id
    assert api.call("GET", mine["links"]["self"]).json["job"]["metadata"] == {"who": "me"}
    seen = api.call("GET", f"/v1/jobs/{mine['id']}", key=others_key).json
    assert (seen["job"]["metadata"], seen["submission"]) == ({"who": "you"}, others["submission"])
    # A submission of somebody else's is nobody's business.
    assert api.call("GET", mine["links"]["self"], key=others_key).status == 404

    gone = api.call("DELETE", f"/v1/jobs/{mine['id']}", key=others_key)
    assert gone.json == {"id": mine["id"], "state": "cancelled"}
    assert api.call("GET", others["links"]["self"], key=others_key).json["state"] == "cancelled"
    assert api.call("GET", mine["links"]["self"]).json["state"] == "queued"
    assert api.call("DELETE", f"/v1/jobs/{mine['id']}", key=others_key).status == 403
    assert api.call("DELETE", mine["links"]["self"]).json["state"] == "cancelled"
    assert JobHandle(mine["id"]).state() == "queued"  # The one that was submitted without HTTP.


def test_metadata_of_others_is_not_shown(api: Api, environment: None) -> None:
    handle = submit_job("a secret", seed=5, model=NOBODYS, metadata={"customer": "Jones"})
    key = api.new_key("curious")
    assert api.call("GET", f"/v1/jobs/{handle.id}", key=key).json["job"]["metadata"] == {}
    assert "Jones" not in api.call("GET", "/v1/jobs?limit=1000", key=key).body.decode()
    assert api.call("GET", f"/v1/jobs/{handle.id}").json["job"]["metadata"] == {"customer": "Jones"}


@pytest.mark.parametrize("is_expired", [False, True])
def test_a_submission_that_begins_as_ones_own_shows_nothing_of_others(
    api: Api, environment: None, is_expired: bool
) -> None:
    fields = {
        "prompt": f"another secret {is_expired}",
        "seed": 5,
        "metadata": {"who": "Jones"},
        "priority": 7,
    }
    job = api.call("POST", "/v1/jobs", fields).json
    api.wait(job)
    key = api.new_key(f"curious-{is_expired}")
    mine = api.call("POST", "/v1/jobs", {"prompt": "a", "model": NOBODYS}, key=key).json
    made_up = mine["submission"][:8] + "0" * 16
    if is_expired:
        with connect(api.stack.valkey.url, 2) as client:
            client.delete(job_key(job["id"]))
    for path in ("", "/events", "/image"):
        answer = api.call("GET", f"/v1/jobs/{job['id']}{path}?submission={made_up}", key=key)
        assert (answer.status, b"Jones" in answer.body) == (404, False)
        assert f"no submission {made_up}" in answer.json["detail"]
    assert api.call("DELETE", f"/v1/jobs/{job['id']}?submission={made_up}", key=key).status == 404
    for path in ("", "/events"):
        seen = api.call("GET", f"/v1/jobs/{job['id']}{path}", key=key)
        assert (seen.status, b"Jones" in seen.body, b'"priority": 7' in seen.body) == (200, False, False)


def test_a_list_of_a_thousand_is_sent(api: Api) -> None:
    jobs = [{"prompt": f"cat {number}", "model": NOBODYS} for number in range(1_000)]
    found = api.call("POST", "/v1/jobs", jobs).json["jobs"]
    assert len({job["id"] for job in found}) == 1_000
    assert len({job["seed"] for job in found}) > 990
    assert api.call("GET", found[999]["links"]["self"]).json["job"]["prompt"] == "cat 999"


def test_of_a_list_with_wrong_jobs_nothing_is_sent(api: Api) -> None:
    with connect(api.stack.valkey.url, 2) as client:
        before = client.zcard("smallcat:latest")
        answer = api.call("POST", "/v1/jobs", [{"prompt": "right"}, {"prompt": "x", "stpes": 3}, 7])
        assert client.zcard("smallcat:latest") == before
    assert answer.status == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json["detail"] == "2 of 3 jobs are refused, and none was sent."
    assert answer.json["errors"][0] == {
        "index": 1,
        "detail": 'There is no job field "stpes": did you mean "steps"?',
    }
    assert [each["index"] for each in answer.json["errors"]] == [1, 2]


@pytest.mark.parametrize(
    ("raw", "status", "part"),
    [
        (b'{"prompt": ""}', 422, "prompt is empty: say what to draw."),
        (b'{"prompt": "a", "steps": 1000}', 422, "steps is 1000: it must be 1 to 150."),
        (b'{"prompt": "a", "seed": "7"}', 422, "seed is '7'"),
        # As JSON has them.
        (b'{"prompt": "a", "steps": true}', 422, "steps is true: "),
        (
            b'{"prompt": {"a": [null, false, 1.5, "\\u00e4"]}}',
            422,
            'prompt is {"a": [null, false, 1.5, "\u00e4"]}: ',
        ),
        (b'[{"prompt": "a"}, {"prompt": null}]', 422, "1 of 2 jobs are refused"),
        (b'{"prompt": "a", "images": 4}', 422, "images is 4: a job here is one picture. For several of one"),
        (b'{"prompt": "a", "zzz": 4}', 422, ", webhook."),
        (b"[]", 422, "The list has 0 jobs: send 1 to 1,000"),
        (json.dumps([{"prompt": "a"}] * 1_001).encode(), 422, "The list has 1,001 jobs"),
        (b'"a cat"', 422, "A job is 'a cat': it must be an object"),
        (b"{", 400, "The body is not JSON"),
        (b'{"prompt": "a", "prompt": "b"}', 400, "an object has 'prompt' twice"),
        (b'{"prompt": NaN}', 400, "it has NaN"),
        (b"\xff", 400, "The body is not UTF-8"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"prompt": "\\ud800"}', 422, "unable to parse raw data as a unicode string"),
    ],
)
def test_what_cannot_be_a_job_is_refused_with_a_sentence(
    api: Api, raw: bytes, status: int, part: str
) -> None:
    answer = api.call("POST", "/v1/jobs", raw=raw)
    assert answer.status == status
    assert part in answer.json["detail"]
    assert answer.json["status"] == status


def test_a_body_of_another_type_is_refused(api: Api) -> None:
    answer = api.call(
        "POST", "/v1/jobs", raw=b"prompt=a", headers={"Content-Type": "application/x-www-form-urlencoded"}
    )
    assert answer.status == 415
    sentence = "send JSON with `Content-Type: application/json`, or a form as multipart/form-data."
    assert answer.json["detail"].endswith(sentence)


@pytest.mark.parametrize("job_id", ["0" * 32, "nonsense", "A" * 32, "%2e%2e", "0" * 31 + "*"])
@pytest.mark.parametrize("path", ["", "/image", "/events"])
def test_an_unknown_job_is_not_found(api: Api, job_id: str, path: str) -> None:
    answer = api.call("GET", f"/v1/jobs/{job_id}{path}")
    assert (answer.status, answer.json["type"]) == (404, "urn:smallcat:error:UnknownJobError")


def test_the_latest_jobs_are_listed(api: Api) -> None:
    job = api.call("POST", "/v1/jobs", {"prompt": "the latest"}).json
    assert job["id"] in [each["id"] for each in api.call("GET", "/v1/jobs?limit=5").json["jobs"]]


# Keys


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/jobs"),
        ("GET", "/v1/jobs"),
        ("GET", f"/v1/jobs/{'0' * 32}"),
        ("DELETE", f"/v1/jobs/{'0' * 32}"),
        ("GET", f"/v1/jobs/{'0' * 32}/image"),
        ("GET", f"/v1/jobs/{'0' * 32}/events"),
    ],
)
def test_without_a_key_nothing_is_answered(api: Api, method: str, path: str) -> None:
    for key in ("", "wrong"):
        answer = api.call(method, path, {"prompt": "a"} if method == "POST" else None, key=key)
        assert answer.status == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")


def test_a_key_may_do_what_its_scopes_say(api: Api) -> None:
    reads, submits = api.new_key("reads", "read"), api.new_key("submits", "submit")
    answer = api.call("POST", "/v1/jobs", {"prompt": "a"}, key=reads)
    assert (answer.status, answer.json["type"]) == (403, "urn:smallcat:error:Forbidden")
    assert 'The key "reads" has no scope submit' in answer.json["detail"]
    assert api.call("GET", "/v1/jobs", key=submits).status == 403
    assert api.call("POST", "/v1/jobs", {"prompt": "a"}, key=submits).status == 202


def test_a_key_can_be_a_password(api: Api) -> None:
    token = base64.b64encode(f"anybody:{api.key}".encode()).decode()
    assert api.call("GET", "/v1/jobs", headers={"Authorization": f"Basic {token}"}).status == 200
    for wrong in ("Basic ???", "Basic", "Digest x", "Bearer", "Bearer " + "x" * 5_000):
        assert api.call("GET", "/v1/jobs", headers={"Authorization": wrong}).status == 401


def test_redis_has_no_key(api: Api) -> None:
    key = api.new_key("hidden")
    assert api.call("GET", "/v1/jobs", key=key).status == 200
    with connect(api.stack.valkey.url, 2) as client:
        texts = repr([client.hgetall("smallcat:http:keys"), client.hgetall("smallcat:http:keys:used")])
    assert "hidden" in texts
    assert key not in texts


# Idempotency


def post(api: Api, body: Any, key: str) -> Any:
    return api.call("POST", "/v1/jobs", body, headers={"Idempotency-Key": key})


def test_a_request_that_is_sent_again_is_done_once(api: Api) -> None:
    body = [{"prompt": "once", "model": NOBODYS}, {"prompt": "once", "model": NOBODYS}]
    first, second = post(api, body, "k-1"), post(api, body, '"k-1"')
    assert first.status == second.status == 202
    assert first.json == second.json
    # Other callers' keys are theirs.
    other = api.call("POST", "/v1/jobs", body, key=api.new_key("else"), headers={"Idempotency-Key": "k-1"})
    assert other.json != first.json


def test_the_same_key_with_another_body_is_refused(api: Api) -> None:
    assert post(api, {"prompt": "a", "model": NOBODYS}, "k-2").status == 202
    answer = post(api, {"prompt": "b", "model": NOBODYS}, "k-2")
    assert (answer.status, answer.json["type"]) == (422, "urn:smallcat:error:IdempotencyKeyReused")


def test_a_refused_request_leaves_its_key_free(api: Api) -> None:
    assert post(api, {"prompt": ""}, "k-3").status == 422
    assert post(api, {"prompt": "corrected", "model": NOBODYS}, "k-3").status == 202


@pytest.mark.parametrize("key", ["", " ", "a b", "ä", "x" * 256])
def test_a_strange_idempotency_key_is_refused(api: Api, key: str) -> None:
    answer = api.call(
        "POST", "/v1/jobs", {"prompt": "a"}, headers={"Idempotency-Key": key.encode().decode("latin-1")}
    )
    assert answer.status == 400


def test_of_many_at_once_one_is_done(api: Api) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(api, {"prompt": "race", "model": NOBODYS}, "k-4"), range(8)))
    assert {each.status for each in answers} <= {202, 409}
    assert len({each.body for each in answers if each.status == 202}) == 1


def test_a_list_that_was_cut_off_goes_on_where_it_was() -> None:
    """The server is killed while it sends; the retry has every job, and each counts once."""
    with Stack(workers=0, http=True) as stack:
        assert stack.http is not None
        api = Api(stack, stack.http.url, stack.http.key)
        body = [{"prompt": f"cat {number}", "model": "m", "revision": "r"} for number in range(1_000)]
        with ThreadPoolExecutor(1) as pool, connect(stack.valkey.url, 2) as client:
            cut_off = pool.submit(post, api, body, "list")
            while not client.zcard("smallcat:latest"):
                time.sleep(0.001)
            stack.http.kill()
            assert cut_off.exception() is not None
            sent = set(client.zrange("smallcat:latest", 0, -1))
            assert sent
            client.delete(*client.keys("smallcat:http:once:*:runs"))  # As half a minute does.
            stack.http.start()
            found = post(api, body, "list").json["jobs"]
            assert {job["id"] for job in found} == set(client.zrange("smallcat:latest", 0, -1))
            assert sent <= {job["id"] for job in found}
            assert {client.hget(f"smallcat:job:{job['id']}", "subs") for job in found} == {"1"}
