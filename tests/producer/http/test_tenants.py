"""Tenants of the HTTP API: what each sees, and the limits of what it may send."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from click.testing import CliRunner

from producer import submit_job
from producer.cli.main import cli
from tests.fast_worker import DEVICE_S
from tests.producer.http.conftest import AWAY, Answer, Api
from tests.producer.http.test_events import Stream
from tests.producer.http.test_runs import lines_of, upload
from worker.contract.job import Job
from worker.state.keys import latest_key
from worker.state.redis_client import connect

#: A job that stays queued.
WAITING = {"prompt": "a cat", "seed": 1, "model": AWAY, "revision": "r"}
#: One of known pixels x steps, likewise: 64 x 64 x 10.
SMALL = WAITING | {"width": 64, "height": 64, "steps": 10}
WORK = 64 * 64 * 10


def submit(api: Api, key: str, body: Any = WAITING, **options: Any) -> Answer:
    return api.call("POST", "/v1/jobs", body, key=key, **options)


def activity(api: Api, key: str) -> str:
    """What the page is told first, until the figures of the fleet."""
    stream = Stream(Api(api.stack, api.url, key), "/v1/activity")
    text = ""
    while (event := stream.next()) is not None and event["event"] != "fleet":
        text += json.dumps(event)
    return text


def fleet_event(api: Api, key: str, path: str = "/v1/fleet") -> Any:
    """The figures of the fleet; with `/v1/activity` as the page is told them, with the queues by name."""
    if path == "/v1/fleet":
        return api.call("GET", path, key=key).json
    stream = Stream(Api(api.stack, api.url, key), path)
    while (event := stream.next()) is not None and event["event"] != "fleet":
        pass
    assert event is not None
    return event["data"]


@pytest.fixture(scope="module")
def keys(api: Api) -> dict[str, str]:
    """Two keys of a tenant, its admin's, another tenant's two, and one of nobody."""
    return {
        "acme": api.new_key("acme-site", tenant="acme"),
        "acme-2": api.new_key("acme-app", tenant="acme"),
        "acme-admin": api.new_key("acme-boss", "admin", tenant="acme"),
        "evil": api.new_key("evil-site", tenant="evil"),
        "evil-admin": api.new_key("evil-boss", "admin", tenant="evil"),
        "nobody": api.new_key("nobody"),
    }


#: The paths of a job that can be read.
READ = ("", "/events", "/image", "/thumbnail", "/preview")
#: Who may not see a job of acme's.
STRANGERS = ("evil", "evil-admin", "nobody")


def test_equal_jobs_of_two_tenants_are_two_jobs_and_two_pictures(api: Api, keys: dict[str, str]) -> None:
    body = {"prompt": "ours", "seed": 3}
    jobs = {who: submit(api, keys[who], body).json for who in ("acme", "evil", "nobody", "acme-2")}
    assert len({jobs[who]["id"] for who in ("acme", "evil", "nobody")}) == 3
    assert jobs["acme"]["id"] == jobs["acme-2"]["id"]
    for who, where in (
        ("acme", "images/tenants/acme/"),
        ("evil", "images/tenants/evil/"),
        ("nobody", "images/"),
    ):
        link = api.call("GET", f"{jobs[who]['links']['image']}&wait=30", key=keys[who])
        assert where + jobs[who]["id"][:2] in link.headers["location"]
        whole = api.call("GET", f"{jobs[who]['links']['image']}&redirect=false", key=keys[who])
        assert whole.status == 200
    seen = api.call("GET", jobs["acme"]["links"]["self"], key=keys["acme"]).json
    assert (seen["job"]["tenant"], seen["state"]) == ("acme", "done")
    # A job as it was shown can be submitted again, by its own tenant alone.
    assert submit(api, keys["acme"], seen["job"]).json["id"] == seen["id"]
    refused = submit(api, keys["evil"], seen["job"])
    assert refused.status == 422
    assert "tenant" in refused.json["detail"]


@pytest.mark.parametrize("is_done", [False, True])
def test_nobody_else_sees_a_job_in_any_way(api: Api, keys: dict[str, str], is_done: bool) -> None:
    body = {"prompt": "a secret", "seed": 9} if is_done else WAITING | {"prompt": "a secret"}
    job = submit(api, keys["acme"], body).json
    if is_done:
        assert api.call("GET", f"{job['links']['image']}&wait=30", key=keys["acme"]).status == 307
    path, named = f"/v1/jobs/{job['id']}", job["links"]["self"].partition("?")[2]
    unknown = "0" * 32
    for who in STRANGERS:
        for method, ending in (*(("GET", each) for each in READ), ("DELETE", "")):
            for query in ("", f"?{named}"):
                answer = api.call(method, path + ending + query, key=keys[who])
                assert answer.status == 404, (who, method, ending, query)
                # In the words for one that is not there.
                nothing = api.call(method, f"/v1/jobs/{unknown}{ending}", key=keys[who])
                assert answer.body == nothing.body.replace(unknown.encode(), job["id"].encode())
        listed = api.call("GET", "/v1/jobs?limit=1000", key=keys[who])
        assert listed.status == 200
        assert "a secret" not in listed.body.decode()
        assert "a secret" not in activity(api, keys[who])
    assert "a secret" in activity(api, keys["acme-2"])
    for who in ("acme", "acme-2", "acme-admin", ""):
        key = keys[who] if who else None
        assert api.call("GET", path, key=key).status == 200, who
        assert "a secret" in api.call("GET", "/v1/jobs?limit=1000", key=key).body.decode(), who


def test_a_tenants_list_is_not_pushed_out_by_others(api: Api, keys: dict[str, str]) -> None:
    job = submit(api, keys["acme"], WAITING | {"prompt": "mine among many"}).json
    with connect(api.stack.valkey.url, 1) as client:
        client.delete(latest_key(""))
    listed = api.call("GET", "/v1/jobs", key=keys["acme-2"]).json["jobs"]
    assert job["id"] in [each["id"] for each in listed]


def test_the_fleets_figures_are_of_a_tenants_own_messages(
    api: Api, keys: dict[str, str], environment: None
) -> None:
    key = api.new_key("few", tenant="few")
    submit(api, keys["acme"], [WAITING | {"seed": seed} for seed in range(50, 55)])
    submit(api, key, [WAITING | {"seed": seed} for seed in range(2)])
    assert list(api.call("GET", "/v1/fleet", key=key).json["queues"].values()) == [2]
    assert sum(api.call("GET", "/v1/fleet").json["queues"].values()) >= 7
    # A key of no tenant hears of no tenant's.
    submit_job(Job(prompt="a", seed=1, model="a-secret-model", tenant="acme"))
    before = sum(fleet_event(api, keys["nobody"])["queues"].values())
    submit(api, keys["nobody"], WAITING | {"prompt": "nobody's own"})
    assert sum(fleet_event(api, keys["nobody"])["queues"].values()) == before + 1
    for who, is_told in (("nobody", False), ("acme", True), (None, True)):
        for path in ("/v1/fleet", "/v1/activity"):
            found = fleet_event(api, keys[who] if who else api.key, path)
            assert ("a-secret-model" in json.dumps(found["queues"])) is is_told, (who, path)


def test_an_admin_of_a_tenant_cancels_its_jobs_and_no_others(api: Api, keys: dict[str, str]) -> None:
    jobs = {who: submit(api, keys[who], WAITING | {"prompt": "to cancel"}).json for who in ("acme", "evil")}
    ours, theirs = (f"/v1/jobs/{jobs[who]['id']}" for who in ("acme", "evil"))
    assert api.call("DELETE", ours, key=keys["acme-2"]).status == 403
    assert api.call("DELETE", theirs, key=keys["acme-admin"]).status == 404
    assert api.call("DELETE", ours, key=keys["acme-admin"]).json["state"] == "cancelled"
    assert api.call("GET", theirs, key=keys["evil"]).json["state"] == "queued"
    assert api.call("DELETE", theirs).json["state"] == "cancelled"


def test_an_idempotency_key_is_its_tenants(api: Api, keys: dict[str, str]) -> None:
    same = {"headers": {"Idempotency-Key": "order-1"}}
    mine = submit(api, keys["acme"], **same).json
    assert submit(api, keys["acme"], **same).json == mine
    theirs = submit(api, keys["evil"], **same).json
    assert (theirs["id"], theirs["submission"]) != (mine["id"], mine["submission"])
    assert theirs["id"] != mine["id"]


def test_runs_and_waiting_requests_are_their_tenants(api: Api, keys: dict[str, str]) -> None:
    run = upload(api, b"a cat\n", "seed_start=1", key=keys["acme"]).json
    theirs = upload(api, b"a cat\n", "seed_start=1", key=keys["evil"]).json
    assert run["run"] != theirs["run"]
    for who in (*STRANGERS, "acme-2"):
        for ending in ("", "/manifest", "/rejected", "/gallery"):
            assert api.call("GET", f"/v1/runs/{run['run']}{ending}", key=keys[who]).status == 404
        assert api.call("DELETE", f"/v1/runs/{run['run']}", key=keys[who]).status == 404
        assert run["run"] not in api.call("GET", "/v1/runs", key=keys[who]).body.decode()
    for _ in range(600):
        found = api.call("GET", f"/v1/runs/{run['run']}", key=keys["acme"]).json
        if found["state"] == "finished":
            break
        time.sleep(0.05)
    [line] = lines_of(api.call("GET", f"/v1/runs/{run['run']}/manifest", key=keys["acme-admin"]))
    assert "/images/tenants/acme/" in line["uri"]
    assert api.call("GET", f"/v1/jobs/{line['id']}", key=keys["evil"]).status == 404
    done = api.call("POST", "/sdapi/v1/txt2img", {"prompt": "a1111's"}, key=keys["acme"])
    assert done.status == 200
    assert api.call("GET", "/sdapi/v1/progress", key=keys["evil"]).json["state"]["job_count"] == 0
    made = api.call("POST", "/v1/images/generations", {"prompt": "openai's"}, key=keys["acme"]).json
    assert "/images/tenants/acme/" in made["data"][0]["url"]
    assert api.call("GET", f"/v1/jobs/{made['data'][0]['id']}", key=keys["evil"]).status == 404


def test_tenants_that_share_pictures_share_nothing_else(api: Api) -> None:
    one, two, three = (api.new_key(name, tenant=name, pictures="stock") for name in ("one", "two", "three"))
    body = {"prompt": "a shared one", "seed": 4, "metadata": {"who": 1}}
    job = submit(api, one, body).json
    assert submit(api, two, body).json["id"] == job["id"]
    path = f"/v1/jobs/{job['id']}"
    assert (
        "/images/tenants/shared-stock/"
        in api.call("GET", f"{job['links']['image']}&wait=30", key=one).headers["location"]
    )
    assert api.call("GET", path, key=two).status == 200
    assert api.call("GET", path, key=three).status == 404
    assert "a shared one" not in api.call("GET", "/v1/jobs", key=three).body.decode()
    assert "a shared one" in api.call("GET", "/v1/jobs", key=two).body.decode()
    line = json.dumps({"prompt": "a line", "image": job["id"]}).encode()
    assert upload(api, line, "name=a.jsonl", key=two).status == 202
    refused = upload(api, line, "name=a.jsonl", key=three)
    assert (refused.status, f"{job['id']}, which is not known" in refused.json["detail"]) == (422, True)
    waiting = WAITING | {"prompt": "shared, and waits"}
    jobs = {key: submit(api, key, waiting).json for key in (one, two)}
    boss = api.new_key("one-boss", "admin", tenant="one")
    assert api.call("DELETE", f"/v1/jobs/{jobs[one]['id']}", key=boss).json["state"] == "cancelled"
    assert api.call("GET", jobs[two]["links"]["self"], key=two).json["state"] == "queued"


# Limits


def limited(api: Api, name: str, **settings: Any) -> str:
    return api.new_key(name, tenant=name, **settings)


@pytest.mark.parametrize(
    ("settings", "body", "part"),
    [
        ({"max_priority": 4}, {"priority": 5}, "priority is 5: the tenant NAME may ask for 0 to 4."),
        (
            {"formats": ["png", "webp"]},
            {"format": "jpeg"},
            "format is 'jpeg': the tenant NAME may use png, webp.",
        ),
        ({"models": ["fast"]}, {}, f"model is '{AWAY}': the tenant NAME may use fast."),
        (
            {"max_pixel_steps": WORK - 1},
            {},
            f"is 64 x 64 x 10 = {WORK:,}: the tenant NAME may ask for up to {WORK - 1:,} in a job.",
        ),
        ({"max_pixel_steps_a_day": WORK - 1}, {}, f"may submit {WORK - 1:,} a day."),
        (
            {"max_pixel_steps": WORK, "models": ["new"]},
            {"model": "new", "revision": "", "steps": None},
            "give width, height and steps.",
        ),
    ],
)
def test_what_a_tenant_may_never_ask_for_is_forbidden(
    api: Api, settings: dict[str, Any], body: dict[str, Any], part: str
) -> None:
    name = f"never-{next(iter(settings)).replace('_', '-')}-{len(str(body))}"
    key = limited(api, name, **settings)
    answer = submit(api, key, SMALL | body)
    assert answer.status == 403
    assert part.replace("NAME", name) in answer.json["detail"]
    assert answer.json["type"] == "urn:smallcat:error:LimitExceeded"
    run = upload(api, json.dumps({"prompt": "x", **SMALL, **body}).encode() + b"\n", "name=a.jsonl", key=key)
    if "a_day" not in str(settings):
        # Of a file, the line is rejected.
        assert run.status == 202
        for _ in range(600):
            found = api.call("GET", run.json["links"]["self"], key=key).json
            if found["rejected"]:
                break
            time.sleep(0.05)
        [line] = lines_of(api.call("GET", run.json["links"]["rejected"], key=key))
        assert part.replace("NAME", name) in line["reason"]
    assert api.call("GET", "/v1/jobs", key=key).json["jobs"] == []


def test_a_priority_that_is_not_given_is_one_that_the_tenant_may_have(api: Api) -> None:
    key = limited(api, "lowly", max_priority=2)
    assert api.call("GET", submit(api, key).json["links"]["self"], key=key).json["job"]["priority"] == 2
    assert upload(api, b"a cat\n", "priority=3", key=key).status == 403
    assert upload(api, b"a cat\n", f"model={AWAY}&revision=r", key=key).status == 202


def test_jobs_queued_are_limited_and_a_list_counts_as_its_jobs(api: Api) -> None:
    key = limited(api, "queue", max_queued=3)
    jobs = [SMALL | {"seed": seed} for seed in range(4)]
    assert submit(api, key, jobs).status == 403
    sent = submit(api, key, jobs[:2]).json["jobs"]
    refused = submit(api, key, jobs[2:])
    assert refused.status == 429
    assert refused.json["type"] == "urn:smallcat:error:LimitReached"
    assert int(refused.headers["retry-after"]) >= 1
    assert "2 more jobs are asked for, and 2 of the tenant queue wait or run: its limit is 3." in str(
        refused.json
    )
    # What is refused is not sent, and not counted; an equal job is the same one.
    assert len(api.call("GET", "/v1/jobs", key=key).json["jobs"]) == 2
    assert submit(api, key, [jobs[1], jobs[2]]).status == 202
    assert submit(api, key, jobs[3]).status == 429
    error = api.call("POST", "/v1/images/generations", {"prompt": "b"}, key=key).json
    assert (error["error"]["type"], error["error"]["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    # A cancelled job that never ran gives back its place.
    assert api.call("DELETE", sent[0]["links"]["self"], key=key).json["state"] == "cancelled"
    with connect(api.stack.valkey.url, 1) as client:
        client.zadd(
            "smallcat:http:open:queue", dict.fromkeys(client.zrange("smallcat:http:open:queue", 0, -1), 0)
        )
    assert submit(api, key, jobs[3]).status == 202


def test_messages_of_cancelled_jobs_are_limited_too(api: Api) -> None:
    """Each lies in the queue until a worker takes it out, and none of that model runs."""
    key = limited(api, "cancels", max_queued=2)
    found = []
    for seed in range(20):
        found.append(submit(api, key, SMALL | {"seed": seed, "prompt": "cancelled"}))
        if found[-1].status == 202:
            api.call("DELETE", found[-1].json["links"]["self"], key=key)
            with connect(api.stack.valkey.url, 1) as client:
                client.delete("smallcat:http:open:cancels")
    assert [each.status for each in found] == [202] * 14 + [429] * 6
    assert "14 messages of the tenant cancels lie in one queue" in found[-1].json["detail"]


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"model": "made-up"}, "No worker serves the model 'made-up', nor did one lately"),
        ({"model": "made-up", "revision": "x"}, "`smallcat tenants set NAME --model` lets"),
        ({"model": "fast", "revision": "x"}, "at the revision 'x', nor did one lately: leave revision out."),
        ({"model": "new", "revision": "x"}, "at the revision 'x', nor did one lately: leave revision out."),
        ({"revision": "x"}, "No worker serves the model 'default'"),
    ],
)
def test_a_tenant_cannot_make_queues_by_naming_models(api: Api, fields: dict[str, str], part: str) -> None:
    models = ["new", "fast", "default"] if fields.get("model") == "new" else []
    name = f"names-{len(str(fields))}-{len(models)}"
    key = limited(api, name, models=models)
    with connect(api.stack.valkey.url, 1) as client:
        before = client.smembers("smallcat:queues")
        answer = submit(api, key, {"prompt": "a cat", **fields})
        assert (answer.status, part.replace("NAME", name) in answer.json["detail"]) == (404, True), (
            answer.body
        )
        assert client.smembers("smallcat:queues") == before
        if models:
            assert submit(api, key, {"prompt": "a cat", "model": "new"}).status == 202
        run = upload(api, json.dumps({"prompt": "x", **fields}).encode() + b"\n", "name=a.jsonl", key=key)
        for _ in range(600):
            found = api.call("GET", run.json["links"]["self"], key=key).json
            if found["rejected"]:
                break
            time.sleep(0.05)
        [line] = lines_of(api.call("GET", run.json["links"]["rejected"], key=key))
        assert "nor did one lately" in line["reason"]


def test_a_day_of_work_is_limited_and_an_idempotency_key_is_counted_once(api: Api) -> None:
    key = limited(api, "day", max_pixel_steps_a_day=3 * WORK)
    once = {"headers": {"Idempotency-Key": "k"}}
    first = submit(api, key, [SMALL, SMALL | {"seed": 2}], **once)
    assert [submit(api, key, [SMALL, SMALL | {"seed": 2}], **once).json for _ in range(3)] == [first.json] * 3
    refused = submit(api, key, [SMALL | {"seed": seed} for seed in (3, 4)])
    assert refused.status == 429
    assert f"has submitted {2 * WORK:,} today: its limit is {3 * WORK:,} a day." in refused.json["detail"]
    assert "The next day begins at 00:00 UTC" in refused.json["detail"]
    left_s = 86_400 - time.time() % 86_400
    assert abs(int(refused.headers["retry-after"]) - left_s) < 30
    assert submit(api, key, SMALL | {"seed": 3}).status == 202
    assert submit(api, key, SMALL | {"seed": 4}).status == 429


def test_a_run_is_sent_as_its_tenants_limits_permit(api: Api) -> None:
    key = limited(api, "runs", max_queued=5)
    text = b"".join(b"a cat %d\n" % number for number in range(12))
    waiting = upload(api, text, f"model={AWAY}&revision=r", key=key).json
    for _ in range(600):
        held = api.call("GET", waiting["links"]["self"], key=key).json
        if held["notices"] and held["sent"]:
            break
        time.sleep(0.05)
    assert (held["sent"], held["total"]) == (5, None)
    assert (
        "The rest waits: 7 more jobs are asked for, and 0 of the tenant runs wait or run"
        in held["notices"][0]
    )
    # Single jobs share the limit.
    assert submit(api, key).status == 429
    assert api.call("DELETE", waiting["links"]["self"], key=key).json["state"] == "cancelled"
    assert submit(api, key).status == 202
    done = upload(api, text, "seed_start=5", key=key).json
    for _ in range(600):
        found = api.call("GET", done["links"]["self"], key=key).json
        if found["state"] == "finished":
            break
        time.sleep(0.05)
    assert (found["done"], found["total"]) == (12, 12)


def test_requests_a_second_are_limited_at_every_path_and_for_all_keys_of_a_tenant(api: Api) -> None:
    key = limited(api, "rate", requests_per_s=0.01, burst=6)
    other = api.new_key("rate-2", tenant="rate", requests_per_s=0.01, burst=6)
    with ThreadPoolExecutor(4) as threads:
        paths = ["/v1/jobs", "/v1/fleet", "/v1/models", "/sdapi/v1/options"] * 3
        answers = list(threads.map(lambda path: api.call("GET", path, key=key), paths))
    assert sorted(answer.status for answer in answers) == [200] * 6 + [429] * 6
    answer = submit(api, other)
    assert answer.status == 429
    assert "its limit is 0.01 requests a second, and 6 at once." in answer.json["detail"]
    assert 1 <= int(answer.headers["retry-after"]) <= 100
    # Signing in on the page is a request, too.
    assert api.call("POST", "/page/session", {"key": key}, key="").status == 429
    assert api.call("GET", "/healthz", key=key).status == 200


def test_usage_is_shown_to_its_tenant_and_to_admins(api: Api, environment: None) -> None:
    key = limited(api, "billed")
    other = limited(api, "curious")
    body = {"prompt": "to be billed", "seed": 1}
    for _ in range(2):
        job = submit(api, key, body).json
        answer = api.call("GET", f"{job['links']['image']}&wait=30&redirect=false", key=key)
        assert answer.status == 200
    [row] = api.call("GET", "/v1/usage", key=key).json["usage"]
    size = len(answer.body)
    assert {**row, "day": ""} == {
        "day": "",
        "tenant": "billed",
        "images": 1,
        "cached": 1,
        "gpu_s": DEVICE_S,
        "bytes": size,
    }
    assert api.call("GET", "/v1/usage", key=other).json == {"usage": []}
    assert api.call("GET", "/v1/usage?tenant=billed", key=other).status == 403
    assert api.call("GET", "/v1/usage", key=api.new_key("no-tenants")).json == {"usage": []}
    assert row in api.call("GET", "/v1/usage").json["usage"]
    assert api.call("GET", "/v1/usage?tenant=billed").json["usage"] == [row]
    table = api.call("GET", "/v1/usage?tenant=billed&format=csv")
    lines = f"day,tenant,images,cached,gpu_s,bytes\n{row['day']},billed,1,1,{DEVICE_S},{size}\n"
    assert (table.headers["content-type"], table.body.decode()) == ("text/csv; charset=utf-8", lines)
    refused = api.call("GET", "/v1/usage?since=yesterday", key=key)
    assert (refused.status, "write a day as 2026-11-28" in refused.json["detail"]) == (422, True)

    # The command.
    run = CliRunner()
    assert json.loads(run.invoke(cli, ["usage", "--tenant", "billed", "--json"]).stdout) == [row]
    assert run.invoke(cli, ["usage", "--tenant", "billed", "--csv"]).stdout == lines
    assert "billed" in run.invoke(cli, ["usage"]).stdout
    assert "No tenant has used anything" in run.invoke(cli, ["usage", "--tenant", "nobody"]).stderr


def test_only_models_that_a_tenant_may_use_are_shown_to_it(api: Api) -> None:
    allowed, none = limited(api, "models", models=["fast"]), limited(api, "others", models=["sdxl"])
    assert [each["id"] for each in api.call("GET", "/v1/models", key=allowed).json["data"]] == ["fast"]
    assert api.call("GET", "/v1/models", key=none).json["data"] == []
    assert api.call("GET", "/sdapi/v1/sd-models", key=none).json == []
    for path in ("/v1/fleet", "/v1/activity"):
        assert fleet_event(api, allowed, path)["workers"] != []
        assert fleet_event(api, none, path)["workers"] == []
    body = {"prompt": "a", "model": "fast"}
    served = api.call("POST", "/v1/images/generations", body, key=none)
    missing = api.call("POST", "/v1/images/generations", body | {"model": "nowhere"}, key=none)
    assert (served.status, served.json["error"]["code"]) == (404, "model_not_found")
    assert served.body.replace(b"fast", b"nowhere") == missing.body


def test_events_of_a_job_are_its_tenants(api: Api, keys: dict[str, str]) -> None:
    job = submit(api, keys["acme"], WAITING | {"prompt": "followed"}).json
    own = Api(api.stack, api.url, keys["acme"])
    event = Stream(own, job["links"]["events"]).next()
    assert event is not None
    assert event["event"] == "queued"


def test_a_key_whose_tenant_was_removed_does_nothing(api: Api) -> None:
    key = limited(api, "gone")
    with connect(api.stack.valkey.url, 1) as client:
        client.hdel("smallcat:http:tenants", "gone")
    answer = submit(api, key)
    assert answer.status == 403
    assert "The tenant of this key, gone, was removed" in answer.json["detail"]
