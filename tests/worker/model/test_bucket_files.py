"""Files of buckets on the disk: fetched once, within a bounded space, whatever other workers do."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from worker.contract.file_index import Kind
from worker.model.beside.bucket_files import STALE_S, BucketFiles
from worker.model.beside.file_kinds import KINDS
from worker.model.beside.file_places import Found
from worker.storage.bucket import StoredObject


class Objects:
    """A bucket in which each object is its own address, 100 bytes; a config is 30. Counts what is read."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def listed(self, address: str) -> Iterator[StoredObject]:
        raise NotImplementedError

    @contextmanager
    def open(self, uri: str) -> Iterator[IO[bytes]]:
        self.opened.append(uri)
        assert self.may_go_on.wait(10)
        yield io.BytesIO(uri.encode().ljust(100)[: 30 if uri.endswith(".json") else 100])


def found(name: str, config: str = "") -> Found:
    uri = f"s3://b/{name}"
    return Found(Kind.LORA, uri, uri, name, None, config and f"s3://b/{config}", 100)


def hash_of(name: str) -> str:
    return hashlib.sha256(f"s3://b/{name}".encode().ljust(100)).hexdigest()


def here(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


def used_at(path: Path, at: float) -> None:
    os.utime(path, (at, at))


def test_jobs_that_want_a_file_at_the_same_time_fetch_it_once(tmp_path: Path) -> None:
    bucket = Objects()
    files = BucketFiles(tmp_path, lambda _: bucket)
    bucket.may_go_on.clear()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(files.fetch, found("x.safetensors"), hash_of("x.safetensors")) for _ in "abc"]
        while not bucket.opened:
            time.sleep(0.001)
        bucket.may_go_on.set()
        assert {each.result() for each in asked} == {tmp_path / f"{hash_of('x.safetensors')}.safetensors"}
    assert bucket.opened == ["s3://b/x.safetensors"]


def test_what_was_used_least_lately_goes_first(tmp_path: Path) -> None:
    bucket = Objects()
    files = BucketFiles(tmp_path, lambda _: bucket, limit=320)
    kept = {}
    for at, name in enumerate(("a", "b", "c")):
        kept[name] = files.fetch(found(name), hash_of(name))
        assert kept[name] is not None
        used_at(kept[name], at + 1)
    # It is used by asking for it.
    assert files.fetch(found("a"), hash_of("a")) == kept["a"]
    assert bucket.opened == ["s3://b/a", "s3://b/b", "s3://b/c"]
    files.fetch(found("d"), hash_of("d"))
    assert here(tmp_path) == {f"{hash_of(name)}.safetensors" for name in "acd"}
    # Another worker's file counts.
    (tmp_path / f"{'e' * 64}.safetensors").write_bytes(bytes(100))
    used_at(tmp_path / f"{'e' * 64}.safetensors", 3)
    files.fetch(found("b"), hash_of("b"))
    assert sum(each.stat().st_size for each in tmp_path.iterdir()) <= 320
    assert f"{'e' * 64}.safetensors" not in here(tmp_path)


def test_a_file_larger_than_all_is_there_alone(tmp_path: Path) -> None:
    files = BucketFiles(tmp_path, lambda _: Objects(), limit=0)
    for name in ("a", "b"):
        assert files.fetch(found(name), hash_of(name)) == tmp_path / f"{hash_of(name)}.safetensors"
    assert here(tmp_path) == {f"{hash_of('b')}.safetensors"}


def test_a_file_with_a_config_comes_and_goes_with_it(tmp_path: Path) -> None:
    bucket = Objects()
    files = BucketFiles(tmp_path / "files", lambda _: bucket, limit=1 << 20)
    adapter = found("cat/adapter_model.safetensors", "cat/adapter_config.json")
    with files.copied(adapter) as path:
        sha256 = KINDS[Kind.LORA].sha256_of(path)
    for _ in range(2):
        kept = files.fetch(adapter, sha256)
        assert kept == tmp_path / "files" / sha256 / "adapter_model.safetensors"
    assert here(tmp_path / "files" / sha256) == {"adapter_model.safetensors", "adapter_config.json"}
    assert len(bucket.opened) == 4
    used_at(tmp_path / "files" / sha256, 1)
    BucketFiles(tmp_path / "files", lambda _: bucket, limit=110).fetch(found("a"), hash_of("a"))
    assert here(tmp_path / "files") == {f"{hash_of('a')}.safetensors"}


def test_what_a_killed_worker_left_goes_and_what_is_on_its_way_stays(tmp_path: Path) -> None:
    for name, at in ((".left.part", 1.0), (".coming.part", time.time())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.safetensors").write_bytes(bytes(10))
        used_at(tmp_path / name / "x.safetensors", at)
        used_at(tmp_path / name, 1.0)
    # No file of ours.
    (tmp_path / "known.json").write_text("{}")
    (tmp_path / "mine.safetensors").write_bytes(bytes(10))
    used_at(tmp_path / "mine.safetensors", 1.0)
    assert STALE_S > 60
    BucketFiles(tmp_path, lambda _: Objects(), limit=0).fetch(found("a"), hash_of("a"))
    assert here(tmp_path) == {
        ".coming.part",
        "known.json",
        "mine.safetensors",
        f"{hash_of('a')}.safetensors",
    }


def test_another_content_is_not_kept(tmp_path: Path) -> None:
    files = BucketFiles(tmp_path, lambda _: Objects())
    assert files.fetch(found("a"), hash_of("b")) is None
    assert here(tmp_path) == set()


def test_the_space_is_chosen_by_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched already counts as free: another start chooses the same."""
    (tmp_path / f"{'e' * 64}.safetensors").write_bytes(bytes(1 << 20))
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(3 << 30))
    limit, reason = BucketFiles(tmp_path / "not" / "there", None).limit()
    assert limit == 3 << 29
    assert "half of the 3.0 GiB that are free" in reason
    assert BucketFiles(tmp_path, None).limit()[0] == (3 << 29) + (1 << 19)
    assert BucketFiles(tmp_path, None, 5).limit() == (5, "SMALLCAT_FILE_DISK asks for it")


class Usage:
    def __init__(self, free: int) -> None:
        self.free = free
