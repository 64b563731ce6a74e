"""S3 fails in each of its ways: nothing is acknowledged before its picture is there, or rendered twice."""

from __future__ import annotations

import secrets
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from producer import JobHandle
from producer.cli.doctor import Finding, examine
from tests.faults import oracle
from tests.faults.harness import FaultWorker, Ground, wait_until
from tests.faults.s3_proxy import Mode, S3Proxy
from tests.growing_file import complete_lines

#: Seconds, with room for the start of several workers on a busy machine.
pytestmark = pytest.mark.timeout(150)

MODES: list[Mode] = ["down", "errors", "silent", "corrupt", "slow"]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Finding]]:
    # What this machine has is another matter.
    monkeypatch.setattr("producer.cli.doctor._device", lambda: iter(()))
    return lambda: list(examine())


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
            assert not any((ground.folder_of(job_id) / f"{job_id}.png").exists() for job_id in ids)
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


def log_of(worker: FaultWorker) -> list[str]:
    return complete_lines(worker.log)


@pytest.mark.parametrize("mode", ["denied", "expired"])
def test_rights_that_lapse_cost_no_job(
    ground: Ground, proxy: S3Proxy, doctor: Callable[[], list[Finding]], mode: Mode
) -> None:
    worker = ground.worker(settings={"AWS_ENDPOINT_URL_S3": proxy.endpoint})
    with ground.holding() as hold:
        ids = ground.submit(4, hold)
        ground.journal.wait_for("start", ids)
        proxy.mode = mode
    # Those in flight go back, and so will whatever was fetched at that moment.
    wait_until("all are back", lambda: ground.states(ids) == {"queued": 4} and ground.unsettled() == 0)
    ids += ground.submit(4)
    taken = ground.journal.total("take")

    def told() -> list[str]:
        return [each.text for each in doctor() if f"{worker.node} takes no jobs at present" in each.text]

    wait_until("the doctor says so", lambda: bool(told()))
    # It tries a test object some times, and takes no job meanwhile.
    tried = proxy.failed[mode]
    wait_until("it tries again", lambda: proxy.failed[mode] >= tried + 2)
    assert ground.states(ids) == {"queued": 8}
    assert ground.waiting() == dict.fromkeys(ids, 1)
    assert ground.journal.total("take") == taken
    proxy.mode = "well"
    oracle.settle(ground, ids, timeout_s=120)
    # No attempt is counted, and no job is failed.
    assert ground.states(ids) == {"done": 8}
    assert ground.attempts(ids) == {"1": 8}
    code = {"denied": "AccessDenied", "expired": "ExpiredToken"}[mode]
    assert len([line for line in log_of(worker) if code in line]) == 1
    assert len([line for line in log_of(worker) if "The bucket takes objects again" in line]) == 1
    wait_until("the doctor says so no more", lambda: not told())


def test_keys_that_are_rotated_are_read_from_their_file_again(ground: Ground, tmp_path: Path) -> None:
    """The worker holds the old ones, which the server knows no more, until the file has the new ones."""
    server, file = ground.stack.s3, tmp_path / "credentials"

    def write_keys() -> None:
        keys = f"aws_access_key_id = {server.access_key}\naws_secret_access_key = {server.secret_key}\n"
        file.write_text(f"[default]\n{keys}")

    write_keys()
    no_keys = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SHARED_CREDENTIALS_FILE": str(file)}
    worker = ground.worker(settings=no_keys)
    oracle.settle(ground, ground.submit(2), timeout_s=60)
    server.kill()
    server.access_key, server.secret_key = secrets.token_hex(10), secrets.token_hex(20)
    server.start()
    ids = ground.submit(4)
    wait_until("it pauses", lambda: [line for line in log_of(worker) if "no others are taken" in line] != [])
    wait_until("all are back", lambda: ground.states(ids) == {"queued": 4} and ground.unsettled() == 0)
    write_keys()
    oracle.settle(ground, ids, timeout_s=60)
    assert ground.attempts(ids) == {"1": 4}


def test_a_key_that_is_denied_fails_its_job_alone(ground: Ground, proxy: S3Proxy) -> None:
    worker = ground.worker(settings={"AWS_ENDPOINT_URL_S3": proxy.endpoint})
    with ground.holding() as hold:
        ids = ground.submit(4, hold)
        ground.journal.wait_for("start", ids)
        proxy.denied_key = ids[0]
    wait_until("all have ended", lambda: ground.states(ids) == {"done": 3, "failed": 1})
    assert ground.states(ids[:1]) == {"failed": 1}
    assert ground.error_types(ids[:1]) == {"PermanentStorageError": 1}
    proxy.denied_key = ""
    oracle.settle(ground, ground.submit(4), timeout_s=60)
    assert worker.running
    assert not [line for line in log_of(worker) if "no others are taken" in line]


def test_objects_are_put_as_the_settings_say(ground: Ground) -> None:
    """rclone keeps Cache-Control, and gives it back."""
    ground.worker(settings={"SMALLCAT_S3_CACHE_CONTROL": "max-age=61"})
    (job_id,) = ground.submit(1)
    oracle.settle(ground, [job_id], timeout_s=60)
    link = JobHandle(job_id).result().url()
    with urllib.request.urlopen(link, timeout=10) as answer:  # noqa: S310 - our own server
        assert answer.headers["Cache-Control"] == "max-age=61"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", MODES)
def test_a_storage_that_fails_for_a_minute_is_waited_for(ground: Ground, proxy: S3Proxy, mode: Mode) -> None:
    worker = ground.worker(settings={"AWS_ENDPOINT_URL_S3": proxy.endpoint})
    fail(ground, proxy, mode, failures=8, fails_s=60)
    assert worker.running
    print(f"storage {mode} for 60 s: 8 of 8 there afterwards, none acknowledged before, none rendered twice")
