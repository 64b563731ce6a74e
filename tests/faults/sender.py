"""A sender for storms, `python -m tests.faults.sender`: what one holds comes back in seconds."""

from __future__ import annotations

import worker.state.notifications as notifications
from producer.session import session
from producer.webhooks import schedule, sender
from worker.contract.settings import webhook_settings

notifications.HELD_S = 3  # type: ignore[misc]
schedule.PAUSES_S = (0.2,) * 10  # type: ignore[misc]

if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO)
    sender.run(session(redis_retry_s=2), webhook_settings(), at_once=32, per_host=32)
