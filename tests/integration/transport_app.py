"""A Celery app without torch: its jobs write their start and end into a file that outlives every fault."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from celery import Celery

from worker.broker.transport import broker_url, transport_options

STOCK = os.environ.get("PROBE_TRANSPORT") == "stock"
LEASE_S = float(os.environ.get("PROBE_LEASE_S", "2"))
PREFIX = os.environ.get("PROBE_KEYPREFIX", "")
QUEUES = os.environ.get("PROBE_QUEUES", "celery").split(",")
JOURNAL = os.environ.get("PROBE_JOURNAL", os.devnull)

redis_url = os.environ.get("REDIS_URL", "redis://localhost:6379/0")


def read_any(raw: bytes, queue: str, tag: str, channel: Any) -> Any:
    """A message of any task, as kombu reads it: these tests are about delivery."""
    message = json.loads(raw)
    if not isinstance(message["headers"], dict):
        raise TypeError("headers")
    return channel.Message(message, channel=channel)


options: dict[str, Any] = transport_options(LEASE_S) | {"reader": read_any}
if PREFIX:
    options["global_keyprefix"] = PREFIX
if STOCK:
    options["unacked_restore_throttle"] = 1
    options["unacked_mutex_expire"] = 10

app = Celery("probe", broker=redis_url if STOCK else broker_url(redis_url))
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_serializer="json",
    accept_content=["json"],
    worker_pool="threads",
    worker_prefetch_multiplier=1,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_enable_prefetch_count_reduction=False,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_channel_error_retry=True,
    broker_transport_options=options,
)


def note(event: str, job: str) -> None:
    """Append one line to the journal; lines of several processes do not mix."""
    line = f"{event} {job} {os.getpid()} {time.time():.6f}\n"
    descriptor = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@app.task(name="probe")  # type: ignore[untyped-decorator]
def probe(job: str, seconds: float = 0.0) -> None:
    """Run for some seconds."""
    note("start", job)
    time.sleep(seconds)
    note("end", job)
