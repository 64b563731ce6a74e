"""S3 fails in each of its ways: nothing is acknowledged before its picture is there, or rendered twice."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from tests.faults import oracle
from tests.faults.harness import Ground, wait_until
from tests.faults.s3_proxy import Mode, S3Proxy

#: Seconds, with room for the start of several workers on a busy machine.
pytestmark = pytest.mark.timeout(150)

MODES: list[Mode] = ["down", "errors", "silent", "corrupt", "slow"]


@pytest.fixture
def proxy(ground: Ground) -> Iterator[S3Proxy]:
    proxy = S3Proxy(ground.stack.s3.port)
    yield proxy
    proxy.close()


def fail(ground: Ground, proxy: S3Proxy, mode: Mode, failures: int, fails_s: float = 0.0) -> None:
    """Let the storage fail for a while when eight pictures are due; then all are there."""
    before = proxy.failed[mode]
    with ground.holding() as hold:
        ids = ground.submit(8, hold)
        ground.journal.wait_for("start", ids)
        proxy.mode = mode
    try:
        wait_until(f"{mode} failed", lambda: proxy.failed[mode] >= before + failures)
        proxy.wait_while(mode, fails_s)
        if mode != "slow":
            assert ground.states(ids) == {"running": 8}
            assert ground.unsettled() == 16  # Each in the hash and in its index.
            assert not any((ground.images / job_id[:2] / f"{job_id}.png").exists() for job_id in ids)
    finally:
        proxy.mode = "well"
    found = oracle.settle(ground, ids, timeout_s=120)
    assert found.renders_over == 0


def test_a_failing_storage_is_waited_for(ground: Ground, proxy: S3Proxy) -> None:
    worker = ground.worker(settings={"AWS_ENDPOINT_URL_S3": proxy.endpoint})
    for mode in MODES:
        fail(ground, proxy, mode, failures=8)
    assert worker.running


def test_the_process_that_asks_the_bucket_is_killed_and_no_picture_is_lost(
    ground: Ground, proxy: S3Proxy
) -> None:
    worker = ground.worker(settings={"AWS_ENDPOINT_URL_S3": proxy.endpoint})
    with ground.holding() as hold:
        ids = ground.submit(8, hold)
        ground.journal.wait_for("start", ids)
        proxy.mode = "silent"
    wait_until("all are asked to be put", lambda: proxy.failed["silent"] >= 8)
    children = psutil.Process(worker.pid).children()
    (asking,) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    asking.kill()
    proxy.mode = "well"
    found = oracle.settle(ground, ids, timeout_s=120)
    assert found.renders_over == 0
    assert worker.running


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", MODES)
def test_a_storage_that_fails_for_a_minute_is_waited_for(ground: Ground, proxy: S3Proxy, mode: Mode) -> None:
    worker = ground.worker(settings={"AWS_ENDPOINT_URL_S3": proxy.endpoint})
    fail(ground, proxy, mode, failures=8, fails_s=60)
    assert worker.running
    print(f"storage {mode} for 60 s: 8 of 8 there afterwards, none acknowledged before, none rendered twice")
