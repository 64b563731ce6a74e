"""`await handle`: against a real Redis, with many waiters, cancelled ones, and a Redis that goes away."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import pytest
from redis import Redis

from deploy.embedded.servers import ValkeyProcess
from deploy.embedded.stack import Stack
from producer import JobHandle, submit_job
from producer.session import session
from tests.worker.engine.fake_runner import SERVED
from worker.contract.errors import (
    JobCancelledError,
    NotFiniteError,
    QueueError,
    SettingsError,
    UnknownJobError,
)
from worker.contract.record import JobRecord, State
from worker.state.fleet import Fleet, WorkerInfo
from worker.state.redis_client import connect

WORKER = WorkerInfo(
    name="w1", served=SERVED, started_at=1.0, device="CPU", attention="sdpa", max_rows=8, versions={}
)


@pytest.fixture(autouse=True)
def redis_url(valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", valkey.url)
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "1")


@pytest.fixture
def client(valkey: ValkeyProcess) -> Iterator[Redis]:
    with connect(valkey.url, retry_s=2) as client:
        yield client


@pytest.fixture
def fleet(client: Redis) -> Fleet:
    """With one worker up."""
    fleet = Fleet(client, 1_000)
    fleet.announce(WORKER)
    return fleet


def finish(handle: JobHandle) -> None:
    """What a worker does."""
    record = handle.record()
    picture = {"state": State.DONE, "uri": f"s3://bucket/{handle.id}.png", "worker": "w1"}
    assert session().records.done(JobRecord.model_validate(dict(record) | picture))


def fail(handle: JobHandle) -> None:
    records = session().records
    records.claim(handle.record().job, "m1", worker="w1", lease_s=30, max_attempts=3, queue="q")
    assert records.failed(handle.id, "m1", NotFiniteError("NaN at step 3"))


def subscribers(client: Redis, handle: JobHandle) -> int:
    [(_, count)] = client.pubsub_numsub(f"smallcat:job:{handle.id}")
    return int(count)


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until it holds; the test's own time limit ends it otherwise."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def nothing_is_left() -> None:
    """No task but this one, and no open transport, soon."""
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run it, with what asyncio and Python would only log as errors."""
    complaints: list[object] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        await test
        await nothing_is_left()
        gc.collect()

    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        asyncio.run(watched())
    assert complaints == []


def test_a_job_is_awaited_and_other_tasks_run_meanwhile(fleet: Fleet, client: Redis) -> None:
    async def test() -> None:
        handle = submit_job("a small cat", seed=3)
        waiting = asyncio.ensure_future(handle)
        await until(lambda: subscribers(client, handle) == 1)
        assert not waiting.done()
        finish(handle)
        result = await waiting
        assert (result.id, result.state, result.seed) == (handle.id, State.DONE, 3)

    run(test())


def test_a_job_that_is_done_is_there_at_once(fleet: Fleet) -> None:
    async def test() -> None:
        handle = submit_job("a small cat", seed=3)
        finish(handle)
        assert (await handle).uri == f"s3://bucket/{handle.id}.png"
        # As for `result`, no time is enough for what is there.
        assert (await handle.aresult(timeout=0)).id == handle.id

    run(test())


def test_a_failed_job_raises_its_own_error(fleet: Fleet) -> None:
    async def test() -> None:
        handle = submit_job("a small cat", seed=3)
        fail(handle)
        with pytest.raises(NotFiniteError, match="NaN at step 3"):
            await handle

    run(test())


def test_a_cancelled_job_raises(fleet: Fleet, client: Redis) -> None:
    async def test() -> None:
        handle = submit_job("a small cat", seed=3)
        waiting = asyncio.ensure_future(handle)
        await until(lambda: subscribers(client, handle) == 1)
        handle.cancel()
        with pytest.raises(JobCancelledError):
            await waiting

    run(test())


@pytest.mark.parametrize("job_id", ["0" * 32, "nonsense", ""])
def test_an_unknown_job_is_unknown(job_id: str) -> None:
    async def test() -> None:
        with pytest.raises(UnknownJobError):
            await JobHandle(job_id)

    run(test())


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_waiting_too_long_is_a_timeout_and_the_job_goes_on(fleet: Fleet, timeout: float) -> None:
    async def test() -> None:
        handle = submit_job("a small cat", seed=3)
        with pytest.raises(TimeoutError, match=rf"is still queued after {timeout:g} s"):
            await handle.aresult(timeout=timeout)
        assert handle.state() is State.QUEUED

    run(test())


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(timeout: float) -> None:
    async def test() -> None:
        with pytest.raises(ValueError, match="it must be None or seconds >= 0"):
            await JobHandle("x").aresult(timeout)

    run(test())


