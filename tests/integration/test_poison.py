"""A message that kills whoever fetches it, before anybody has claimed its job: real processes die of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import redis

from deploy.embedded.servers import ValkeyProcess
from tests.integration.test_transport import LEASE_S, Party, message
from tests.integration.transport_harness import ROOT, wait_until
from tests.worker.broker import test_malformed as stored
from tests.worker.engine.fake_runner import job_of
from worker.broker import transport
from worker.broker.transport import UNACKED, UNACKED_INDEX
from worker.contract.found_message import fingerprint
from worker.contract.message import payload_of
from worker.contract.record import State
from worker.state.failures import Failures
from worker.state.keys import job_key
from worker.state.records import Records
from worker.state.redis_client import connect

pytestmark = pytest.mark.timeout(120)

#: Fetches a message over our transport, and dies when it reads it: by SIGKILL, as of a lack of memory.
VICTIM = """
import os, signal, sys
from kombu import Connection, Consumer, Queue
from worker.broker.transport import broker_url, transport_options

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

options = transport_options(float(sys.argv[2])) | {"reader": die}
with Connection(broker_url(sys.argv[1]), transport_options=options) as connection:
    with Consumer(connection, [Queue("smallcat.q")]):
        connection.drain_events(timeout=30)
"""
DEATHS = 3


@pytest.fixture
def sweeper(valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Records]:
    """Another worker, which restores what the dead ones held. Returns its records."""
    with connect(valkey.url, retry_s=2) as client:
        records = Records(client, 1_000)
        monkeypatch.setattr(transport, "_on_unreadable", records.set_aside)
        monkeypatch.setattr(transport, "_max_returns", DEATHS - 1)
        party = Party(valkey.url, "other")
        yield records
        party.close()


@pytest.mark.parametrize("error", [ValueError("odd"), redis.ResponseError("user_script:9: odd")])
def test_a_job_that_cannot_be_told_holds_up_no_other_message(
    valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(transport, "_on_unreadable", fails)
    with connect(valkey.url, retry_s=2) as client:
        party = Party(valkey.url, "smallcat.q")
        try:
            client.lpush("smallcat.q", "{}", json.dumps(message("odd", body_encoding="rot13")))
            client.lpush("smallcat.q", json.dumps(message("good")))
            party.drain(1)[0].ack()
            wait_until("all are settled", lambda: not client.exists(UNACKED, UNACKED_INDEX))
            assert len(Failures(client).unreadable()) == 2
        finally:
            party.close()


def test_a_message_whose_fetch_kills_each_worker_is_set_aside_and_its_job_fails(
    valkey: ValkeyProcess, sweeper: Records
) -> None:
    job = job_of(1)
    sent = stored.headers(id=f"{job.id}-1")
    sent["body"] = stored.body([payload_of(job)], {}, {})
    sent["properties"]["priority"] = 0
    raw = json.dumps(sent)
    sweeper.submitted(job, "smallcat.q", "s", f"{job.id}-1", fingerprint(raw))
    with connect(valkey.url, retry_s=2) as client:
        client.lpush("smallcat.q", raw)
        for death in range(DEATHS):
            argv = [sys.executable, "-c", VICTIM, valkey.url, str(LEASE_S)]
            assert subprocess.run(argv, cwd=ROOT, timeout=60).returncode == -9
            assert sweeper.get(job.id).state is State.QUEUED
            if death < DEATHS - 1:
                wait_until("it is back", lambda: client.llen("smallcat.q") == 1)
        record = sweeper.wait(job.id, 20)
        assert (record.state, record.error_type) == (State.FAILED, "PoisonJobError")
        assert f"it was fetched {DEATHS} times" in str(record.error)
        wait_until("set aside", lambda: bool(Failures(client).unreadable()))
        assert [each.id for each in Failures(client).list()] == [job.id]
        assert client.llen("smallcat.q") == 0
        assert client.hget(job_key(job.id), "attempts") is None
