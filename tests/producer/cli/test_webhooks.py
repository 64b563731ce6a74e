"""`smallcat webhooks`: what is listed, sent again and made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from redis import Redis

from deploy.embedded.servers import ValkeyProcess
from producer.cli.main import cli
from producer.webhooks.secrets import new_secret
from tests.faults.harness import ROOT
from tests.producer.webhooks.receiver import receiving
from tests.producer.webhooks.test_sender import tell
from worker.contract.errors import CallerError, SettingsError, UnknownJobError
from worker.state.notifications import Notifications
from worker.state.redis_client import connect


@pytest.fixture
def client(valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    monkeypatch.setenv("REDIS_URL", valkey.url)
    with connect(valkey.url, retry_s=2) as client:
        yield client


def webhooks(*words: str) -> Result:
    return CliRunner().invoke(cli, ["webhooks", *words])


def test_what_was_given_up_is_listed_without_its_address_and_sent_again(client: Redis) -> None:
    book = Notifications(client)
    for number in range(3):
        tell(client, "https://a.example.com/secret-path?token=secret", number)
    assert "3 notifications wait for a sender" in webhooks("list").stderr
    for each in book.take(3, 3, {}):
        book.settle(each, "failed", text="it answered 500\x1b[31m")
    said = webhooks("list").stdout
    assert said.count("job.done  a.example.com  given up ") == 3
    assert "secret" not in said
    assert "\x1b" not in said
    listed = json.loads(webhooks("list", "--json").stdout)
    assert {each["error"] for each in listed} == {"it answered 500\x1b[31m"}
    assert {each["submission"] for each in listed} == {"a" * 16}
    first, *_ = (each["id"] for each in listed)
    assert webhooks("retry", first).stdout == "1 are sent again\n"
    assert len(json.loads(webhooks("list", "--waiting", "--json").stdout)) == 1
    assert json.loads(webhooks("retry", "--all", "--json").stdout) == {"retried": 2}
    assert "No notification was given up" in webhooks("list").stderr


@pytest.mark.parametrize("words", [[], ["--all", "w1"]])
def test_it_is_said_which_are_sent_again(words: list[str], client: Redis) -> None:
    assert isinstance(webhooks("retry", *words).exception, CallerError)


def test_an_unknown_one_is_named(client: Redis) -> None:
    assert isinstance(webhooks("retry", "w" + "0" * 40).exception, UnknownJobError)


def test_secrets_are_made_rotated_and_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loose = webhooks("secret")
    assert loose.stdout.startswith("whsec_")
    assert "SMALLCAT_WEBHOOK_SECRET" in loose.stderr
    assert isinstance(webhooks("secret", "--tenant", "acme").exception, SettingsError)
    monkeypatch.setenv("SMALLCAT_WEBHOOK_SECRETS_DIR", str(tmp_path))
    first = webhooks("secret", "--tenant", "acme").stdout.strip()
    assert isinstance(webhooks("secret", "--tenant", "acme").exception, CallerError)
    second = json.loads(webhooks("secret", "--tenant", "acme", "--rotate", "--json").stdout)["secret"]
    assert (tmp_path / "acme").read_text().split() == [second, first]
    dropped = webhooks("secret", "--tenant", "acme", "--drop-old").stdout
    assert dropped == "the older secret of the tenant acme is dropped\n"
    assert (tmp_path / "acme").read_text().split() == [second]
    again = [webhooks("secret", "--tenant", "acme", "--drop-old", *more).stdout for more in ([], ["--json"])]
    assert again[0] == "the tenant acme has one secret alone\n"
    assert json.loads(again[1]) == {"tenant": "acme", "dropped": 0}
    assert isinstance(webhooks("secret", "--tenant", "other", "--drop-old").exception, SettingsError)
    assert webhooks("secret").stdout.strip() == (tmp_path / "_default").read_text().strip()
    assert isinstance(webhooks("secret", "--rotate", "--drop-old").exception, CallerError)


def test_the_sender_ends_at_sigterm(client: Redis, valkey: ValkeyProcess) -> None:
    variables = {
        "REDIS_URL": valkey.url,
        "SMALLCAT_WEBHOOK_HOSTS": "127.0.0.1",
        "SMALLCAT_WEBHOOK_SECRET": new_secret(),
    }
    with receiving() as receiver:
        tell(client, receiver.url)
        sender = subprocess.Popen(
            [sys.executable, "-m", "producer", "webhooks", "run"],
            env={**os.environ, **variables},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            receiver.wait_for(1, 30)
            sender.send_signal(signal.SIGTERM)
            _, said = sender.communicate(timeout=20)
        finally:
            sender.kill()
            sender.wait()
    assert sender.returncode == 0
    assert "Notifications are sent to 127.0.0.1" in said
    assert "No notifications are sent any more" in said


def test_the_servers_metrics_are_of_its_own_sender() -> None:
    result = CliRunner().invoke(cli, ["serve", "--metrics-port", "9090"])
    assert isinstance(result.exception, CallerError)
    assert "--metrics-port 9090 is for the sender of webhooks: add --webhooks." in str(result.exception)