def test_a_misspelt_setting_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMOUT_S", "1")

    async def test() -> None:
        with pytest.raises(SettingsError):
            await JobHandle("x")

    run(test())


def test_two_hundred_waiters_share_two_connections_and_no_thread(fleet: Fleet, client: Redis) -> None:
    async def test() -> None:
        handles = [submit_job("a small cat", seed=seed) for seed in range(200)]
        connections, threads = connected(client), threading.active_count()
        waiting = [asyncio.ensure_future(handle) for handle in handles]
        await until(lambda: all(subscribers(client, handle) == 1 for handle in (handles[0], handles[-1])))
        assert connected(client) <= connections + 2
        assert threading.active_count() == threads
        for handle in reversed(handles):
            finish(handle)
        results = await asyncio.gather(*waiting)
        assert [result.id for result in results] == [handle.id for handle in handles]

    run(test())


def connected(client: Redis) -> int:
    return int(client.info("clients")["connected_clients"])


def test_one_job_may_be_awaited_by_many(fleet: Fleet, client: Redis) -> None:
    async def test() -> None:
        handle = submit_job("a small cat", seed=3)
        first = asyncio.ensure_future(handle)
        await until(lambda: subscribers(client, handle) == 1)
        others = [asyncio.create_task(JobHandle(handle.id).aresult(5)) for _ in range(5)]
        others[0].cancel()
        await asyncio.sleep(0)
        finish(handle)
        results = await asyncio.gather(first, *others[1:])
        assert {result.id for result in results} == {handle.id}
        assert others[0].cancelled()

    run(test())


def test_a_cancelled_wait_leaves_the_job_alone_and_nothing_behind(fleet: Fleet, client: Redis) -> None:
    async def test() -> None:
        handles = [submit_job("a small cat", seed=seed) for seed in range(20)]
        connections, threads = connected(client), threading.active_count()
        waiting = [asyncio.create_task(handle.aresult()) for handle in handles]
        await until(lambda: subscribers(client, handles[-1]) == 1)
        for task in waiting:
            task.cancel()
        assert all(isinstance(each, asyncio.CancelledError) for each in await ended(waiting))
        await nothing_is_left()
        await until(lambda: connected(client) == connections)
        assert threading.active_count() == threads
        assert {handle.state() for handle in handles} == {State.QUEUED}

    run(test())


async def ended(tasks: list[asyncio.Task[Any]]) -> list[object]:
    return list(await asyncio.gather(*tasks, return_exceptions=True))


def test_a_wait_that_is_cancelled_at_once_leaves_nothing_behind(fleet: Fleet, client: Redis) -> None:
    async def test() -> None:
        handle = submit_job("a small cat", seed=3)
        for turns in range(8):
            waiting = asyncio.create_task(handle.aresult())
            for _ in range(turns):
                await asyncio.sleep(0)
            waiting.cancel()
            await ended([waiting])
            await nothing_is_left()
        await until(lambda: subscribers(client, handle) == 0)

    run(test())


def test_a_job_that_nobody_waits_for_any_more_is_unsubscribed(fleet: Fleet, client: Redis) -> None:
    """While others are still waited for: a web service never comes to rest."""

    async def test() -> None:
        one, other = submit_job("a small cat", seed=1), submit_job("a small cat", seed=2)
        waiting = asyncio.ensure_future(one)
        given_up = asyncio.create_task(other.aresult())
        await until(lambda: subscribers(client, other) == 1)
        given_up.cancel()
        await until(lambda: subscribers(client, other) == 0)
        again = asyncio.ensure_future(other)
        await until(lambda: subscribers(client, other) == 1)
        for handle in (one, other):
            finish(handle)
        assert [(await each).id for each in (waiting, again)] == [one.id, other.id]

    run(test())


