"""Others on the same Redis database: stock Celery apps, and workers of earlier versions."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tarfile
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from deploy.embedded.servers import ValkeyProcess
from deploy.embedded.stack import Stack
from tests.faults import oracle
from tests.faults.harness import ROOT, FaultWorker, Ground, wait_until
from tests.growing_file import complete_lines
from worker.broker.adoption import AT_ONCE, Adoption
from worker.broker.layout import Layout
from worker.broker.transport import (
    LEASE_S,
    OLD_UNACKED,
    OLD_UNACKED_INDEX,
    UNACKED,
    UNACKED_INDEX,
)
from worker.contract.queues import PARKED, UNDECODABLE

#: A test may start several workers, on a machine that may be busy.
pytestmark = pytest.mark.timeout(180)

#: Seconds: longer than our lease in these tests, shorter than any lease of the neighbours.
TASK_S = 1.5
TASKS = 4


@pytest.fixture(scope="module")
def module_ground(servers: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with Stack(workers=0) as stack:
        ground = Ground(stack, tmp_path_factory.mktemp("neighbours"))
        ground.worker(settings={"SMALLCAT_LEASE_S": "1"})
        yield ground


@pytest.fixture
def ground(module_ground: Ground, monkeypatch: pytest.MonkeyPatch) -> Ground:
    """One worker of ours, with a lease of one second."""
    module_ground.use(monkeypatch)
    module_ground.ids.clear()
    return module_ground


class Neighbour:
    """A worker of `tests.integration.neighbour_app`, and its journal."""

    def __init__(self, ground: Ground, name: str, **settings: str) -> None:
        self.name = name
        self.journal = ground.folder / f"{name}.journal"
        self.journal.touch()
        self.url = ground.stack.environment["REDIS_URL"]
        self.environment = {
            **os.environ,
            "NEIGHBOUR_URL": self.url,
            "NEIGHBOUR_NAME": name,
            "NEIGHBOUR_JOURNAL": str(self.journal),
            **{f"NEIGHBOUR_{key.upper()}": value for key, value in settings.items()},
        }
        self.log = ground.folder / f"{name}.log"
        words = ["worker", "-P", "threads", "-c", "1", "-n", f"{name}@test", "--loglevel", "INFO"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(*words), cwd=ROOT, env=self.environment, stdout=log, stderr=log
            )

    @staticmethod
    def command(*words: str) -> list[str]:
        return [sys.executable, "-m", "celery", "-A", "tests.integration.neighbour_app", *words]

    def send(self, tasks: int = TASKS) -> None:
        """Send its tasks, as its own producer does."""
        wait_until(f"{self.name} ready", lambda: " ready." in self.log.read_text(), 60)
        with Celery("producer", broker=self.url) as app:
            for number in range(tasks):
                app.send_task(f"{self.name}.slow", (number, TASK_S), queue=self.name)

    def runs(self) -> list[str]:
        return complete_lines(self.journal)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture
def neighbours(ground: Ground) -> Iterator[list[Neighbour]]:
    """Stock Celery apps: with its defaults, with acks_late, and with a visibility timeout of their own."""
    started = [
        Neighbour(ground, "plain"),
        Neighbour(ground, "late", late="1"),
        Neighbour(ground, "short", late="1", timeout_s=str(3 * TASK_S)),
    ]
    yield started
    for each in started:
        each.stop()


def test_each_of_us_runs_its_tasks_once(ground: Ground, neighbours: list[Neighbour]) -> None:
    """Neighbours hold theirs for longer than our lease, and we ours for longer than a neighbour's timeout."""
    before = ground.journal.total("start")
    with ground.holding() as hold:
        held = ground.submit(3, hold)
        ground.journal.wait_for("start", held)
        for each in neighbours:
            each.send()
        for each in neighbours:
            wait_until(f"{each.name}'s tasks", lambda: len(each.runs()) >= 2 * TASKS, 60)  # noqa: B023
    oracle.settled(ground)
    assert ground.states(held) == {"done": 3}
    assert ground.journal.total("start") - before == 3
    for each in neighbours:
        assert sorted(each.runs()) == sorted(f"{what} {n}" for what in ("start", "end") for n in range(TASKS))


