"""The process for requests to the bucket, with a real S3 server: it does as `Bucket`, and leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.conftest import EmptyBucket
from worker.contract.choices import ImageFormat
from worker.contract.errors import InputError, PermanentStorageError, StorageError
from worker.contract.job import Job
from worker.storage.bucket import Bucket
from worker.storage.bucket_process import BucketProcess

JOB_ID = "0123456789abcdef0123456789abcdef"
PNG = ImageFormat.PNG
#: Starts one, reports it, and waits to be killed.
OWNER = """
import sys
from worker.contract.choices import ImageFormat
from worker.storage.bucket_process import BucketProcess
if __name__ == "__main__":
    BucketProcess(sys.argv[1]).find("0" * 32, ImageFormat.PNG)
    print("asked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def storage(s3_environment: EmptyBucket) -> Iterator[BucketProcess]:
    storage = BucketProcess(s3_environment.name, "a/prefix")
    yield storage
    if storage._remote is not None:
        storage._remote._manager.shutdown()


def put(storage: Bucket) -> None:
    storage.put(JOB_ID, PNG, b"picture" * 100_000, b'{"job": 1}', "image/png")


def process_of(storage: BucketProcess) -> psutil.Process:
    return psutil.Process(storage._started()._manager._process.pid)


def test_what_another_process_puts_is_what_a_storage_finds(
    storage: BucketProcess, s3_environment: EmptyBucket
) -> None:
    here = Bucket(s3_environment.name, "a/prefix")
    assert storage.find(JOB_ID, PNG) is None
    put(storage)
    assert storage.find(JOB_ID, PNG) == here.find(JOB_ID, PNG) == b'{"job": 1}'
    assert here.get(storage.uri(JOB_ID, PNG)) == b"picture" * 100_000
    assert storage._made is None


def test_many_threads_ask_one_process(storage: BucketProcess) -> None:
    storage.start()
    with ThreadPoolExecutor(16) as threads:
        assert set(threads.map(lambda number: storage.find(f"{number:032x}", PNG), range(64))) == {None}
    job = Job.parse({"prompt": "x", "seed": 1, "image": f"sha256:{'ab' * 32}:64x64"})
    with pytest.raises(InputError, match="image is gone from the bucket"):
        storage.pixels_of(job)
    spawned = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    assert [child.pid for child in spawned] == [process_of(storage).pid]


def test_refusals_come_over_as_they_are(s3_environment: EmptyBucket) -> None:
    storage = BucketProcess("no-such-bucket")
    with pytest.raises(PermanentStorageError, match=r'The bucket "no-such-bucket" refuses .*create it'):
        put(storage)


def test_one_that_is_killed_is_an_error_and_the_next_request_starts_another(storage: BucketProcess) -> None:
    put(storage)
    process = process_of(storage)
    process.kill()
    process.wait(10)
    with pytest.raises(StorageError, match=r"has ended .*: the next request starts another one"):
        put(storage)
    put(storage)
    assert process_of(storage).pid != process.pid


def test_signals_to_its_group_do_not_end_it(storage: BucketProcess) -> None:
    put(storage)
    process = process_of(storage)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    put(storage)
    assert process_of(storage).pid == process.pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, None], ids=["killed", "ended", "returns"])
def test_it_ends_with_its_owner_and_leaves_nothing(
    s3_environment: EmptyBucket, tmp_path: Path, number: int | None
) -> None:
    program = tmp_path / "owner.py"
    program.write_text(OWNER)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    root = Path(__file__).resolve().parents[3]
    owner = subprocess.Popen(
        [sys.executable, str(program), s3_environment.name],
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"asked\n"
    children = psutil.Process(owner.pid).children(recursive=True)
    if number is None:
        owner.communicate()
    else:
        owner.send_signal(number)
        owner.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert list(temporary.iterdir()) == []