def test_each_event_loop_has_its_own_connections(fleet: Fleet, client: Redis) -> None:
    async def wait(handle: JobHandle) -> str:
        return (await handle).id

    handles = [submit_job("a small cat", seed=seed) for seed in range(3)]
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda handle=handle: found.append(asyncio.run(wait(handle))))  # type: ignore[misc]
        for handle in handles
    ]
    for thread in threads:
        thread.start()
    for handle in handles:
        while subscribers(client, handle) == 0:
            time.sleep(0.001)
        finish(handle)
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(handle.id for handle in handles)


def test_an_event_that_is_lost_delays_the_result_only(
    fleet: Fleet, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.state.awaiting.RECHECK_S", 0.05)

    async def test() -> None:
        handle = submit_job("a small cat", seed=3)
        waiting = asyncio.ensure_future(handle)
        await until(lambda: subscribers(client, handle) == 1)
        # Without the script, which would publish it.
        client.hset(f"smallcat:job:{handle.id}", mapping={"state": "done", "uri": "s3://bucket/x.png"})
        assert (await waiting).uri == "s3://bucket/x.png"

    run(test())


def test_connections_that_are_lost_are_made_again(fleet: Fleet, client: Redis) -> None:
    async def test() -> None:
        handle = submit_job("a small cat", seed=3)
        waiting = asyncio.ensure_future(handle)
        for _ in range(3):
            await until(lambda: subscribers(client, handle) == 1)
            client.client_kill_filter(_type="pubsub")
            client.client_kill_filter(_type="normal", skipme=True)
        await until(lambda: subscribers(client, handle) == 1)
        assert not waiting.done()
        finish(handle)
        assert (await waiting).id == handle.id

    run(test())


def test_a_redis_that_comes_back_in_time_ends_no_wait(
    new_stack: Callable[..., Stack], monkeypatch: pytest.MonkeyPatch
) -> None:
    valkey = new_stack(workers=0).valkey
    monkeypatch.setenv("REDIS_URL", valkey.url)
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "30")

    async def test() -> None:
        handle = submit_job("a small cat", seed=3)
        waiting = asyncio.ensure_future(handle)
        with connect(valkey.url, retry_s=2) as client:
            await until(lambda: subscribers(client, handle) == 1)
        valkey.kill()
        await asyncio.to_thread(valkey.start)
        assert not waiting.done()
        with connect(valkey.url, retry_s=2) as client:
            await until(lambda: subscribers(client, handle) == 1)
        finish(handle)
        assert (await waiting).id == handle.id

    run(test())


def test_a_redis_that_stays_away_is_an_error_in_time(
    new_stack: Callable[..., Stack], monkeypatch: pytest.MonkeyPatch
) -> None:
    valkey = new_stack(workers=0).valkey
    monkeypatch.setenv("REDIS_URL", valkey.url)

    async def test() -> None:
        handle = submit_job("a small cat", seed=3)
        waiting = asyncio.ensure_future(handle)
        with connect(valkey.url, retry_s=2) as client:
            await until(lambda: subscribers(client, handle) == 1)
        valkey.kill()
        with pytest.raises(QueueError, match="is out of reach"):
            async with asyncio.timeout(10):
                await waiting

    run(test())


def test_a_wrong_password_is_an_error_at_once(valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", valkey.url.replace(valkey.password, "hunter2"))
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "600")

    async def test() -> None:
        with pytest.raises(QueueError, match="refuses the password") as caught:
            await JobHandle("0" * 32)
        assert "hunter2" not in str(caught.value)

    run(test())


def test_a_job_that_nobody_serves_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.state.awaiting.RECHECK_S", 0.01)

    async def test() -> None:
        handle = submit_job("a small cat", model="a/model")
        expected = 'No worker serves the model "a/model"'
        with pytest.warns(UserWarning, match=expected) as caught, pytest.raises(TimeoutError):
            await handle.aresult(0.2)
        assert len(caught) == 1
        assert caught[0].filename == __file__

    run(test())


def test_a_served_job_warns_of_nothing(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.state.awaiting.RECHECK_S", 0.01)

    async def test() -> None:
        handle = submit_job("a small cat")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(TimeoutError):
                await handle.aresult(0.2)

    run(test())


def test_a_handle_is_awaitable_by_its_type(fleet: Fleet) -> None:
    handle: Awaitable[object] = submit_job("a small cat", seed=3)
    assert isinstance(handle, Awaitable)
