"""Fixtures of these tests: `wire` notes and refuses requests, `services` starts other S3 servers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from shutil import which

import pytest

from deploy.embedded.home import Home
from deploy.embedded.servers import S3Process
from tests.worker.storage.servers import SERVERS, missing
from tests.worker.storage.wire import wire

__all__ = ["services", "wire"]


@pytest.fixture(scope="session")
def services() -> Iterator[Callable[[str], S3Process]]:
    """One server of each name for the whole run, started when it is first asked for.

    One that is not installed skips the test at home and fails it in CI, except s3rver where there is no npm.
    One that has ended since fails the next test with the end of its log, and is started anew after it.
    """
    started: dict[str, S3Process] = {}
    with Home() as home:

        def service(name: str) -> S3Process:
            if lack := missing(name):
                is_needed = os.environ.get("CI") == "true" and not (name == "s3rver" and which("npm") is None)
                (pytest.fail if is_needed else pytest.skip)(lack)
            if name not in started:
                server = SERVERS[name](home, name)
                server.start()
                started[name] = server
            elif not started[name].running:
                raise started.pop(name).loss()
            return started[name]

        yield service