def test_all_keys_carry_our_name(ground: Ground) -> None:
    with ground.redis as client, ground.holding() as hold:
        client.flushdb()
        [held] = ground.submit(1, hold)
        ground.journal.wait_for("start", [held])
        _celery(ground, "inspect", "ping")
        names = {str(name) for name in client.scan_iter()}
        assert names >= {UNACKED, UNACKED_INDEX}
        assert {name for name in names if not name.startswith(("smallcat:", "smallcat."))} == set()
    oracle.settled(ground)


def _celery(ground: Ground, *words: str, app: str = "worker") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "celery", "-A", app, *words]
    environment = {**ground.stack.environment, "PYTHONPATH": str(ROOT)}
    environment["NEIGHBOUR_URL"] = environment["REDIS_URL"]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_inspect_and_control_reach_our_workers_alone(ground: Ground) -> None:
    """`--broker` with Redis' own address, as Flower is given it, is kombu's own transport."""
    for broker in ([], ["--broker", ground.stack.environment["REDIS_URL"]]):
        answer = _celery(ground, *broker, "inspect", "ping")
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.count("OK") == 1
    neighbour = "tests.integration.neighbour_app"
    assert "No nodes replied" in _celery(ground, "inspect", "ping", app=neighbour).stderr
    _celery(ground, "control", "shutdown", app=neighbour)
    ids = ground.submit(1)
    ground.journal.wait_for("put", ids)
    assert ground.workers[0].running


def test_flower_shows_our_workers_and_tasks(ground: Ground) -> None:
    pytest.importorskip("flower")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--broker", ground.stack.environment["REDIS_URL"], "flower", f"--port={port}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "worker", *words, "--address=127.0.0.1"],
        env={**ground.stack.environment, "PYTHONPATH": str(ROOT), "FLOWER_UNAUTHENTICATED_API": "1"},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def shown(path: str) -> Any:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as page:
            return json.load(page)
        return {}

    try:
        wait_until("queues of a worker", lambda: _queues(shown("api/workers?refresh=1")), 60)
        [job] = ground.submit(1)
        wait_until("the job", lambda: job in json.dumps(shown("api/tasks")), 60)
    finally:
        process.terminate()
        process.wait(30)


def _queues(workers: dict[str, Any]) -> bool:
    """Whether a worker has answered which queues it serves: that needs an answer to `inspect`."""
    return any(each.get("active_queues") for each in workers.values())


# Workers of earlier versions hold messages under kombu's names.


def _entry(client: redis.Redis, queue: str, age_s: float, exchange: str = "") -> str:
    """A held message as version b89d500 writes it, and as kombu 5.7 does; renewed `age_s` seconds ago."""
    tag = str(uuid.uuid4())
    raw = {"body": "", "headers": {}, "properties": {"delivery_tag": tag, "priority": 4}}
    client.hset(OLD_UNACKED, tag, f'[{json.dumps(raw)},"{exchange}","{queue}"]')
    client.zadd(OLD_UNACKED_INDEX, {tag: client.time()[0] - age_s})  # type: ignore[index]
    return tag


@pytest.fixture
def store(valkey: ValkeyProcess) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.url) as client:
        client.flushdb()
        yield client


def _adoption(lease_s: float) -> Adoption:
    return Adoption(Layout(UNACKED, UNACKED_INDEX, UNDECODABLE, PARKED, "", tuple(range(10))), lease_s)


def test_only_what_is_ours_is_adopted_and_only_after_the_earlier_lease(store: redis.Redis) -> None:
    """Version b89d500's default lease was 30 s, whatever ours is."""
    ours = _entry(store, "smallcat.a@b", 31)
    _entry(store, "smallcat.a@b", 25)
    for queue, exchange in (("celery", ""), ("mysmallcat.a", ""), ("x", "smallcat.x"), ("smallcat", "")):
        _entry(store, queue, 40, exchange)
    store.zadd(OLD_UNACKED_INDEX, {"an index without an entry": 1})
    store.zadd(OLD_UNACKED_INDEX, {"unreadable": 1})
    store.hset(OLD_UNACKED, "unreadable", b"\xff")
    assert [tag.decode() for tag, _, _ in _adoption(1).due(store)] == [ours]
    assert _adoption(2 * LEASE_S).due(store) == []


