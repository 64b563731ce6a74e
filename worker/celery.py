"""The Celery app: `celery -A worker worker`.

Imports nothing but Celery, the settings and the transport: Celery reports an import that fails here as
"Module 'worker' has no attribute 'celery'".
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from kombu.connection import Connection

from worker.broker.transport import broker_url, transport_options
from worker.contract.errors import SettingsError
from worker.contract.settings import Settings

try:
    _settings = Settings.from_environment(os.environ)
except SettingsError as error:
    # A producer has read the same settings before it imports this module: this is the `celery` command.
    raise SystemExit(f"smallcat: {error}") from None


app = Celery("smallcat", broker=broker_url(_settings.redis_url), include=["worker.tasks"])
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    # The state of a job is its record in Redis: Celery's result backend would be another one.
    result_backend=None,
    task_serializer="json",
    accept_content=["json"],
    worker_pool="threads",
    # `worker.tasks` sets a number when the model is loaded.
    worker_concurrency="auto",
    worker_prefetch_multiplier=1,
    # Jobs run on when the connection is lost; the next connection acknowledges them.
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_send_task_events=True,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # The worker must not end because Redis answers with an error, such as that it is full.
    broker_channel_error_retry=True,
    # The transport counts the messages that the process holds, over all its connections.
    worker_enable_prefetch_count_reduction=False,
    # Broadcasts of other applications on the same Redis, such as `shutdown`, are not ours.
    control_exchange="smallcat",
    broker_transport_options=transport_options(_settings.lease_s),
    # When Redis is out of reach, `submit_job` must notice at once: it retries by itself.
    task_publish_retry=False,
)


def connection(redis_url: str) -> Connection:
    """A connection of this app to that Redis, not yet open. kombu pools those of equal arguments."""
    made: Connection = app.connection_for_write(url=broker_url(redis_url))
    return made


def message_of(call: dict[str, Any], message_id: str, producer: Any) -> dict[str, Any]:
    """The message that Celery makes of a call (`worker.contract.message.task_call`). Nothing is sent.

    `producer` is kombu's, on a channel of `connection`.
    """
    channel, caught = producer.channel, []
    channel._put = lambda queue, message, **_: caught.append(message)
    try:
        app.send_task(**call, task_id=message_id, producer=producer)
    finally:
        del channel._put
    [message] = caught
    made: dict[str, Any] = message
    return made
