"""The Celery app: `celery -A worker worker`.

Imports nothing but Celery, the settings and the transport: Celery reports an import that fails here as
"Module 'worker' has no attribute 'celery'".
"""

from __future__ import annotations

import os

from celery import Celery
from kombu.connection import Connection

from worker.errors import SettingsError
from worker.job import DEFAULT_PRIORITY, FORMAT_VERSION, MAX_PRIORITY, Job
from worker.settings import Settings
from worker.transport import broker_url, transport_options

try:
    _settings = Settings.from_environment(os.environ)
except SettingsError as error:
    # A producer has read the same settings before it comes here: this is the `celery` command.
    raise SystemExit(f"smallcat: {error}") from None

#: The one task.
RENDER = "smallcat.render"
#: The priority, as Redis' count (see `message_priority`), of a job that somebody waits for: what `submit_job`
#: sends unless it is told otherwise. Prompt files are behind it.
URGENT = MAX_PRIORITY - DEFAULT_PRIORITY

app = Celery("smallcat", broker=broker_url(_settings.redis_url), include=["worker.tasks"])
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    # A job's state is its record; Celery's own result backend would be a second truth.
    result_backend=None,
    task_serializer="json",
    accept_content=["json"],
    worker_pool="threads",
    # A number is set when the model is loaded: see `worker.tasks`.
    worker_concurrency="auto",
    worker_prefetch_multiplier=1,
    # Jobs run on when the connection is lost, and are acknowledged over the next one.
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_send_task_events=True,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # A Redis that answers with an error, because it is full, say, is no reason to end.
    broker_channel_error_retry=True,
    # The transport counts what the process holds, over all its connections.
    worker_enable_prefetch_count_reduction=False,
    broker_transport_options=transport_options(_settings.lease_s),
    # A producer learns at once, and retries by itself, when Redis is away.
    task_publish_retry=False,
)


def connection(redis_url: str) -> Connection:
    """A connection of this app to that Redis, not yet made. kombu pools those of equal URLs."""
    made: Connection = app.connection_for_write(url=broker_url(redis_url))
    return made


def message_of(job: Job, run: str = "") -> dict[str, object]:
    """What travels through Redis for `job`: versioned, and nothing but JSON.

    `run` is its place in a prompt file's run (`worker.records.run_mark`), where it has one.
    """
    message = {"version": FORMAT_VERSION, "id": job.id, "job": job.model_dump(mode="json")}
    return message | {"run": run} if run else message


def args_repr(prompt: str, seed: int) -> str:
    """What Flower shows of a message. Celery's own would cost more time than all else, and more memory."""
    return f"({prompt[:80]!r}, seed {seed})"


def message_priority(job: Job) -> int:
    """Redis' priorities count backwards: 0 is fetched first."""
    return MAX_PRIORITY - job.priority
