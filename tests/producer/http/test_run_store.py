"""The folder of runs: what a server deletes in it, and what becomes of runs that fail."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.embedded.servers import ValkeyProcess
from producer.http import run_folder, run_store
from producer.http.run_slots import Slot
from producer.http.run_store import RunStore, Upload
from worker.contract.choices import PromptSyntax
from worker.contract.errors import PromptFileError, SettingsError
from worker.state.keys import HTTP_FORGOTTEN
from worker.state.redis_client import connect

DAY_S = 86_400.0
SECRET = "a very private prompt"


@pytest.fixture(autouse=True)
def threads_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each run's thread ends before what stands in for Redis is taken away: then it would feed a real one."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("run "):
            thread.join(10)


@pytest.fixture
def feeds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Sets what is done in place of feeding a run to Redis. At the end all stores have ended."""
    monkeypatch.setattr(run_store, "_AGAIN_S", 0.02)

    def feed(function: Any) -> None:
        monkeypatch.setattr(RunStore, "_feed_once", function)

    feed(lambda self, run, folder, slot: (folder / "manifest.jsonl").write_text("done"))
    stores: list[RunStore] = []
    make = RunStore.__init__

    def remember(store: RunStore, folder: str, ttl_s: float) -> None:
        stores.append(store)
        make(store, folder, ttl_s)

    monkeypatch.setattr(RunStore, "__init__", remember)
    yield feed
    # A store that goes on would feed its runs to the Redis of a later test.
    for store in stores:
        store.close()
        until(lambda store=store: not store._begun)


def send(store: RunStore, text: str = "a cat\n") -> str:
    """Upload a file. Returns its run."""
    with store.uploading() as folder:
        file = folder / "prompts.txt"
        file.write_text(text)
        return store.take(folder, file, Upload("prompts.txt"), "0" * 8)


