"""The HTTP API as a process, beside a fake worker: one for each file of tests.

api      the server, its key and its stack; `api.call` sends a request, `api.worker_less` names a model that
         nobody serves, whose jobs stay queued
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.embedded.stack import Stack
from producer.http.key_store import KeyStore
from producer.http.tenant_store import TenantStore
from tests.fast_worker import SERVED, announce
from worker.contract.queues import queues_of
from worker.state.redis_client import connect

ROOT = Path(__file__).parents[3]
#: A model that nobody serves: its jobs stay queued.
NOBODYS = "nobody-serves-this"
#: A model that was served until lately, at the revision "r": a tenant's jobs of it stay queued.
AWAY = "served-lately"


@dataclass(frozen=True)
class Answer:
    """An answer of the server."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True)
class Api:
    """The server under test."""

    stack: Stack
    url: str
    key: str

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        raw: bytes | None = None,
        timeout: float = 30,
    ) -> Answer:
        """Send a request. `body` is sent as JSON, `raw` as it is."""
        sent = {"Content-Type": "application/json", **(headers or {})}
        if (used := self.key if key is None else key) and "Authorization" not in sent:
            sent["Authorization"] = f"Bearer {used}"
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, sent, method=method)  # noqa: S310
        try:
            with _opener.open(request, timeout=timeout) as found:
                return Answer(found.status, dict(found.headers), found.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers), error.read())

    def new_key(self, name: str, *scopes: str, tenant: str = "", **settings: Any) -> str:
        """One more key. `settings` are its tenant's, which is made where there is none."""
        with connect(self.stack.valkey.url, 2) as client:
            store = TenantStore(client)
            if tenant:
                store.set(tenant, settings) if store.find(tenant) else store.add(tenant, settings)
            return KeyStore(client).add(name, scopes or ("submit", "read"), tenant)

    def wait(self, job: Mapping[str, Any]) -> Any:
        """The job when it has ended."""
        for _ in range(1_000):
            found = self.call("GET", job["links"]["self"]).json
            if found["state"] in ("done", "failed", "cancelled"):
                return found
            time.sleep(0.05)
        raise AssertionError(found)


def fast_worker(stack: Stack, seconds: float = 0.0) -> subprocess.Popen[bytes]:
    """A fake worker of `SERVED`."""
    announce(stack.valkey.url)
    queues = ",".join(queues_of(SERVED))
    return subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "tests.fast_worker", "worker", "-Q", queues, "-c", "4"],
        env={**stack.environment, "PYTHONPATH": str(ROOT), "FAST_WORKER_S": str(seconds)},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def remember(stack: Stack) -> None:
    """Let the fleet remember `AWAY`."""
    with connect(stack.valkey.url, 1) as client:
        seen = json.loads(client.get("smallcat:served") or "[]")
        gone = copy.deepcopy(seen[0])
        gone["served"] |= {"name": AWAY, "revision": "r"}
        client.set("smallcat:served", json.dumps([*seen, gone]))


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    """The server, with a key that may do everything."""
    with Stack(workers=0, http=True) as stack:
        worker = fast_worker(stack)
        remember(stack)
        try:
            assert stack.http is not None
            yield Api(stack, stack.http.url, stack.http.key)
        finally:
            worker.kill()
            worker.wait()


@pytest.fixture
def environment(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process' own settings name the same stack, for `JobHandle` and its like."""
    for name, value in api.stack.variables.items():
        monkeypatch.setenv(name, value)
    os.environ.pop("SMALLCAT_HTTP_KEY", None)
