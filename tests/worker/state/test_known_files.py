"""What workers know of files in buckets, in a real Valkey: each file is read by one of them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
import torch
from redis.client import Redis
from safetensors.torch import save

from deploy.embedded.servers import ValkeyProcess
from worker.contract.errors import StorageError
from worker.contract.file_index import FileEntry, Kind
from worker.model.beside import file_knowledge
from worker.model.beside.file_store import FileStore
from worker.state import known_files
from worker.state.keys import KNOWN_FILES, READ_FILE
from worker.state.known_files import KnownFiles
from worker.state.redis_client import connect
from worker.storage.bucket import StoredObject

TTL_S = 1_000


@pytest.fixture
def redis(valkey: ValkeyProcess) -> Iterator[Redis]:
    with connect(valkey.url, 1) as client:
        yield client


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_knowledge, "ASK_AGAIN_S", 0.01)
    monkeypatch.setattr(file_knowledge, "STILL_READING_S", -1.0)


class Embeddings:
    """A bucket with so many of them, which counts how often each is read."""

    def __init__(self, count: int) -> None:
        self._files = {
            f"s3://b/e/{each}.safetensors": save({"x": torch.full((1, 8), float(each))})
            for each in range(count)
        }
        self.opened: Counter[str] = Counter()
        self.fails = False

    def listed(self, address: str) -> Iterator[StoredObject]:
        return (StoredObject(uri, 1.0, len(data), "1") for uri, data in self._files.items())

    @contextmanager
    def open(self, uri: str) -> Iterator[IO[bytes]]:
        self.opened[uri] += 1
        if self.fails:
            raise StorageError("out of reach")
        yield io.BytesIO(self._files[uri])


def worker(bucket: Embeddings, cache: Path, redis: Redis) -> FileStore:
    places = {Kind.EMBEDDING: ["s3://b/e"]}
    return FileStore(places, cache, lambda _: bucket, KnownFiles(redis, TTL_S))


def test_workers_that_start_together_read_each_file_once(tmp_path: Path, redis: Redis) -> None:
    bucket = Embeddings(12)
    with ThreadPoolExecutor(4) as pool:
        workers = list(pool.map(lambda name: worker(bucket, tmp_path / name, redis), "abcd"))
    assert set(bucket.opened.values()) == {1}
    assert {each.index.digest for each in workers} == {workers[0].index.digest}
    assert len(workers[0].index.files) == 12
    # And one that starts later reads none.
    assert worker(bucket, tmp_path / "later", redis).index == workers[0].index
    assert set(bucket.opened.values()) == {1}
    assert 0 < redis.ttl(KNOWN_FILES) <= TTL_S
    assert redis.keys(f"{READ_FILE}*") == []


def test_a_file_whose_reader_died_is_read_by_another_worker(tmp_path: Path, redis: Redis) -> None:
    bucket = Embeddings(1)
    [uri] = [each.uri for each in bucket.listed("")]
    assert KnownFiles(redis, TTL_S).claim(f"{file_knowledge.DESCRIBED} embedding {uri} ['1']")
    [claim] = redis.keys(f"{READ_FILE}*")
    assert 0 < redis.ttl(claim) <= known_files.CLAIM_S
    redis.pexpire(claim, 50)
    assert len(worker(bucket, tmp_path, redis).index.files) == 1
    assert bucket.opened == {uri: 1}


def test_a_failed_reading_leaves_the_file_to_others(tmp_path: Path, redis: Redis) -> None:
    bucket = Embeddings(1)
    bucket.fails = True
    with pytest.raises(StorageError):
        worker(bucket, tmp_path, redis)
    bucket.fails = False
    assert not worker(bucket, tmp_path, redis).index.files[0].problem


def test_what_redis_lost_is_there_again_after_the_next_look(tmp_path: Path, redis: Redis) -> None:
    bucket = Embeddings(2)
    files = worker(bucket, tmp_path / "a", redis)
    redis.flushall()
    files.look()
    assert worker(bucket, tmp_path / "b", redis).index == files.index
    assert set(bucket.opened.values()) == {1}


def test_a_worker_whose_redis_is_away_reads_for_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = Embeddings(3)
    with connect("redis://127.0.0.1:9", 0) as nobody:
        assert len(worker(bucket, tmp_path, nobody).index.files) == 3
    assert sum("cannot share what they know" in each.getMessage() for each in caplog.records) == 1


def test_what_cannot_be_read_is_as_if_it_was_not_there(redis: Redis) -> None:
    known = KnownFiles(redis, TTL_S)
    entry = FileEntry(kind="lora", name="x", sha256="ab" * 32)
    known.put({"good": entry})
    redis.hset(KNOWN_FILES, "bad", "{")
    assert known.get(["good", "bad", "none"]) == {"good": entry}
    known.forget("good")
    assert known.get(["good"]) == {}
    assert known.keep()


def test_it_does_not_grow_for_ever(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_files, "MAX_KNOWN", 3)
    known, entry = KnownFiles(redis, TTL_S), FileEntry(kind="lora", name="x")
    for number in range(20):
        known.put({str(number): entry})
        assert redis.hlen(KNOWN_FILES) <= 3
        assert known.get([str(number)])
