"""How a worker ends: by whichever signal, in order, in time, without a traceback, and with no job lost."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from tests.faults import oracle
from tests.faults.harness import FaultWorker, Ground, wait_until

#: Seconds, with room for the start of several workers on a busy machine.
pytestmark = pytest.mark.timeout(150)

#: Drain time, and seconds that the rest of a stop may take.
DRAIN_S, REST_S = 6.0, 8.0
#: Seconds within which a worker ends that gives its jobs back at once. Its drain time is long then.
AT_ONCE_S = 8.0


def slow(values: object) -> object:
    """Of `make storm` alone."""
    return pytest.param(values, marks=pytest.mark.slow)


def send(worker: FaultWorker, *numbers: signal.Signals, group: bool = False) -> None:
    """Send the signals, each once the one before has been acted on."""
    worker._asked_to_end = True
    for number in numbers:
        said = worker.output().count("stopping")
        (os.killpg if group else os.kill)(worker.pid, number)
        wait_until(f"stops at {number.name}", lambda said=said: worker.output().count("stopping") > said)


def ended_in(worker: FaultWorker) -> float:
    began_s = time.monotonic()
    assert worker.wait(60)
    assert worker._popen is not None
    assert worker._popen.returncode == 0
    assert "Traceback" not in worker.output()
    assert "Error" not in worker.output()
    return time.monotonic() - began_s


@pytest.mark.parametrize("number", [signal.SIGHUP, *map(slow, (signal.SIGTERM, signal.SIGINT))])
def test_a_signal_lets_jobs_end_and_gives_the_rest_back(ground: Ground, number: signal.Signals) -> None:
    """To the whole group, as a terminal sends it."""
    worker = ground.worker(rows=8, settings={"SMALLCAT_DRAIN_S": str(DRAIN_S)})
    short = ground.submit(4, "sleep:1")
    with ground.holding() as hold:
        held = ground.submit(4, hold)
        ground.journal.wait_for("start", [*short, *held])
        send(worker, number, group=True)
        took_s = ended_in(worker)
    assert set(ground.journal.count("put")) == set(short)
    assert took_s < DRAIN_S + REST_S
    assert ground.states(held) == {"queued": 4}
    # A give-back is one line.
    given_back = [line for line in worker.output().splitlines() if "goes back to its queue" in line]
    assert len(given_back) == 4
    for job_id in held:
        said = [line for line in worker.output().splitlines() if job_id in line]
        assert ["begins" in line for line in said] == [True, False]
    ground.worker()
    found = oracle.settle(ground)
    assert found.renders_over == 4
    assert ground.redis.hget(f"smallcat:job:{held[0]}", "attempts") == "1"


def test_all_that_a_worker_has_in_flight_ends_while_it_drains(ground: Ground) -> None:
    """Twice as many jobs as rows, which take turns."""
    worker = ground.worker(rows=4, settings={"SMALLCAT_DRAIN_S": str(DRAIN_S)})
    ids = ground.submit(8, "sleep:1")
    ground.journal.wait_for("start", ids)
    send(worker, signal.SIGTERM)
    assert ended_in(worker) < DRAIN_S
    assert set(ground.journal.count("put")) == set(ids)
    assert ground.states(ids) == {"done": 8}


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGQUIT,),
        (signal.SIGINT, signal.SIGINT),
        slow((signal.SIGTERM, signal.SIGQUIT)),
        slow((signal.SIGHUP, signal.SIGTERM, signal.SIGINT)),
    ],
    ids=str,
)
def test_a_second_signal_and_sigquit_give_all_jobs_back_at_once(
    ground: Ground, numbers: tuple[signal.Signals, ...]
) -> None:
    worker = ground.worker(settings={"SMALLCAT_DRAIN_S": "100"})
    with ground.holding() as hold:
        held = ground.submit(5, hold)
        ground.journal.wait_for("start", held)
        send(worker, *numbers, group=True)
        took_s = ended_in(worker)
        assert took_s < AT_ONCE_S
        assert ground.states(held) == {"queued": 5}
    ground.worker()
    oracle.settle(ground)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *map(slow, (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT))]
)
def test_a_worker_that_is_not_ready_ends_at_once(ground: Ground, number: signal.Signals) -> None:
    """It waits for a Redis that is away."""
    ground.stack.valkey.kill()
    worker = ground.worker(ready=False)
    wait_until("it waits", lambda: "SMALLCAT_START_TIMEOUT_S" in worker.output())
    worker._asked_to_end = True
    os.kill(worker.pid, number)
    assert worker.wait(10)
    assert f"smallcat: {number.name} ended the worker before it was ready." in worker.output()
    assert "Traceback" not in worker.output()
    ground.stack.valkey.start()


def test_a_worker_waits_for_redis_and_the_bucket_at_its_start(ground: Ground) -> None:
    for part in (ground.stack.valkey, ground.stack.s3):
        part.kill()
    worker = ground.worker(ready=False)
    for part, words in ((ground.stack.valkey, "Redis at"), (ground.stack.s3, "AWS_ENDPOINT_URL_S3")):
        wait_until("it says so", lambda words=words: words in worker.output(), 60)
        waits = [line for line in worker.output().splitlines() if "SMALLCAT_START_TIMEOUT_S" in line]
        assert re.search(words, waits[-1])
        part.start()
    worker.wait_ready()
    waits = [line for line in worker.output().splitlines() if "SMALLCAT_START_TIMEOUT_S" in line]
    assert len(waits) == 2
    ground.submit(3)
    oracle.settle(ground)


def test_a_retry_is_one_line(ground: Ground) -> None:
    worker = ground.worker()
    [job_id] = ground.submit(1, "raise:Exception@step")
    wait_until("failed", lambda: ground.states([job_id]) == {"failed": 1}, 60)

    def lines() -> list[str]:
        return [line for line in worker.output().splitlines() if job_id in line]

    # The beginning and the end of three attempts; the last line comes after the record.
    wait_until("said", lambda: len(lines()) >= 6)
    assert ["begins" in line for line in lines()] == [True, False] * 3, lines()
    assert "Traceback" not in worker.output()
