"""The sender against a real Redis and real receivers on this machine, which is listed for that."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from standardwebhooks import Webhook, WebhookVerificationError

from deploy.embedded.servers import ValkeyProcess
from producer.session import session
from producer.webhooks import metrics
from producer.webhooks import sender as sender_module
from producer.webhooks.secrets import new_secret
from producer.webhooks.sender import Sender
from tests.faults.harness import wait_until
from tests.producer.webhooks.receiver import Handler, Receiver, ok, receiving
from tests.worker.health.probes import free_port
from worker.contract.settings import webhook_settings
from worker.state.keys import WEBHOOKS
from worker.state.notifications import Notifications
from worker.state.redis_client import connect

SECRET, OLD_SECRET = new_secret(), new_secret()


@pytest.fixture
def client(valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    monkeypatch.setenv("REDIS_URL", valkey.url)
    monkeypatch.setenv("SMALLCAT_WEBHOOK_HOSTS", "127.0.0.1")
    monkeypatch.setenv("SMALLCAT_WEBHOOK_SECRET", f"{SECRET} {OLD_SECRET}")
    with connect(valkey.url, retry_s=2) as client:
        yield client


@contextlib.contextmanager
def sending(at_once: int = 64, per_host: int = 4, timeout_s: float = 5.0) -> Iterator[Sender]:
    """A sender that runs in a thread of this process."""
    settings = webhook_settings().model_copy(update={"webhook_timeout_s": timeout_s})
    sender = Sender(session(2), settings, at_once, per_host)
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await sender.run()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        yield sender
    finally:
        wait_until("its loop", lambda: bool(loops))
        loops[0].call_soon_threadsafe(sender.stop)
        thread.join(30)
        assert not thread.is_alive()


def tell(client: Redis, url: str, number: int = 0, tenant: str = "", **fields: Any) -> str:
    """What `notify.lua` writes; the id that its receiver gets."""
    own = json.dumps({"priority": 5, "metadata": {"order": number}})
    what = {"job": "0" * 32, "submission": "a" * 16, "state": "done", "own": own, "at": "1795880000.25"}
    what |= {"hook": json.dumps({"url": url, "tenant": tenant}), "uri": "s3://b/x.png", **fields}
    client.lpush(f"{WEBHOOKS}:new", f"{number:040x} {json.dumps(what)}")
    return f"msg_{number:040x}"


def settled(client: Redis) -> bool:
    """Whether nothing is left to send."""
    return not client.keys(f"{WEBHOOKS}*")


def test_a_notification_is_signed_as_standard_webhooks_has_it(client: Redis) -> None:
    with receiving() as receiver, sending():
        name = tell(client, f"{receiver.url}?token=x")
        (request,) = receiver.wait_for(1)
        wait_until("settled", lambda: settled(client))
    assert request.path == "/hook?token=x"
    assert request.headers["host"] == f"127.0.0.1:{receiver.server_port}"
    assert request.headers["webhook-id"] == name
    for secret in (SECRET, OLD_SECRET):
        assert Webhook(secret).verify(request.body, request.headers) == {
            "type": "job.done",
            "timestamp": "2026-11-28T15:33:20.250Z",
            "data": {
                "id": "0" * 32,
                "state": "done",
                "submission": "a" * 16,
                "metadata": {"order": 0},
                "uri": "s3://b/x.png",
            },
        }
    with pytest.raises(WebhookVerificationError):
        Webhook(new_secret()).verify(request.body, request.headers)


def test_what_a_receiver_refuses_is_sent_again_with_the_same_id_and_body(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.webhooks.schedule.PAUSES_S", (0.01, 0.01, 0.01))
    statuses = iter((500, 302, 204))

    def answer(handler: Handler) -> None:
        handler.status(next(statuses), location="http://127.0.0.1:1/elsewhere")

    with receiving(answer) as receiver, sending():
        tell(client, receiver.url)
        requests = receiver.wait_for(3)
        wait_until("settled", lambda: settled(client))
    assert {request.path for request in requests} == {"/hook"}, "no redirect is followed"
    assert len({(request.body, request.headers["webhook-id"]) for request in requests}) == 1


def test_it_is_given_up_after_the_last_attempt_and_can_be_sent_again(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.webhooks.schedule.PAUSES_S", (0.01,))
    answers = [500, 500, 204]
    with receiving(lambda handler: handler.status(answers.pop(0))) as receiver, sending():
        tell(client, receiver.url)
        notifications = Notifications(client)
        wait_until("given up", lambda: bool(notifications.failed()))
        (failed,) = notifications.failed()
        assert (failed.ended, failed.attempts) == ("it answered 500", 2)
        assert notifications.retry([failed.id]) == 1
        receiver.wait_for(3)
        wait_until("settled", lambda: settled(client))


def test_gone_ends_it_and_retry_after_is_kept(client: Redis) -> None:
    def answer(handler: Handler) -> None:
        is_gone = b'"order": 1' in handler.server.requests[-1].body
        handler.status(410) if is_gone else handler.status(429, retry_after="4000")

    notifications = Notifications(client)
    with receiving(answer) as receiver, sending():
        tell(client, receiver.url, 1)
        wait_until("gone", lambda: bool(notifications.failed()))
        tell(client, receiver.url, 2)
        wait_until("put off", lambda: any(each.attempts for each in notifications.waiting()))
    (waiting,) = notifications.waiting()
    assert 3_900 < waiting.due_at - time.time() <= 4_000
    (failed,) = notifications.failed()
    assert "410" in failed.ended


def test_slow_and_endless_receivers_hold_up_no_other(client: Redis) -> None:
    release = threading.Event()

    def silent(handler: Handler) -> None:
        release.wait(20)
        handler.status(204)

    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            while not release.is_set():
                handler.wfile.write(b"x" * 65_536)

    try:
        with receiving(silent) as slow, receiving(endless) as long, receiving() as quick:
            for number in range(40):
                tell(client, slow.url, number)
            with sending(at_once=16, timeout_s=20.0):
                slow.wait_for(4)
                tell(client, long.url, 100)
                for number in range(101, 121):
                    tell(client, quick.url, number)
                quick.wait_for(20, timeout_s=10)
                long.wait_for(1)
                assert len(slow.requests) == 4, "no more than its share"
                wait_until("the endless one is cut off", lambda: not _is_waiting(client, long))
                release.set()
    finally:
        release.set()


def test_a_host_that_answers_too_late_gets_fewer_at_once_and_one_line_in_the_log(
    client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    try:
        with receiving(lambda handler: (release.wait(20), None)[1]) as slow:
            for number in range(8):
                tell(client, slow.url, number)
            with sending(per_host=4, timeout_s=0.5) as sender:
                slow.wait_for(5)
                assert len(slow.requests) == 5, "four, and after them one"
                assert sender._shares().slow == ["127.0.0.1"]
                slow.wait_for(8)
                release.set()
    finally:
        release.set()
    warned = [each for each in caplog.records if "is sent again later" in each.getMessage()]
    assert len(warned) == 1


def _is_waiting(client: Redis, receiver: Receiver) -> bool:
    return any(str(receiver.server_port) in each.host for each in Notifications(client).waiting())


def test_at_sigterm_what_is_being_sent_is_finished_and_nothing_new_begun(client: Redis) -> None:
    going, release = threading.Event(), threading.Event()

    def answer(handler: Handler) -> None:
        going.set()
        release.wait(10)
        handler.status(204)

    with receiving(answer) as receiver:
        with sending() as sender:
            tell(client, receiver.url, 1)
            assert going.wait(10)
            sender.stop()
            tell(client, receiver.url, 2)
            release.set()
        assert len(receiver.requests) == 1
        assert Notifications(client).untaken() == 1
        assert not Notifications(client).waiting()


def test_a_killed_senders_notifications_come_back(client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.state.notifications.HELD_S", 0.2)
    with receiving() as receiver:
        name = tell(client, receiver.url)
        assert Notifications(client).take(1, 1, {}), "a sender that dies now"
        with sending():
            (request,) = receiver.wait_for(1)
    assert request.headers["webhook-id"] == name


def standing_for(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Let all names stand for these addresses. The names that are looked up."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *rest: Any, **others: Any) -> Any:
        if not str(host).endswith(".example.com"):
            return real(host, port, *rest, **others)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    return asked


def test_a_name_that_leads_to_this_machine_meanwhile_is_not_connected(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: public where it was submitted, and where the sender checked its text."""
    monkeypatch.setenv("SMALLCAT_WEBHOOK_HOSTS", "*")
    asked = standing_for(monkeypatch, "127.0.0.1", "10.0.0.1", "169.254.169.254")
    notifications = Notifications(client)
    with receiving() as receiver:
        with sending():
            tell(client, f"https://rebound.example.com:{receiver.server_port}/")
            wait_until("refused", lambda: any(each.ended for each in notifications.waiting()))
        assert receiver.requests == []
    assert asked == ["rebound.example.com"], "once: what was checked is what is connected to"
    assert "stands for no public address" in notifications.waiting()[0].ended


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for a name, signed by itself, and its key."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                f"/CN={name}",
            ),
            *("-addext", f"subjectAltName=DNS:{name}", "-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return key, cert


@pytest.mark.parametrize("is_known", [True, False])
def test_by_https_the_certificate_and_host_are_the_names(
    client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    key, cert = certificate(tmp_path, "hooks.example.com")
    if is_known:
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    monkeypatch.setenv("SMALLCAT_WEBHOOK_HOSTS", "hooks.example.com")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    standing_for(monkeypatch, "127.0.0.1")
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    context.sni_callback = lambda _, name, __: names.append(name)
    notifications = Notifications(client)
    with receiving() as receiver:
        receiver.socket = context.wrap_socket(receiver.socket, server_side=True)
        with sending():
            tell(client, f"https://hooks.example.com:{receiver.server_port}/")
            if is_known:
                (request,) = receiver.wait_for(1)
                assert request.headers["host"] == f"hooks.example.com:{receiver.server_port}"
            else:
                wait_until("refused", lambda: any(each.ended for each in notifications.waiting()))
                assert receiver.requests == []
                assert "certificate" in notifications.waiting()[0].ended.lower()
    assert names == ["hooks.example.com"]


def test_a_tenant_without_a_secret_waits_for_one(
    client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALLCAT_WEBHOOK_SECRETS_DIR", str(tmp_path))
    notifications = Notifications(client)
    with receiving() as receiver, sending():
        tell(client, receiver.url, tenant="acme")
        wait_until("put off", lambda: any(each.ended for each in notifications.waiting()))
        (waiting,) = notifications.waiting()
        assert "smallcat webhooks secret --tenant acme" in waiting.ended
        secret = new_secret()
        (tmp_path / "acme").write_text(f"{secret}\n")
        notifications.retry([waiting.id])
        (request,) = receiver.wait_for(1)
    assert Webhook(secret).verify(request.body, request.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(request.body, request.headers)


def test_what_cannot_be_read_is_given_up_and_others_go_on(
    client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    notifications = Notifications(client)
    client.lpush(f"{WEBHOOKS}:new", f"{7:040x} {json.dumps({'state': 'done', 'hook': 'x'})}")
    with caplog.at_level(logging.ERROR), receiving(ok) as receiver, sending():
        tell(client, receiver.url)
        receiver.wait_for(1)
        wait_until("given up", lambda: bool(notifications.failed()))
    assert "cannot be read" in caplog.text


def test_while_redis_is_away_it_waits(
    client: Redis, valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender_module, "AWAY_S", 0.1)
    with receiving() as receiver, sending():
        client.client_kill_filter(_type="normal", skipme=True)
        tell(client, receiver.url)
        receiver.wait_for(1)


def test_prometheus_is_told_what_waits_was_sent_and_given_up(client: Redis) -> None:
    port = free_port()
    count = metrics.serve(session(2), port)
    for ended in ("sent", "sent", "failed"):
        count(ended)
    tell(client, "http://127.0.0.1:9/", 1)
    tell(client, "http://127.0.0.1:9/", 2)
    notifications = Notifications(client)
    for each in notifications.take(1, 1, {}):
        notifications.settle(each, "failed", text="gone")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        shown = answer.read().decode()
    assert 'smallcat_webhooks_total{ended="sent"} 2.0' in shown
    assert 'smallcat_webhooks_total{ended="later"} 0.0' in shown
    assert 'smallcat_webhooks_total{ended="failed"} 1.0' in shown
    assert "smallcat_webhooks_waiting 1.0" in shown
    assert "smallcat_webhooks_given_up 1.0" in shown
