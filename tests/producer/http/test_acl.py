"""The HTTP API with the Redis user of `deploy/redis-http.acl`: it serves, and makes no keys."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.embedded.stack import Stack
from producer.http.sessions import MAX_SESSIONS
from tests.integration.test_acl import SERVERS
from tests.producer.http.conftest import Api, fast_worker
from tests.producer.http.test_events import Stream
from tests.producer.http.test_runs import finished, upload
from worker.state.redis_client import RedisError, connect
from worker.state.shared_scripts import load

DEPLOY = Path(__file__).parents[3] / "deploy"
PASSWORD = "a-password"


def words(line: str) -> list[str]:
    """The rules of an ACL file's line: a selector in parentheses is one."""
    found: list[str] = []
    for word in line.split():
        if found and found[-1].startswith("(") and not found[-1].endswith(")"):
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def uses_a_tenant(api: Api) -> None:
    """All that is counted of a tenant with every limit is read and written."""
    limits = {"max_queued": 3, "max_pixel_steps_a_day": 10**9, "requests_per_s": 100, "burst": 100}
    key = api.new_key("limited", tenant="limited", **limits)
    own = Api(api.stack, api.url, key)
    jobs = [{"prompt": "a", "seed": seed} for seed in range(3)]
    for job in own.call("POST", "/v1/jobs", jobs).json["jobs"]:
        assert own.wait(job)["state"] == "done"
    assert len(own.call("GET", "/v1/jobs").json["jobs"]) == 3
    assert finished(own, upload(own, b"a cat\n").json)["done"] == 1
    assert [row["tenant"] for row in own.call("GET", "/v1/usage").json["usage"]] == ["limited"]


@pytest.mark.parametrize("version", ["", "-7.0", "-6.2"])
def test_it_may_do_what_a_producer_may(version: str) -> None:
    files = (DEPLOY / f"redis-{name}{version}.acl" for name in ("producer", "http"))
    producer, http = (words(file.read_text())[2:] for file in files)
    assert [word for word in producer if word not in http] == []


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    "server",
    [pytest.param(name, marks=() if name == "valkey" else pytest.mark.services) for name in SERVERS],
)
def test_its_own_redis_user_is_enough_and_makes_no_keys(
    new_stack: Callable[..., Stack], server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    producers, find = SERVERS[server]
    if (program := find()) is None:
        pytest.skip(f"there is no {server} here")
    monkeypatch.setattr("deploy.embedded.servers.valkey_server", lambda: program)
    stack = new_stack(workers=0, http=True)
    assert stack.http is not None
    with connect(stack.valkey.url, 2) as client:
        load(client)
        for name in (producers.replace("producer", "http"), producers):
            rules = words((DEPLOY / name).read_text().replace("PASSWORD", PASSWORD))
            client.execute_command("ACL", "SETUSER", *rules[1:])
    where = f"@127.0.0.1:{stack.valkey.port}/0"
    url = f"redis://http:{PASSWORD}{where}"
    stack.http._variables = lambda: {**os.environ, **stack._servers, "REDIS_URL": url}
    stack.http.restart()
    api = Api(stack, stack.http.url, stack.http.key)
    worker = fast_worker(stack)
    try:
        job = api.call("POST", "/v1/jobs", {"prompt": "a"}, headers={"Idempotency-Key": "k"}).json
        assert api.call("POST", "/v1/jobs", {"prompt": "a"}, headers={"Idempotency-Key": "k"}).json == job
        stream = Stream(api, job["links"]["events"])
        while (event := stream.next()) is not None and event["event"] != "done":
            pass
        assert event is not None
        assert api.call("GET", job["links"]["image"]).status == 307
        assert api.call("DELETE", job["links"]["self"]).status == 200
        assert api.call("GET", "/v1/jobs").status == api.call("GET", "/v1/fleet").status == 200
        assert finished(api, upload(api, b"a cat\n").json)["done"] == 1
        assert api.call("POST", "/sdapi/v1/options", {"sd_model_checkpoint": "fast"}).status == 200
        assert api.call("POST", "/sdapi/v1/txt2img", {"prompt": "a"}).status == 200
        assert api.call("GET", "/readyz").status == 200
        uses_a_tenant(api)
        for _ in range(MAX_SESSIONS + 1):
            session = api.call("POST", "/page/session", {"key": api.key}, key="")
            assert session.status == 200
        cookie = {"Cookie": session.headers["set-cookie"].partition(";")[0]}
        with_proof = {**cookie, "X-CSRF-Token": session.json["proof"]}
        assert api.call("DELETE", "/page/session", key="", headers=with_proof).status == 200
        assert api.call("GET", f"/v1/jobs/{job['id']}/thumbnail").status == 200
        assert api.call("GET", f"/v1/jobs/{job['id']}/preview").status == 204
        event = Stream(api, "/v1/activity").next()
        assert event is not None
        assert job["id"] in [each["id"] for each in event["data"]["jobs"]]
    finally:
        worker.kill()
        worker.wait()
    # Redis 6.2 has one list of commands for all keys.
    for user in ("http", "producer") if server != "redis 6.2" else ():
        with connect(f"redis://{user}:{PASSWORD}{where}", 0) as client:
            for command in (
                ("HSET", "smallcat:http:keys", "x", "y"),
                ("HGETALL", "smallcat:http:keys"),
                ("DEL", "smallcat:http:keys"),
                ("HSET", "smallcat:http:tenants", "x", "y"),
                ("HSET", "smallcat:worker-only:usage:1", "x:images", "1"),
                ("SET", "smallcat:preview:x", "y"),
                ("ZADD", "smallcat:drawn", "1", "x"),
            ):
                with pytest.raises(RedisError, match=r"(?i)permission"):
                    client.execute_command(*command)
