"""A worker without torch, for tests of all that is around it: `celery -A tests.fast_worker worker -Q QUEUE`.

The app's settings, the transport, the records and `JobHandler` are the real ones. The engine gives one
small picture after `FAST_WORKER_S` seconds. The bucket is a real one where S3_BUCKET is set; else it stores
nothing. A prompt that starts with "fail" fails. Each render is a line in `FAST_WORKER_JOURNAL`.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from typing import Any

import numpy as np
from celery import Celery

from worker.celery import app as real
from worker.contract.choices import ImageFormat
from worker.contract.errors import InvalidJobError
from worker.contract.job import FORMAT_VERSION, Job
from worker.contract.message import TASK
from worker.contract.object_keys import object_key
from worker.contract.served_model import Defaults, ServedModel
from worker.contract.settings import producer_settings
from worker.engine.runner import Picture
from worker.engine.ticket import Rendered
from worker.jobs.handler import JobHandler
from worker.state.fleet import Fleet, WorkerInfo
from worker.state.records import Records
from worker.state.redis_client import connect
from worker.storage.bucket import Bucket

SERVED = ServedModel(
    name="fast", revision="f" * 40, defaults=Defaults(width=64, height=64, steps=4, guidance_scale=7.5)
)
SECONDS = float(os.environ.get("FAST_WORKER_S", "0"))
#: Seconds of the device's time that each job says it took.
DEVICE_S = 0.25
JOURNAL = os.environ.get("FAST_WORKER_JOURNAL", os.devnull)

settings = producer_settings()
KEPT = ("task_acks_late", "task_ignore_result", "task_serializer", "accept_content", "worker_pool")
KEPT += ("worker_prefetch_multiplier", "worker_cancel_long_running_tasks_on_connection_loss")
KEPT += ("broker_connection_retry_on_startup", "broker_connection_max_retries", "broker_transport_options")
app = Celery("fast", broker=real.conf.broker_url)
app.conf.update({name: getattr(real.conf, name) for name in KEPT})


class FastEngine:
    """What `JobHandler` needs of an engine."""

    def submit(self, job_id: str, job: Job, *_: object) -> Future[Rendered]:
        future: Future[Rendered] = Future()
        time.sleep(SECONDS)
        with open(JOURNAL, "a") as journal:  # noqa: PTH123 - one write, so lines do not mix
            journal.write(f"{job_id} {job.seed} {time.time():.3f} {job.prompt}\n")
        if job.prompt.startswith("fail"):
            future.set_exception(InvalidJobError("It was asked to fail."))
        else:
            # Small, unless the job's image is put back into it.
            size = (job.height or 8, job.width or 8) if job.mask else (8, 8)
            shade = np.full((*size, 3), job.seed % 256, np.uint8)
            future.set_result(Rendered(Picture(shade), (), DEVICE_S))
        return future

    def progress(self) -> dict[str, tuple[int, int]]:
        return {}


class NoBucket:
    """A bucket that accepts every picture and stores none."""

    def find(self, job_id: str, image_format: ImageFormat, tenant: str = "") -> bytes | None:
        return None

    def put(self, *_: object) -> None:
        return None

    def uri(self, job_id: str, image_format: ImageFormat, tenant: str = "") -> str:
        return f"s3://nowhere/{object_key(job_id, image_format, tenant)}"


def announce(redis_url: str, seconds: int = 3_600) -> None:
    """Announce a worker of `SERVED` in the fleet for `seconds`."""
    client = connect(redis_url, 1)
    fleet = Fleet(client, seconds)
    info = WorkerInfo(
        name="fast@test",
        served=SERVED,
        started_at=0,
        device="none",
        attention="none",
        max_rows=1,
        versions={},
        reads=FORMAT_VERSION,
    )
    fleet.announce(info)
    client.expire("smallcat:worker:fast@test", seconds)


def _handler() -> JobHandler:
    fake: Any = FastEngine()
    bucket: Any = Bucket(settings.s3_bucket, settings.s3_prefix) if settings.s3_bucket else NoBucket()
    return JobHandler(
        name="fast@test",
        served=SERVED,
        engine=fake,
        records=Records(connect(settings.redis_url, 30), settings.record_ttl_s),
        bucket=bucket,
        lease_s=settings.lease_s,
        max_attempts=3,
        upload_timeout_s=10,
    )


handler = _handler()


@app.task(name=TASK, bind=True)  # type: ignore[untyped-decorator]
def render(task: Any, payload: dict[str, Any]) -> None:
    """What `worker.tasks.run_job` does, without its care for what cannot happen here."""
    handler.handle(payload, task.request.id)
