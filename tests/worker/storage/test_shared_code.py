"""Where a fleet keeps its compiled code: a folder and a bucket, by one test."""

from __future__ import annotations

import itertools
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import EmptyBucket
from tests.worker.storage.wire import Wire
from worker.contract.errors import PermanentStorageError, SmallcatError, StorageError
from worker.contract.settings import worker_settings
from worker.device.compiling.kernel_cache import Signed
from worker.storage import shared_code
from worker.storage.bucket import Bucket
from worker.storage.options import BucketOptions
from worker.storage.shared_code import Folder, InBucket, store_of

NAME = "0123456789abcdef0123/0123456789abcdef.kernels"
KEY = "k" * 32

Store = Folder | InBucket


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    where = str(tmp_path / "shared")
    if request.param == "bucket":
        where = f"s3://{request.getfixturevalue('s3_environment').name}/some/kernels/"
    made = store_of(worker_settings({"SMALLCAT_KERNEL_CACHE": where, "SMALLCAT_KERNEL_CACHE_KEY": KEY}))
    assert made is not None
    assert str(made) == where.rstrip("/")
    return made


def test_a_file_is_there_as_a_whole_or_not_at_all(store: Store) -> None:
    assert store.get(NAME) is None
    store.put(NAME, b"code")
    assert store.get(NAME) == b"code"
    store.put(NAME, b"")
    assert store.get(NAME) == b""


def test_what_others_have_put_there_is_refused(store: Store) -> None:
    signed = Signed(store, [KEY.encode()])
    signed.put(NAME, b"code")
    assert signed.get(NAME) == b"code"
    content = store.get(NAME)
    assert content is not None
    store.put(NAME, content[:-1])
    assert signed.get(NAME) is None
    store.put(NAME, b"print('hello')")
    assert signed.get(NAME) is None


def test_what_is_too_large_is_neither_put_nor_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(NAME, b"code!")
    monkeypatch.setattr(shared_code, "MOST_BYTES", 4)
    for call in (lambda: store.put("setup/other.kernels", b"code!"), lambda: store.get(NAME)):
        with pytest.raises((OSError, SmallcatError), match="more than 0 MiB, the limit"):
            call()
    assert store.get("setup/other.kernels") is None


@pytest.mark.parametrize("kind", ["pipe", "folder", "sparse"])
def test_what_is_no_file_of_code_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / NAME
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 3 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(OSError, match=f"{NAME} (is no reg|has more than 512)|Is a dir.*{NAME}"):
            Folder(tmp_path).get(NAME)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "code").write_bytes(b"code")
    (tmp_path / "link").symlink_to("code")
    assert Folder(tmp_path).get("link") == b"code"


def test_nothing_unfinished_stays_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="full"):
        Folder(tmp_path).put(NAME, b"code")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_download_that_takes_too_long_is_given_up(s3_environment: EmptyBucket) -> None:
    bucket = Bucket(s3_environment.name, "kernels")
    InBucket(bucket).put(NAME, b"code")
    late_s = itertools.count(step=200.0)
    with pytest.raises(StorageError, match="was not there after 120 s"):
        InBucket(bucket, clock=lambda: next(late_s)).get(NAME)


def test_a_bucket_that_refuses_says_what_is_missing(s3_environment: EmptyBucket) -> None:
    store = InBucket(Bucket("there-is-no-such-bucket", "kernels"))
    for call in (lambda: store.get(NAME), lambda: store.put(NAME, b"code")):
        with pytest.raises(PermanentStorageError, match="there-is-no-such-bucket"):
            call()


def test_what_is_missing_is_told_without_the_right_to_list(s3_environment: EmptyBucket, wire: Wire) -> None:
    store = InBucket(Bucket(s3_environment.name, "kernels"))
    wire.rights = frozenset({"s3:GetObject", "s3:PutObject"})
    assert store.get(NAME) is None
    store.put(NAME, b"code")
    assert store.get(NAME) == b"code"
    wire.rights = frozenset({"s3:GetObject"})
    with pytest.raises(PermanentStorageError, match="s3:PutObject"):
        store.put(NAME, b"code")


def test_code_is_never_public_or_locked_whatever_pictures_are(s3_environment: EmptyBucket) -> None:
    options = BucketOptions(acl="public-read", cache_control="public", sse="AES256")
    sent: dict[str, Any] = {}
    bucket = Bucket(s3_environment.name, "kernels", options=options)
    bucket._client.meta.events.register(
        "before-parameter-build.s3.PutObject", lambda params, **_: sent.update(params)
    )
    InBucket(bucket).put(NAME, b"code")
    assert sent["ServerSideEncryption"] == "AES256"
    assert not {"ACL", "CacheControl"} & set(sent)


@pytest.mark.parametrize(
    "environment",
    [{}, {"SMALLCAT_KERNEL_CACHE": "/shared"}, {"SMALLCAT_KERNEL_CACHE_KEY": KEY}],
    ids=["neither", "no key", "no place"],
)
def test_without_a_place_or_a_key_nothing_is_shared(environment: dict[str, str]) -> None:
    assert store_of(worker_settings(environment)) is None
