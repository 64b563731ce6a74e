"""How no message is lost: Celery's Redis transport, whose door for the rest of the worker is `transport`."""
