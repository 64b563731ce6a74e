"""Celery's Redis transport, made so that no message is lost: `transport` is the door."""
