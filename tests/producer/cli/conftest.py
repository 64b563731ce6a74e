"""Fixtures of these tests: see `tests.worker.storage.wire`."""

from tests.worker.storage.wire import wire

__all__ = ["wire"]
