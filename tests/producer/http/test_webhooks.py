"""Webhooks from end to end: whoever submits, by whatever way, is told how it ended."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from standardwebhooks import Webhook

from deploy.embedded.stack import Stack
from producer import JobHandle, submit_job
from producer.cli.main import cli
from producer.ingest.submit_file import submit_file
from tests.faults.harness import wait_until
from tests.producer.http.conftest import NOBODYS, Api, fast_worker
from tests.producer.http.test_runs import finished, upload
from tests.producer.webhooks.receiver import Handler, Receiver, receiving
from worker.contract.errors import InvalidJobError, PromptFileError
from worker.contract.message import payload_in
from worker.contract.webhook import WEBHOOK_SINCE
from worker.state.notifications import Notifications
from worker.state.redis_client import connect

#: What the address of a receiver that must not be reached is refused with.
PRIVATE = "https://10.1.2.3/hook"


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    """The HTTP API with a sender, and a fake worker."""
    with Stack(workers=0, http=True, webhooks=True) as stack:
        worker = fast_worker(stack)
        try:
            assert stack.http is not None
            yield Api(stack, stack.http.url, stack.http.key)
        finally:
            worker.kill()
            worker.wait()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def told(api: Api, receiver: Receiver, count: int) -> list[Any]:
    """The first `count` notifications, verified."""
    receiver.wait_for(count)
    secret = Webhook(api.stack.variables["SMALLCAT_WEBHOOK_SECRET"])
    return [secret.verify(each.body, each.headers) for each in receiver.requests]


def test_jobs_of_the_http_api(api: Api, receiver: Receiver) -> None:
    jobs = [
        {"prompt": "a cat", "seed": 1, "metadata": {"order": 17}, "webhook": f"{receiver.url}?n=1"},
        {"prompt": "fail", "seed": 1, "webhook": receiver.url},
        {"prompt": "a dog", "seed": 1, "webhook": None},
        {"prompt": "a fox", "seed": 1},
    ]
    answer = api.call("POST", "/v1/jobs", jobs, headers={"Idempotency-Key": "k"}).json
    assert api.call("POST", "/v1/jobs", jobs, headers={"Idempotency-Key": "k"}).json == answer
    found = {each["type"]: each["data"] for each in told(api, receiver, 2)}
    done, failed = found["job.done"], found["job.failed"]
    assert (done["id"], done["submission"]) == (answer["jobs"][0]["id"], answer["jobs"][0]["submission"])
    assert (done["metadata"], done["uri"][:5]) == ({"order": 17}, "s3://")
    assert failed["error"] == {"type": "InvalidJobError", "message": "It was asked to fail."}
    view = api.wait(answer["jobs"][0])
    assert "webhook" not in json.dumps(view), "it is nobody else's to see"
    # The same job again, which is done already: it is told, too.
    again = api.call("POST", "/v1/jobs", jobs[0]).json
    last = told(api, receiver, 3)[-1]
    assert (last["data"]["submission"], last["data"]["cached"]) == (again["submission"], True)
    assert len({each.headers["webhook-id"] for each in receiver.requests}) == 3


def test_a_job_that_is_given_up(api: Api, receiver: Receiver) -> None:
    job = {"prompt": "a cat", "seed": 2, "model": NOBODYS, "webhook": receiver.url}
    mine, others = (api.call("POST", "/v1/jobs", job).json for _ in range(2))
    assert api.call("DELETE", mine["links"]["self"]).status == 200
    (event,) = told(api, receiver, 1)
    assert (event["type"], event["data"]["submission"]) == ("job.cancelled", mine["submission"])
    api.call("DELETE", others["links"]["self"])
    assert told(api, receiver, 2)[1]["data"]["submission"] == others["submission"]


@pytest.mark.parametrize(
    "webhook", [PRIVATE, "http://a.example.com", "nonsense", "", 7, ["x"], "https://u:p@a.b/"]
)
def test_an_address_that_is_not_permitted_is_refused_at_the_door(api: Api, webhook: Any) -> None:
    for path, body in (("/v1/jobs", {"prompt": "a", "webhook": webhook}),):
        answer = api.call("POST", path, body)
        assert answer.status == 422
        assert answer.json["detail"].startswith("webhook ")
        several = api.call("POST", path, [{"prompt": "a"}, body])
        assert (several.status, several.json["errors"][0]["index"]) == (422, 1)
    if isinstance(webhook, str):
        assert upload(api, b"a cat\n", f"webhook={webhook}").json["detail"].startswith("webhook ")
        assert "webhook_jobs is for" in upload(api, b"a cat\n", "webhook_jobs=true").json["detail"]


def test_a_run_is_told_when_it_is_over_and_of_its_jobs_where_asked(api: Api, receiver: Receiver) -> None:
    file = b"a cat\nfail\n"
    run = upload(api, file, f"seed_start=5&webhook={receiver.url}&webhook_jobs=true").json
    assert finished(api, run)["state"] == "finished"
    events = told(api, receiver, 3)
    by_type = {each["type"]: each["data"] for each in events}
    assert by_type["run.finished"] == {
        "run": run["run"],
        "state": "finished",
        "total": 2,
        "done": 1,
        "failed": 1,
        "cancelled": 0,
        "rejected": 0,
    }
    assert {(each["run"], each["line"]) for kind, each in by_type.items() if kind != "run.finished"} == {
        (run["run"], 1),
        (run["run"], 2),
    }
    # Uploaded again with another address: it is over, and that is told at once.
    with receiving() as other:
        again = upload(api, file, f"seed_start=5&webhook={other.url}").json
        assert again["run"] == run["run"]
        (event,) = told(api, other, 1)
    assert event["type"] == "run.finished"
    assert len(receiver.requests) == 3


def test_a_run_that_is_cancelled(api: Api, receiver: Receiver) -> None:
    run = upload(api, b"a cat\n", f"model={NOBODYS}&webhook={receiver.url}").json
    wait_until("sent", lambda: api.call("GET", run["links"]["self"]).json["sent"] == 1)
    assert api.call("DELETE", run["links"]["self"]).status == 200
    (event,) = told(api, receiver, 1)
    assert (event["type"], event["data"]["state"]) == ("run.finished", "cancelled")


@pytest.mark.usefixtures("environment")
def test_jobs_and_files_from_python_and_the_command_line(api: Api, receiver: Receiver, tmp_path: Any) -> None:
    handle = submit_job("a cat", seed=9, metadata={"a": 1}, webhook=receiver.url)
    (event,) = told(api, receiver, 1)
    assert event["data"] == {
        "id": handle.id,
        "submission": handle.submission,
        "state": "done",
        "metadata": {"a": 1},
        "uri": handle.result(10).uri,
    }
    said = CliRunner().invoke(cli, ["submit", "a dog", "--seed", "9", "--webhook", receiver.url, "--json"])
    told(api, receiver, 2)
    assert JobHandle(json.loads(said.stdout)["id"]).result(10)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    outcome = submit_file(tmp_path / "prompts.txt", seed=10, webhook=receiver.url)
    assert told(api, receiver, 3)[2]["data"]["run"] == outcome.run
    for wrong in (PRIVATE, 7):
        with pytest.raises(InvalidJobError, match=r"^webhook "):
            submit_job("a cat", webhook=wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidJobError, match=r"^webhook "):
            submit_file(tmp_path / "prompts.txt", webhook=wrong)  # type: ignore[arg-type]
    with pytest.raises(PromptFileError, match="webhook_jobs is for a webhook"):
        submit_file(tmp_path / "prompts.txt", webhook_jobs=True)
    wrong = CliRunner().invoke(cli, ["submit", "a dog", "--webhook", PRIVATE])
    assert isinstance(wrong.exception, InvalidJobError)


def test_at_sigterm_the_server_finishes_what_it_tells(api: Api) -> None:
    release = threading.Event()

    def answer(handler: Handler) -> None:
        release.wait(20)
        handler.status(204)

    server = api.stack.http
    assert server is not None
    with receiving(answer) as receiver:
        api.call("POST", "/v1/jobs", {"prompt": "a cat", "seed": 77, "webhook": receiver.url})
        receiver.wait_for(1)
        server.ask_to_end()
        release.set()
        assert server.wait(30)
        with connect(api.stack.valkey.url, 1) as client:
            assert not Notifications(client).waiting(), "it is told, and that is noted"
        server.start()


@pytest.mark.usefixtures("environment")
def test_messages_with_a_webhook_are_for_workers_that_tell(api: Api, receiver: Receiver) -> None:
    """Earlier workers leave them to newer ones; the address is in no message."""
    for submit in (
        lambda fields: submit_job(**fields),
        lambda fields: api.call("POST", "/v1/jobs", fields),
    ):
        submit({"prompt": "a", "model": NOBODYS, "webhook": receiver.url})
    with connect(api.stack.valkey.url, 1) as client:
        texts = [
            text for key in client.scan_iter(f"smallcat.{NOBODYS}*") for text in client.lrange(key, 0, -1)
        ]
    payloads = [payload_in(json.loads(text)) for text in texts]
    assert [each["version"] for each in payloads if each["job"]["prompt"] == "a"] == [WEBHOOK_SINCE] * 2
    assert receiver.url not in json.dumps(payloads)
