"""Jobs with LoRAs of a bucket, while workers die with them and the bucket fails: each is done, and once."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.embedded.stack import BUCKET
from tests.faults import oracle
from tests.faults.harness import Ground, wait_until
from tests.faults.s3_proxy import Mode, S3Proxy

#: Real processes that are started several times.
pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]

#: Where `tests.faults.app` can die on the way of a job with a LoRA, in the order in which it passes.
POINTS = ("copied", "fetched", "encode")
LORAS = {"SMALLCAT_LORAS": f"s3://{BUCKET}/loras"}


@pytest.fixture
def names(ground: Ground) -> list[str]:
    """LoRAs that lie in the bucket: a name for each point."""
    folder = ground.stack.s3.folder / BUCKET / "loras"
    folder.mkdir()
    for number, name in enumerate(POINTS):
        (folder / f"{name}.safetensors").write_bytes(lora(number))
    return list(POINTS)


@pytest.fixture
def proxy(ground: Ground) -> Iterator[S3Proxy]:
    """Fails where LoRAs are read, and nowhere else."""
    proxy = S3Proxy(ground.stack.s3.port)
    proxy.only_key = "/loras/"
    yield proxy
    proxy.close()


def lora(number: int) -> bytes:
    """A file that says that it is a LoRA."""
    module, data = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", bytes([number]) * 4 * 24
    tensors = {
        f"{module}.lora_A.weight": {"dtype": "F32", "shape": [1, 16], "data_offsets": [0, 64]},
        f"{module}.lora_B.weight": {"dtype": "F32", "shape": [8, 1], "data_offsets": [64, 96]},
    }
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + data


def cache(ground: Ground, name: str) -> dict[str, str]:
    """A worker's own cache: as on a machine of its own."""
    return {"SMALLCAT_CACHE_DIR": str(ground.folder / name)}


def fetched(folder: Path) -> int:
    return len(list((folder / "files").glob("*.safetensors")))


def test_a_worker_that_dies_while_it_loads_a_lora_leaves_one_object_and_one_mark(
    ground: Ground, names: list[str]
) -> None:
    settings = LORAS | cache(ground, "cache") | {"SMALLCAT_MAX_ATTEMPTS": "20"}
    workers = [ground.worker(ready=False, settings=settings) for _ in range(2)]
    ground.supervise(*workers)
    for worker in workers:
        worker.wait_ready()
    assert fetched(ground.folder / "cache") == 0
    dying: list[str] = []
    for point in names:
        with ground.holding() as hold:
            ground.submit(1, hold)
            dying += ground.submit(1, f"die:{point}", loras=point)
        # One at a time: a death takes the other jobs with it.
        oracle.settle(ground, timeout_s=120)
    died = ground.journal.count("died")
    assert {job_id: died[job_id] for job_id in dying} == dict.fromkeys(dying, 1)
    assert fetched(ground.folder / "cache") == len(names)


def test_a_worker_that_is_killed_while_the_bucket_is_silent_loses_no_job(
    ground: Ground, names: list[str], proxy: S3Proxy
) -> None:
    far = {"AWS_ENDPOINT_URL_S3": proxy.endpoint, "SMALLCAT_MAX_ATTEMPTS": "2"}
    first = ground.worker(settings=LORAS | far | cache(ground, "first"))
    proxy.mode = "silent"
    ids = ground.submit(3, loras=names[0]) + ground.submit(2, loras=names[1:])
    wait_until("they are fetched", lambda: proxy.failed["silent"] >= 1)
    # Those without are rendered meanwhile.
    others = ground.submit(4)
    wait_until("others are done", lambda: ground.states(others) == {"done": 4})
    first.kill()
    ground.worker(settings=LORAS | cache(ground, "second") | {"SMALLCAT_MAX_ATTEMPTS": "2"})
    oracle.settle(ground, ids, timeout_s=120)


@pytest.mark.parametrize("mode", ["down", "errors", "denied", "halved"])
def test_a_worker_that_cannot_fetch_a_file_gives_its_jobs_back_without_an_attempt(
    ground: Ground, names: list[str], proxy: S3Proxy, mode: Mode
) -> None:
    far = {"AWS_ENDPOINT_URL_S3": proxy.endpoint, "SMALLCAT_MAX_ATTEMPTS": "1"}
    worker = ground.worker(settings=LORAS | far | cache(ground, "cache"))
    proxy.mode = mode
    ids = ground.submit(2, loras=names[0])
    wait_until(f"{mode} failed", lambda: proxy.failed[mode] >= 2, 60)
    others = ground.submit(3)
    wait_until("those without are done", lambda: ground.states(others) == {"done": 3}, 60)
    assert ground.states(ids).keys() <= {"queued", "running"}
    proxy.mode = "well"
    oracle.settle(ground, timeout_s=120)
    assert ground.attempts(ids) == {"1": 2}
    assert "Traceback" not in worker.output()
