"""Another application on our Redis: a stock Celery app. Its tasks write their start and end into a file.

NEIGHBOUR_URL         its broker, which is ours
NEIGHBOUR_NAME        of its task and queue
NEIGHBOUR_JOURNAL     the file
NEIGHBOUR_LATE        1: acks_late
NEIGHBOUR_TIMEOUT_S   its visibility timeout; without it, kombu's hour
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery

NAME = os.environ.get("NEIGHBOUR_NAME", "neighbour")

app = Celery("neighbour", broker=os.environ.get("NEIGHBOUR_URL"))
app.conf.update(task_default_queue=NAME, broker_connection_retry_on_startup=True)
if os.environ.get("NEIGHBOUR_LATE"):
    app.conf.update(task_acks_late=True, worker_prefetch_multiplier=1)
if timeout_s := float(os.environ.get("NEIGHBOUR_TIMEOUT_S", "0")):
    app.conf.broker_transport_options = {
        "visibility_timeout": timeout_s,
        "unacked_restore_interval": 0.5,
        "unacked_restore_throttle": 1,
    }


@app.task(name=f"{NAME}.slow")  # type: ignore[untyped-decorator]
def slow(number: int, seconds: float) -> None:
    """Run for some seconds."""
    journal = Path(os.environ["NEIGHBOUR_JOURNAL"])
    with journal.open("a") as file:
        file.write(f"start {number}\n")
    time.sleep(seconds)
    with journal.open("a") as file:
        file.write(f"end {number}\n")
