"""The network between workers and their services fails: no job is lost, none is done twice."""

from __future__ import annotations

import contextlib
import random
import time

import pytest

from tests.faults import oracle
from tests.faults.harness import FaultWorker, Ground, wait_until
from tests.faults.pictures import KINDS
from tests.faults.tcp_proxy import MODES, Mode, TCPProxy

#: Seconds, with room for the start of several workers on a busy machine.
pytestmark = pytest.mark.timeout(150)

#: Seconds that a mode lasts. Shorter than a lease, so that no job may start twice but where its worker died.
LASTS_S = 1.0


def through(ground: Ground, redis: TCPProxy, s3: TCPProxy) -> FaultWorker:
    """A worker whose Redis and bucket are behind the proxies."""
    valkey, storage = ground.stack.valkey, ground.stack.s3
    return ground.worker(
        ready=False,
        settings={
            "REDIS_URL": valkey.url.replace(f":{valkey.port}/", f":{redis.port}/"),
            "AWS_ENDPOINT_URL_S3": storage.endpoint.replace(f":{storage.port}", f":{s3.port}"),
            "SMALLCAT_MAX_ATTEMPTS": "1",
        },
    )


def storm(ground: Ground, seed: int, faults: list[tuple[str, Mode]], rate: float) -> None:
    """One fault after the other, under load."""
    chance = random.Random(seed)
    chance.shuffle(faults)
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(TCPProxy(ground.stack.valkey.port))
        s3 = stack.enter_context(TCPProxy(ground.stack.s3.port))
        workers = [through(ground, redis, s3) for _ in range(2)]
        for worker in workers:
            worker.wait_ready()
        with ground.feeding(rate, kinds=KINDS) as feeder:
            for name, mode in faults:
                left = ground.journal.total("leave")
                wait_until(
                    f"progress before {mode} of {name}",
                    lambda left=left: ground.journal.total("leave") > left + 10,
                    60,
                )
                proxy = {"redis": redis, "s3": s3}[name]
                proxy.be(mode)
                until_s = time.monotonic() + LASTS_S * chance.uniform(0.2, 1.0)
                wait_until("it lasts", lambda until_s=until_s: time.monotonic() > until_s)
                proxy.be("well")
                if mode == "half_close":
                    proxy.be("cut")
        found = oracle.settle(ground, timeout_s=120)
        assert all(worker.running for worker in workers)
        assert not any("Traceback" in worker.output() for worker in workers)
        print(
            f"seed {seed}: {len(faults)} faults of the network, {len(ground.ids)} jobs: "
            f"lost {len(found.lost)}, marked twice {found.marks_over}, rendered again {found.renders_over}; "
            f"answers lost: {redis.lost} of Redis, {s3.lost} of S3; {feeder.refused} times refused"
        )
        oracle.no_slot_is_lost(ground, *workers)


def test_each_fault_of_the_network_between_worker_redis_and_bucket(ground: Ground) -> None:
    storm(ground, 0, [(name, mode) for name in ("redis", "s3") for mode in MODES], rate=15.0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2])
def test_40_faults_of_the_network_lose_no_job(ground: Ground, seed: int) -> None:
    storm(ground, seed, 5 * [(name, mode) for name in ("redis", "s3") for mode in MODES], rate=25.0)
