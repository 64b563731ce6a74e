"""`submit_job` while its connections are cut, and all of it over TLS. More is in tests/producer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from producer import submit_job
from tests.faults import oracle
from tests.faults.harness import Ground
from tests.integration.transport_harness import TLSProxy
from worker.contract.errors import QueueError
from worker.contract.record import State

#: Seconds, with room for the start of several workers on a busy machine.
pytestmark = pytest.mark.timeout(150)


def test_a_lost_connection_makes_no_second_job(calm: Ground) -> None:
    with calm.feeding(40.0) as feeder:
        for count in range(10, 61, 10):
            calm.journal.wait_for("put", feeder.ids[:count])
            calm.cut_connections()
    assert feeder.refused == 0
    found = oracle.settle(calm)
    assert found.renders_over == 0


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
def test_a_producer_and_a_worker_over_tls_with_a_password(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    valkey = ground.stack.valkey
    proxy = TLSProxy(valkey, tmp_path)  # type: ignore[arg-type]
    unverified = f"rediss://:{valkey.password}@localhost:{proxy.port}/0"
    url = f"{unverified}?ssl_ca_certs={proxy.certificate}"
    worker = ground.worker(settings={"REDIS_URL": url})
    monkeypatch.setenv("REDIS_URL", url)
    assert submit_job(ground.job()).result(timeout=30).state is State.DONE
    assert valkey.password not in worker.output()
    monkeypatch.setenv("REDIS_URL", unverified)
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "1")
    with pytest.raises(QueueError, match="CERTIFICATE_VERIFY_FAILED") as caught:
        submit_job(ground.job())
    assert valkey.password not in str(caught.value)
    worker.kill()
    proxy.close()
