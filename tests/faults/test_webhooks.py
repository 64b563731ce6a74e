"""Workers and senders are killed under load, receivers fail: every submission with a webhook is told.

The short form runs in `make test`, the long one by `make storm`.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import pytest
from standardwebhooks import Webhook

from deploy.embedded.process import Process
from producer import JobHandle, submit_job
from producer.webhooks.secrets import Secrets
from producer.webhooks.sender import STARTED
from tests.faults import oracle
from tests.faults.harness import ROOT, Ground, wait_until
from tests.faults.test_storms import PATIENT
from tests.producer.webhooks.receiver import Handler, receiving
from worker.contract.job import Job
from worker.state.notifications import Notifications

pytestmark = pytest.mark.timeout(150)

#: Kills of a long storm.
KILLS = int(os.environ.get("STORM_KILLS", "200")) // 2
HOSTS = "127.0.0.1"


@pytest.fixture(autouse=True)
def _hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLCAT_WEBHOOK_HOSTS", HOSTS)


class FaultSender(Process):
    """A sender."""

    start_timeout_s = 60.0

    def __init__(self, ground: Ground, name: str) -> None:
        super().__init__(ground.stack.home, name)
        self._variables: Mapping[str, str] = {
            **ground.stack.environment,
            "PYTHONPATH": str(ROOT),
            "SMALLCAT_WEBHOOK_HOSTS": HOSTS,
            "SMALLCAT_WEBHOOK_SECRETS_DIR": str(ground.folder / "secrets"),
        }

    def _argv(self) -> list[str]:
        return [sys.executable, "-m", "tests.faults.sender"]

    def _environment(self) -> Mapping[str, str]:
        return self._variables

    def _is_ready(self) -> bool:
        return STARTED in self.output()


def sometimes_failing(chance: random.Random) -> Callable[[Handler], None]:
    """A receiver that answers every tenth request with 500, or hangs up without an answer."""

    def answer(handler: Handler) -> None:
        draw = chance.random()
        if draw < 0.05:
            handler.status(500)
        elif draw < 0.1:
            handler.close_connection = True
        else:
            handler.status(204)

    return answer


def storm(ground: Ground, kills: int, rate: float, of_each: int, **faults: object) -> None:
    """Kill a worker and a sender together, under load. Each submission is told how it ended, for good."""
    handles: dict[str, JobHandle] = {}
    numbers = itertools.count()
    # Of each tenant of the storm's jobs.
    secrets, tenants = Secrets("", str(ground.folder / "secrets")), dict[str, str]()
    workers = [ground.worker(ready=False, settings=PATIENT, **faults) for _ in range(of_each)]
    parts = [FaultSender(ground, f"sender{number}") for number in range(of_each)]
    ground.stack.workers += parts  # type: ignore[arg-type] - they end with the stack
    with receiving(sometimes_failing(random.Random(1))) as receiver:

        def submit(job: Job) -> str:
            if job.tenant not in tenants.values():
                secrets.rotate(job.tenant)
            handle = submit_job(job, webhook=f"{receiver.url}?n={len(handles)}")
            tenants[handle.submission] = job.tenant
            handles[handle.submission] = handle
            if next(numbers) % 7 == 3:
                handle.cancel()
            return handle.id

        for part in parts:
            part.launch()
        for part in (*workers, *parts):
            part.wait_ready()
        with ground.feeding(rate, submit=submit):
            for kill in range(kills):
                victims: list[Process] = [workers[kill % of_each], parts[kill % of_each]]
                for victim in victims:
                    victim.wait_ready()
                left = len(receiver.requests)
                wait_until("progress", lambda left=left: len(receiver.requests) > left + 10, 120)
                for victim in victims:
                    victim.kill()
                    victim.launch()
        for part in (*workers, *parts):
            part.wait_ready()
        told: dict[str, set[str]] = defaultdict(set)
        seen = 0

        def all_are_told() -> bool:
            nonlocal seen
            for request in receiver.requests[seen:]:
                tenant = tenants[request.json["data"]["submission"]]
                event = Webhook(secrets.of(tenant)[0]).verify(request.body, request.headers)
                told[event["data"]["submission"]].add(event["data"]["state"])
                seen += 1
            return handles.keys() <= told.keys()

        wait_until("all are told", all_are_told, 120)
        with ground.redis as client:
            book = Notifications(client)
            wait_until("nothing is left to send", lambda: not (book.untaken() or book.waiting()), 60)
            assert book.failed() == []
        oracle.settled(ground)
        all_are_told()
    wrong = {
        submission: states
        for submission, states in told.items()
        if states != {str(handles[submission].state())}
    }
    assert not wrong
    ids = Counter(request.headers["webhook-id"] for request in receiver.requests)
    assert len(ids) == len(handles), "one id a submission and outcome"
    oracle.keys_have_owners(ground)
    print(
        f"{2 * kills} kills, {len(handles)} submissions: 0 not told, {ids.total() - len(ids)} requests again"
    )


def test_kills_lose_no_notification(ground: Ground) -> None:
    storm(ground, kills=1, rate=40.0, of_each=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_100_kills_lose_no_notification(ground: Ground) -> None:
    storm(ground, KILLS, rate=40.0, of_each=2, storage="folder")
