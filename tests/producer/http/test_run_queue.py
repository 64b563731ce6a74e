"""A run stays with the queue that it was accepted for, whatever folder its server was given."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from redis.client import Redis

from deploy.embedded.servers import ValkeyProcess
from deploy.embedded.stack import Stack
from producer.http import run_folder, run_queue, run_store
from producer.http.run_store import RunStore
from tests.producer.http.conftest import NOBODYS, Api, fast_worker
from tests.producer.http.test_runs import finished, lines_of, upload
from worker.contract.settings import ServerSettings
from worker.state.redis_client import connect

EARLIER = Path(__file__).parents[2] / "earlier_version" / "http_runs"
FINISHED, BEGUN, WAITING = (
    "a0844dd7482947e4c67dec75fc9ae160",
    "a0844dd7a20df3dfcdefa3111591b0da",
    "a0844dd7000000000000000000000001",
)
DAY_S = 86_400.0


def runs_of(stack: Stack) -> Path:
    assert stack.http is not None
    return stack.http.folder / "runs"


def api_of(stack: Stack) -> Api:
    assert stack.http is not None
    return Api(stack, stack.http.url, stack.http.key)


def listed(api: Api) -> list[str]:
    return [each["run"] for each in api.call("GET", "/v1/runs").json["runs"]]


def client_of(stack: Stack) -> Redis:
    return connect(stack.valkey.url, 2)


# Two queues


@pytest.mark.timeout(120)
def test_servers_of_two_queues_share_a_folder_and_no_run(new_stack: Callable[..., Stack]) -> None:
    """Keys of one name and equal files make runs of one name."""
    stacks = [new_stack(workers=0, http=True) for _ in range(2)]
    first, second = map(api_of, stacks)
    assert stacks[1].http is not None
    variables = stacks[1].http._variables
    stacks[1].http._variables = lambda: {**variables(), "SMALLCAT_HTTP_DATA_DIR": str(runs_of(stacks[0]))}
    stacks[1].http.restart()
    query = f"model={NOBODYS}&seed_start=1"
    of_first = upload(first, b"a cat of the first queue\n", query).json
    of_both = [upload(api, b"a cat of both queues\n", query).json for api in (first, second)]
    assert of_both[0]["run"] == of_both[1]["run"]
    for _ in range(2):
        assert listed(first) == sorted((of_first["run"], of_both[0]["run"]))
        assert listed(second) == [of_both[1]["run"]]
        assert second.call("GET", of_first["links"]["self"]).status == 404
        for stack in stacks:
            assert stack.http is not None
            stack.http.restart()
    first.call("DELETE", of_both[0]["links"]["self"])
    assert finished(first, of_both[0])["state"] == "cancelled"
    assert second.call("GET", of_both[1]["links"]["self"]).json["state"] != "cancelled"
    with client_of(stacks[1]) as redis:
        assert not run_queue.knows(redis, of_first["run"])


@pytest.mark.timeout(120)
def test_a_queue_keeps_its_runs_at_another_address(new_stack: Callable[..., Stack]) -> None:
    stack = new_stack(workers=0, http=True)
    assert stack.http is not None
    api = api_of(stack)
    run = upload(api, b"a cat that moves\n", "model=fast&revision=" + "f" * 40).json
    variables = stack.http._variables
    elsewhere = stack.valkey.url.replace("127.0.0.1", "localhost")
    assert elsewhere != stack.valkey.url
    stack.http._variables = lambda: {**variables(), "REDIS_URL": elsewhere}
    stack.http.restart()
    worker = fast_worker(stack)
    try:
        assert finished(api, run)["done"] == 1
        assert len(lines_of(api.call("GET", run["links"]["manifest"]))) == 1
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.timeout(120)
def test_a_server_that_starts_while_redis_is_away_finds_its_runs_when_it_is_back(
    new_stack: Callable[..., Stack],
) -> None:
    stack = new_stack(workers=0, http=True)
    assert stack.http is not None
    api = api_of(stack)
    run = upload(api, b"a cat that waits for Redis\n", f"model={NOBODYS}").json
    stack.http.stop()
    stack.valkey.kill()
    stack.http.start()
    assert api.call("GET", "/v1/runs").status == 503
    stack.valkey.start()
    deadline_s = time.monotonic() + 30
    while (answer := api.call("GET", "/v1/runs")).status == 503:
        assert time.monotonic() < deadline_s, answer.body
        time.sleep(0.05)
    assert listed(api) == [run["run"]]


def test_a_queues_name_is_drawn_once(valkey: ValkeyProcess) -> None:
    with connect(valkey.url, 1) as redis:
        redis.flushdb()
        name = run_queue.name_of(redis)
        assert run_queue.name_of(redis) == name
        redis.flushdb()
        assert run_queue.name_of(redis) != name


def test_the_log_says_how_a_queue_that_lost_its_name_gets_its_runs_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run_queue.folder_of(tmp_path, "0" * 16)
    RunStore(folder, DAY_S)
    assert caplog.text == ""
    assert run_queue.folder_of(tmp_path, "0" * 16) == folder
    assert caplog.text == ""
    run_queue.folder_of(tmp_path, "1" * 16)
    assert f"it has begun queue-{'1' * 16}" in caplog.text
    assert f"such as those in queue-{'0' * 16}" in caplog.text


def test_a_folder_without_marker_that_has_queues_is_taken(tmp_path: Path) -> None:
    (tmp_path / f"queue-{'0' * 16}").mkdir()
    run_folder.claim(tmp_path)
    assert (tmp_path / run_folder.MARKER).is_file()


# Runs of earlier versions


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder as an earlier version left it, with a run that is finished, a begun one and a waiting one."""
    folder = tmp_path / "data"
    shutil.copytree(EARLIER, folder)
    for each in folder.iterdir():
        os.utime(each)
    return folder


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were fed; in place of feeding a run to Redis."""
    found: list[str] = []

    def feed(store: RunStore, run: str, folder: Path, slot: object) -> None:
        found.append(run)
        (folder / "manifest.jsonl").write_text("{}\n")

    monkeypatch.setattr(RunStore, "_feed_once", feed)
    monkeypatch.setattr(run_store, "_AGAIN_S", 0.02)
    return found


def opened(data: Path, queue: str, known: Sequence[str]) -> RunStore:
    """The runs of a queue whose Redis knows some."""
    folder = run_queue.folder_of(data, queue * 16)
    store = RunStore(folder, DAY_S, run_queue.EarlierRuns(data, folder, DAY_S, known.__contains__).take_over)
    store.resume()
    return store


def until_all_are_over(store: RunStore, runs: Sequence[str]) -> None:
    for _ in range(1_000):
        if all(map(store.manifest, runs)) and not store._begun:
            store.close()
            return
        time.sleep(0.005)
    raise AssertionError


def test_what_an_earlier_version_left_goes_on_and_stays_readable(data: Path, fed: list[str]) -> None:
    store = opened(data, "0", [FINISHED, BEGUN])
    assert store.names("a0844dd7") == sorted((FINISHED, BEGUN, WAITING))
    manifest = store.manifest(FINISHED)
    assert manifest is not None
    assert [json.loads(line)["prompt"] for line in manifest.read_text().splitlines()] == ["a cat", "a dog"]
    until_all_are_over(store, (FINISHED, BEGUN, WAITING))
    assert sorted(fed) == sorted((BEGUN, WAITING))


def test_what_an_earlier_version_begun_for_another_queue_is_left_to_that(
    data: Path, fed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    other = opened(data, "0", [])
    assert other.names("") == sorted((run_folder.MARKER, WAITING))
    assert "2 runs of an earlier version" in caplog.text
    assert "are unknown to this server's Redis" in caplog.text
    own = opened(data, "1", [FINISHED, BEGUN])
    assert own.names("a0") == sorted((FINISHED, BEGUN))
    until_all_are_over(other, [WAITING])
    until_all_are_over(own, [FINISHED, BEGUN])
    assert sorted(fed) == sorted((WAITING, BEGUN))


def test_a_run_that_an_earlier_server_feeds_is_taken_over_when_that_has_ended(
    data: Path, fed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_store, "_LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(RunStore, "delete_forgotten", lambda self: None)
    with run_folder.locked(data / BEGUN / "lock"):
        store = opened(data, "0", [FINISHED, BEGUN])
        assert not store.knows(BEGUN)
    until_all_are_over(store, [BEGUN])


def test_what_an_earlier_version_left_and_has_expired_is_deleted(data: Path, fed: list[str]) -> None:
    os.utime(data / FINISHED, (0, 0))
    (data / ".upload-x").mkdir()
    store = opened(data, "0", [BEGUN])
    until_all_are_over(store, (BEGUN, WAITING))
    assert {each.name for each in data.iterdir()} == {run_folder.MARKER, f"queue-{'0' * 16}"}


def test_without_a_named_folder_it_is_the_one_of_earlier_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_folder.chosen(ServerSettings()) == tmp_path / f"smallcat-http-{os.getuid()}"
    assert run_folder.chosen(ServerSettings(http_data_dir="/data")) == Path("/data")
