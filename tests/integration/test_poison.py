"""A message that kills whoever fetches it, before anybody has claimed its job: real processes die of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from deploy.embedded.servers import ValkeyProcess
from tests.integration.test_transport import LEASE_S, Party
from tests.integration.transport_harness import ROOT, wait_until
from tests.worker.broker import test_malformed as stored
from tests.worker.engine.fake_runner import job_of
from worker.broker import transport
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


def test_a_message_whose_fetch_kills_each_worker_is_set_aside_and_its_job_fails(
    valkey: ValkeyProcess, sweeper: Records
) -> None:
    job = job_of(1)
    message = stored.headers(id=f"{job.id}-1")
    message["body"] = stored.body([payload_of(job)], {}, {})
    message["properties"]["priority"] = 0
    raw = json.dumps(message)
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