def test_many_messages_of_a_neighbour_hide_none_of_ours(
    store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("worker.broker.adoption.monotonic", lambda: clock[0])
    for _ in range(AT_ONCE + 1):
        _entry(store, "celery", 3_600)
    ours = _entry(store, "smallcat.a", 31)
    adoption = _adoption(1)
    assert adoption.due(store) == []
    clock[0] += LEASE_S / 4
    assert [tag.decode() for tag, _, _ in adoption.due(store)] == [ours]


def test_after_an_outage_earlier_workers_renew_first(
    store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("worker.broker.adoption.monotonic", lambda: clock[0])
    adoption = _adoption(1)
    adoption.due(store)
    _entry(store, "smallcat.a", 100)
    found = []
    clock[0] += 2 * LEASE_S  # Redis was away.
    for _ in range(3):
        found.append(len(adoption.due(store)))
        clock[0] += LEASE_S / 4
    assert found == [0, 0, 1]


def test_a_worker_runs_what_an_earlier_one_left(ground: Ground) -> None:
    """The neighbour's messages beside it stay where they are."""
    with ground.redis as client:
        with ground.holding() as gate:
            [job] = ground.submit(1, gate)
            ground.journal.wait_for("start", [job])
            [(tag, entry)] = client.hgetall(UNACKED).items()  # type: ignore[union-attr]
        oracle.settled(ground)
        theirs = _entry(client, "celery", 3_600)
        client.hset(OLD_UNACKED, tag, entry)
        client.zadd(OLD_UNACKED_INDEX, {tag: 1})
        wait_until("adopted", lambda: client.hkeys(OLD_UNACKED) == [theirs], 30)
        wait_until("run", lambda: ground.journal.count("take")[job] == 2)
        client.delete(OLD_UNACKED, OLD_UNACKED_INDEX)
    oracle.settled(ground)


#: The last version whose transport used kombu's names.
EARLIER = "b89d500"


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The tree of that version."""
    archive = tmp_path / "earlier.tar"
    made = subprocess.run(
        ["git", "archive", "--output", str(archive), EARLIER], cwd=ROOT, capture_output=True, timeout=30
    )
    if made.returncode != 0:
        pytest.skip(f"there is no git, or no {EARLIER} in its history")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "earlier", filter="data")
    return tmp_path / "earlier"


@pytest.mark.services
def test_beside_a_worker_of_an_earlier_version(
    new_stack: Callable[..., Stack], tmp_path: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither restores what the other works on; what is left of the earlier one is run after its lease."""
    ground = Ground(new_stack(workers=0), tmp_path)
    ground.use(monkeypatch)

    class EarlierWorker(FaultWorker):
        def _argv(self) -> list[str]:
            return ["/usr/bin/env", "-C", str(earlier), *super()._argv()]

    with monkeypatch.context() as patch:
        patch.setattr("tests.faults.harness.FaultWorker", EarlierWorker)
        old = ground.worker(settings={"PYTHONPATH": str(earlier)})
    with ground.redis as client, ground.holding() as hold:
        by_old = ground.submit(3, hold)
        ground.journal.wait_for("start", by_old)
        assert client.hlen(OLD_UNACKED) >= 3
        ground.worker()
        ground.journal.wait_for("put", ground.submit(20))
        scores: set[object] = set()

        def is_renewed_often() -> bool:
            scores.update(score for _, score in client.zrange(OLD_UNACKED_INDEX, 0, -1, withscores=True))
            return len(scores) > 3 * 8  # Two leases.

        wait_until("renewed", is_renewed_often)
        assert max(ground.journal.count("start").values()) == 1
        old.kill()
        wait_until("run again", lambda: all(ground.journal.count("start")[job] == 2 for job in by_old), 60)
    oracle.settle(ground)