def until(condition: Callable[[], Any]) -> None:
    for _ in range(1_000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError


@pytest.fixture(autouse=True)
def _ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No thread of a store asks Redis after its test."""
    made: list[RunStore] = []

    def resume(store: RunStore) -> None:
        made.append(store)
        resume_it(store)

    resume_it = RunStore.resume
    monkeypatch.setattr(RunStore, "resume", resume)
    yield
    for store in made:
        store.close()


def tree(folder: Path) -> set[str]:
    return {str(each.relative_to(folder)) for each in folder.rglob("*")}


# Whose the folder is


def test_a_folder_with_files_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(SettingsError, match="such as 'thesis': set SMALLCAT_HTTP_DATA_DIR"):
        RunStore(tmp_path, DAY_S)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("is_there", [True, False])
def test_a_symbolic_link_is_refused(tmp_path: Path, is_there: bool) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    if is_there:
        target.mkdir()
    link.symlink_to(target)
    with pytest.raises((SettingsError, FileExistsError), match=r"symbolic link|File exists"):
        RunStore(link, DAY_S)
    assert not is_there or not list(target.iterdir())


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(SettingsError, match="another user's: set SMALLCAT_HTTP_DATA_DIR"):
        RunStore(tmp_path, DAY_S)


def test_a_folder_of_an_earlier_version_is_taken(tmp_path: Path) -> None:
    """It has runs and broken uploads, and no marker; a volume has a folder of its file system's."""
    (tmp_path / "lost+found").mkdir()
    for name, file in (("0" * 32, "run.json"), (".a_b1c2d3", "prompts.txt.gz")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    RunStore(tmp_path, DAY_S)
    assert (tmp_path / run_folder.MARKER).is_file()


# What is deleted


def test_only_uploads_and_runs_are_deleted(tmp_path: Path, feeds: Any) -> None:
    RunStore(tmp_path, DAY_S)
    stay = ("thesis", ".git", ".abcdefgh", "lost+found", "0" * 31, "g" * 32, "1" * 32)
    for name in (*stay, ".upload-x", "0" * 32):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ("0" * 32) / "run.json").write_text("{}")
    (tmp_path / "thesis" / "run.json").write_text("{}")
    (tmp_path / ".upload-file").write_text("x")
    (tmp_path / ".upload-link").symlink_to(tmp_path / "thesis")
    for each in tmp_path.iterdir():
        os.utime(each, (0, 0), follow_symlinks=False)
    RunStore(tmp_path, DAY_S).resume()
    left = {each.name for each in tmp_path.iterdir()}
    assert left == {*stay, run_folder.MARKER, ".upload-file", ".upload-link"}
    assert (tmp_path / "thesis" / "file").exists()


def test_a_second_server_leaves_what_the_first_receives_and_feeds(tmp_path: Path, feeds: Any) -> None:
    begun, may_end, counts = threading.Event(), threading.Event(), []

    def feed(self: RunStore, run: str, folder: Path, slot: Any) -> None:
        counts.append(run)
        begun.set()
        may_end.wait(10)
        (folder / "manifest.jsonl").write_text("done")

    feeds(feed)
    first, second = RunStore(tmp_path, DAY_S), RunStore(tmp_path, 0.0)
    run = send(first)
    assert begun.wait(10)
    with first.uploading() as folder:
        second.resume()
        assert folder.is_dir()
        assert first.knows(run)
    may_end.set()
    until(lambda: first.manifest(run))
    until(lambda: not first._begun)
    assert counts == [run]
    second.resume()
    assert {each.name for each in tmp_path.iterdir()} == {run_folder.MARKER}


def test_a_run_goes_on_at_the_second_server_when_the_first_has_ended(tmp_path: Path, feeds: Any) -> None:
    first, second = RunStore(tmp_path, DAY_S), RunStore(tmp_path, DAY_S)
    with first.uploading() as folder:
        file = folder / "prompts.txt"
        file.write_text("a cat\n")
        first.close()  # It feeds no more.
        run = first.take(folder, file, Upload("prompts.txt"), "0" * 8)
    with run_folder.locked(tmp_path / run / "lock"):
        second.resume()
        assert second.manifest(run) is None
    until(lambda: second.manifest(run))


def test_an_upload_that_is_broken_off_leaves_nothing(tmp_path: Path) -> None:
    store = RunStore(tmp_path, DAY_S)
    with store.uploading() as folder:
        (folder / "prompts.txt").write_text("a cat")
    assert {each.name for each in tmp_path.iterdir()} == {run_folder.MARKER}


# Runs that fail


def test_a_run_that_failed_is_begun_again_by_the_same_upload(tmp_path: Path, feeds: Any) -> None:
    fed = RunStore._feed_once

    def fail(self: RunStore, run: str, folder: Path, slot: Any) -> None:
        raise PromptFileError(f"{folder}/prompts.txt is away.")

    feeds(fail)
    store = RunStore(tmp_path, DAY_S)
    run = send(store)
    until(lambda: store.error(run))
    assert store.error(run) == "prompts.txt is away."
    feeds(fed)
    assert send(store) == run
    until(lambda: store.manifest(run))
    assert store.error(run) == ""


@pytest.mark.parametrize("text", ["", '{"name": "pro', "[]", "{}", "null", '{"file": "prompts.txt"}', "\x00"])
def test_a_broken_description_of_a_run_is_an_error_of_that_run(tmp_path: Path, text: str) -> None:
    run = "0" * 32
    store = RunStore(tmp_path, DAY_S)
    (tmp_path / run).mkdir()
    (tmp_path / run / "run.json").write_text(text)
    store.resume()
    until(lambda: store.error(run))
    assert store.error(run).endswith("run.json, cannot be read: upload the prompt file again.")
    until(lambda: not store._begun)


def test_a_fault_ends_the_run_and_is_logged_without_prompts(
    tmp_path: Path, feeds: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: RunStore, run: str, folder: Path, slot: Any) -> None:
        raise ZeroDivisionError(SECRET)

    feeds(fail)
    store = RunStore(tmp_path, DAY_S)
    with caplog.at_level(logging.ERROR, logger="smallcat.http"):
        run = send(store)
        until(lambda: store.error(run) and not store._begun)
    assert "The server has a fault" in store.error(run)
    assert "in fail" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert SECRET not in caplog.text + store.error(run)


def test_a_broken_description_is_replaced_by_the_next_upload(tmp_path: Path, feeds: Any) -> None:
    fed = RunStore._feed_once
    store = RunStore(tmp_path, DAY_S)
    run = send(store)
    until(lambda: store.manifest(run) and not store._begun)
    (tmp_path / run / "manifest.jsonl").unlink()
    whole = (tmp_path / run / "run.json").read_text()
    (tmp_path / run / "run.json").write_text(whole[:20])
    (tmp_path / run / "error.txt").write_text("It cannot be read.")
    feeds(fed)
    assert send(store) == run
    until(lambda: store.manifest(run))
    assert (tmp_path / run / "run.json").read_text() == whole


# Strict


def test_a_strict_run_is_looked_at_in_the_fleets_syntax(
    tmp_path: Path, feeds: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    syntax = PromptSyntax.A1111
    snapshot = SimpleNamespace(resolve=lambda job: job.in_syntax(syntax), meant=lambda job: None)
    fleet = SimpleNamespace(snapshot=lambda: snapshot)
    stand_in = SimpleNamespace(queue_errors=contextlib.nullcontext, fleet=fleet)
    monkeypatch.setattr(run_store, "session", lambda: stand_in)
    store = RunStore(tmp_path / "runs", DAY_S)
    text = "a (cat:1.3)\na <hypernet:foo:1> dog\n"
    with store.uploading() as folder:
        file = folder / "prompts.txt"
        file.write_text(text)
        with pytest.raises(PromptFileError, match=r"nothing was sent:\nprompts\.txt, line 2"):
            store.take(folder, file, Upload("prompts.txt", strict=True), "0" * 8)
    assert store.names("0" * 8) == []
    assert send(store, text) in store.names("0" * 8)


def test_runs_that_were_forgotten_are_deleted_and_do_not_go_on(
    tmp_path: Path, valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", valkey.url)
    store = RunStore(tmp_path, DAY_S)
    folders: dict[str, Path] = {}
    for number, (name, owner, tenant) in enumerate(
        (
            ("acme's", "acme", "acme"),
            ("shared", "shared-x", "acme"),
            ("evil's", "evil", "evil"),
            ("old", "", ""),
        )
    ):
        folders[name] = tmp_path / f"{number:032x}"
        folders[name].mkdir()
        values = dataclasses.asdict(Upload("prompts.txt")) | {"file": "prompts.txt", "owner": owner}
        values["tenant"] = {"name": tenant} if tenant else None
        (folders[name] / "run.json").write_text(json.dumps(values))
    os.utime(folders["old"] / "run.json", (5, 5))
    with connect(valkey.url, 1) as redis:
        redis.hset(HTTP_FORGOTTEN, mapping={"tenant:acme": time.time() + 5, "before": 10})
        with pytest.raises(PromptFileError, match="The run was forgotten"):
            store._feed_once(folders["acme's"].name, folders["acme's"], Slot(store._slots, ""))
        store.delete_forgotten()
        assert [name for name, folder in folders.items() if folder.exists()] == ["evil's"]
        # One that is uploaded since stays.
        redis.hset(HTTP_FORGOTTEN, "tenant:evil", time.time() - 5)
        store.delete_forgotten()
        assert folders["evil's"].exists()
    store.close()
