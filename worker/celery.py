"""The Celery app: `celery -A worker worker`.

Imports nothing but Celery, the settings and the transport: Celery reports an import that fails here as
"Module 'worker' has no attribute 'celery'".
"""

from __future__ import annotations

import os

from celery import Celery
from kombu.connection import Connection

from worker.broker.transport import broker_url, transport_options
from worker.contract.errors import SettingsError
from worker.contract.settings import Settings

try:
    _settings = Settings.from_environment(os.environ)
except SettingsError as error:
    # A producer has read the same settings before it comes here: this is the `celery` command.
    raise SystemExit(f"smallcat: {error}") from None


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
