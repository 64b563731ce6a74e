"""Jobs that begin with pictures, while the bucket fails, inputs are lost and workers die: none is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from producer import JobHandle
from tests.faults import oracle
from tests.faults.harness import Ground, wait_until
from tests.faults.pictures import WITH_PICTURES
from tests.faults.s3_proxy import Mode, S3Proxy
from worker.contract.input_reference import InputReference

#: Real processes that are started several times.
pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

#: Where `tests.faults.app` can die on the way of a job with pictures, in the order in which it passes.
POINTS = ("before_inputs", "after_inputs", "encode", "paste", "between_puts", "after_put")


@pytest.fixture
def proxy(ground: Ground) -> Iterator[S3Proxy]:
    """Fails where inputs are read, and nowhere else."""
    proxy = S3Proxy(ground.stack.s3.port)
    proxy.only_key = "/inputs/"
    yield proxy
    proxy.close()


def submit(ground: Ground) -> list[str]:
    """A job of each kind with pictures; their ids."""
    return [each for kind in WITH_PICTURES for each in ground.submit(1, kind=kind)]


@pytest.mark.parametrize("mode", ["down", "errors", "silent", "halved", "slow"])
def test_a_bucket_that_fails_while_inputs_are_read_is_waited_for(
    ground: Ground, proxy: S3Proxy, mode: Mode
) -> None:
    """Jobs of text alone are rendered meanwhile."""
    worker = ground.worker(settings={"AWS_ENDPOINT_URL_S3": proxy.endpoint, "SMALLCAT_MAX_ATTEMPTS": "1"})
    proxy.mode = mode
    ids = submit(ground)
    try:
        wait_until(f"{mode} failed", lambda: proxy.failed[mode] >= len(ids), 120)
        texts = ground.submit(3)
        wait_until("those of text are done", lambda: ground.states(texts) == {"done": 3}, 120)
        if mode != "slow":
            assert ground.states(ids) == {"running": len(ids)}
    finally:
        proxy.mode = "well"
    found = oracle.settle(ground, timeout_s=120)
    assert found.renders_over == 0
    assert worker.running


def test_the_process_that_reads_inputs_is_killed_and_no_job_is_lost(ground: Ground, proxy: S3Proxy) -> None:
    worker = ground.worker(settings={"AWS_ENDPOINT_URL_S3": proxy.endpoint, "SMALLCAT_MAX_ATTEMPTS": "1"})
    proxy.mode = "silent"
    ids = submit(ground)
    wait_until("all are asked for", lambda: proxy.failed["silent"] >= len(ids))
    children = psutil.Process(worker.pid).children()
    (asking,) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    asking.kill()
    proxy.mode = "well"
    assert oracle.settle(ground, ids, timeout_s=120).renders_over == 0
    assert worker.running


def test_a_worker_that_dies_at_each_point_leaves_one_object_and_one_mark(ground: Ground) -> None:
    ground.two_that_may_die()
    dying: list[str] = []
    for point in POINTS:
        dying += ground.submit(1, f"die:{point}", kind="part")
        # One at a time: a death takes the other jobs with it, one of which may be past its own point.
        oracle.settle(ground, timeout_s=120)
    died = ground.journal.count("died")
    assert {job_id: died[job_id] for job_id in dying} == dict.fromkeys(dying, 1)


def test_inputs_that_are_lost_changed_or_too_large_fail_their_own_jobs_in_one_sentence(
    ground: Ground,
) -> None:
    """Between submission and rendering, and by whoever may put into the bucket."""
    (gone,), (changed,), (huge,) = (ground.submit(1, kind=kind, own=True) for kind in WITH_PICTURES)
    others = submit(ground)

    def file_of(job_id: str) -> tuple[Path, str]:
        digits = InputReference.parse(JobHandle(job_id).record().job.image).id
        return ground.images.parent / "inputs" / digits, f"({digits[:12]}...)"

    (lost, its), (other, others_own), (large, larges) = map(file_of, (gone, changed, huge))
    lost.unlink()
    other.write_bytes(b"a small cat")
    with large.open("r+b") as file:
        file.truncate(200_000_000)
    worker = ground.worker()
    ended = {"done": len(others), "failed": 3}
    wait_until("all have ended", lambda: ground.states(ground.ids) == ended, 120)
    remedy = "submit the job again with the picture."
    errors = {job_id: JobHandle(job_id).record() for job_id in (gone, changed, huge)}
    assert {job_id: record.error for job_id, record in errors.items()} == {
        gone: f"image is gone from the bucket {its}: {remedy}",
        changed: f"image was changed in the bucket {others_own}: {remedy}",
        huge: f"image is larger in the bucket {larges} than the limit, 50 MB: {remedy}",
    }
    assert {(record.error_type, record.attempts) for record in errors.values()} == {("InputError", 1)}
    oracle.settle(ground, others)
    assert worker.running
    assert "Traceback" not in worker.output()
    oracle.no_slot_is_lost(ground, worker)
