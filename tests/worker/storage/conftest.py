"""Fixtures of these tests: see `wire`."""

from tests.worker.storage.wire import wire

__all__ = ["wire"]
