"""Calls of several threads that go to Redis together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from redis import Redis

from deploy.embedded.servers import ValkeyProcess
from tests.faults.harness import wait_until
from worker.state.redis_client import connect
from worker.state.shared_scripts import Script
from worker.state.together import Together

#: Refuses what is longer than a word.
ECHO = "if #ARGV[1] > 20 then return redis.error_reply('ERR too long') end return KEYS[1] .. ARGV[1]"


@pytest.fixture
def client(valkey: ValkeyProcess) -> Iterator[Redis]:
    with connect(valkey.url, retry_s=2) as client:
        yield client


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(200) as threads:
        yield threads


class Bunch:
    """Calls that come while another one is on its way."""

    def __init__(self, client: Redis, threads: ThreadPoolExecutor) -> None:
        self.together = Together(client)
        self._threads = threads
        self._goes_on = threading.Event()
        digest = client.script_load("return 1")
        self.first = threads.submit(self.together, digest, [], [], self._goes_on.wait)
        wait_until("the first is on its way", lambda: self.together._is_sending)

    def add(self, run: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run something that waits then."""
        waiting = len(self.together._waiting)
        future = self._threads.submit(run, *args)
        wait_until("it waits", lambda: len(self.together._waiting) > waiting)
        return future

    def go_on(self) -> None:
        """Let the first one end."""
        self._goes_on.set()


def round_trips(client: Redis, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of commands that pipelines send from now on."""
    sent: list[int] = []
    pipeline = client.pipeline

    def counted(**options: Any) -> Any:
        made = pipeline(**options)
        execute = made.execute
        made.execute = lambda **options: (sent.append(len(made.command_stack)), execute(**options))[1]  # type: ignore[method-assign, func-returns-value]
        return made

    monkeypatch.setattr(client, "pipeline", counted)
    return sent


def test_calls_that_wait_at_the_same_time_share_a_round_trip_and_each_has_its_own_answer(
    client: Redis, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    bunch = Bunch(client, threads)
    script = Script(client, ECHO, bunch.together)
    client.script_load(ECHO)
    sent = round_trips(client, monkeypatch)
    found = [bunch.add(script, ["k"], [number]) for number in range(Together.MOST + 3)]
    bunch.go_on()
    assert [each.result(10) for each in found] == [f"k{number}" for number in range(Together.MOST + 3)]
    assert sent == [Together.MOST, 3]
    # Nothing waits: the next one goes by itself.
    assert script(["k"], ["next"]) == "knext"
    assert len(sent) == 2


def test_one_that_is_refused_has_its_own_error_and_disturbs_no_other(
    client: Redis, threads: ThreadPoolExecutor
) -> None:
    bunch = Bunch(client, threads)
    script = Script(client, ECHO, bunch.together)
    client.script_load(ECHO)
    words = ["a", "much longer than a word", "b"]
    found = [bunch.add(script, ["k"], [word]) for word in words]
    bunch.go_on()
    assert found[0].result(10) == "ka"
    assert "too long" in str(found[1].exception(10))
    assert found[2].result(10) == "kb"


def test_a_redis_that_has_forgotten_the_scripts_gets_them_again(
    client: Redis, threads: ThreadPoolExecutor
) -> None:
    bunch = Bunch(client, threads)
    client.script_flush()
    script = Script(client, ECHO, bunch.together)
    found = [bunch.add(script, ["k"], [number]) for number in range(3)]
    bunch.go_on()
    assert [each.result(10) for each in found] == ["k0", "k1", "k2"]


def test_after_one_that_fails_the_others_go_on(client: Redis, threads: ThreadPoolExecutor) -> None:
    bunch = Bunch(client, threads)

    def fail() -> None:
        raise OSError("gone")

    def fails() -> Any:
        return bunch.together("no digest", [], [], fail)

    script = Script(client, ECHO, bunch.together)
    failing = [bunch.add(fails) for _ in range(2)]
    last = bunch.add(script, ["k"], ["x"])
    bunch.go_on()
    assert bunch.first.result(10)
    assert all(isinstance(each.exception(10), OSError) for each in failing)
    assert last.result(10) == "kx"
    assert not bunch.together._is_sending
