"""Keys with fewer rights than all: what is needed is told with the remedy, what is not is done without.

The server is real; `wire` refuses before it as S3 does: who may not list is not told what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import EmptyBucket
from tests.worker.storage.wire import EVERYTHING, Wire
from worker.contract.choices import ImageFormat
from worker.contract.errors import PermanentStorageError, UnknownJobError
from worker.storage.bucket import TEST_NAME, Bucket

JOB_ID = "0123456789abcdef0123456789abcdef"
PNG = ImageFormat.PNG


@pytest.fixture
def bucket(s3_environment: EmptyBucket) -> Bucket:
    return Bucket(s3_environment.name, "a/prefix")


def put(bucket: Bucket) -> None:
    bucket.put(JOB_ID, PNG, b"picture", b'{"job": 1}', "image/png")


def stored(bucket: Bucket) -> list[str]:
    return [address for address, _ in bucket.below(bucket.root)]


def test_with_all_rights_nothing_is_lacking(bucket: Bucket, wire: Wire) -> None:
    assert bucket.check() == ()
    assert wire.used == {"s3:PutObject", "s3:GetObject", "s3:DeleteObject", "s3:ListBucket"}


def test_a_folder_for_which_there_are_no_rights_is_found_by_the_test_object(
    bucket: Bucket, wire: Wire
) -> None:
    """Not the object alone is refused where the whole folder of pictures is."""
    wire.refused_keys = ("/images/",)
    with pytest.raises(PermanentStorageError):
        put(bucket)
    with pytest.raises(PermanentStorageError):
        bucket.probe()


@pytest.mark.parametrize("right", ["s3:PutObject", "s3:GetObject"])
def test_the_start_needs_to_write_and_to_read(bucket: Bucket, wire: Wire, right: str) -> None:
    wire.rights = EVERYTHING - {right}
    with pytest.raises(
        PermanentStorageError, match=r"AccessDenied on purpose.*s3:PutObject and s3:GetObject"
    ):
        bucket.check()


def test_a_test_object_that_cannot_be_read_is_removed(bucket: Bucket, wire: Wire) -> None:
    wire.rights = EVERYTHING - {"s3:GetObject"}
    with pytest.raises(PermanentStorageError):
        bucket.check()
    assert stored(bucket) == []


def test_without_the_right_to_remove_the_start_says_which_object_stays(bucket: Bucket, wire: Wire) -> None:
    wire.rights = EVERYTHING - {"s3:DeleteObject"}
    (lack,) = bucket.check()
    (left,) = stored(bucket)
    key = left.removeprefix(f"s3://{bucket.name}/")
    assert key.startswith(f"a/prefix/{TEST_NAME}")
    assert lack.startswith(f"The test object {key} cannot be removed, which no job needs: ")


def test_without_the_right_to_list_the_start_says_what_needs_it(bucket: Bucket, wire: Wire) -> None:
    wire.rights = EVERYTHING - {"s3:ListBucket"}
    assert bucket.check() == (
        "Objects cannot be listed, which only galleries of an s3:// address need: s3:ListBucket is missing.",
    )


def test_without_the_right_to_list_what_is_missing_is_missing(bucket: Bucket, wire: Wire) -> None:
    """S3 answers AccessDenied for a key that is not there, unless one may list."""
    wire.rights = EVERYTHING - {"s3:ListBucket"}
    assert bucket.find(JOB_ID, PNG) is None
    assert bucket.record(JOB_ID) is None
    put(bucket)
    assert bucket.find(JOB_ID, PNG) == b'{"job": 1}'
    bucket._client.delete_object(Bucket=bucket.name, Key=f"a/prefix/images/01/{JOB_ID}.png")
    assert bucket.find(JOB_ID, PNG) is None


def test_that_a_bucket_hides_what_is_missing_is_found_out_once(bucket: Bucket, wire: Wire) -> None:
    wire.rights = EVERYTHING - {"s3:ListBucket", "s3:DeleteObject"}
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda number: bucket.find(f"{number:032x}", PNG), range(32)))
    assert found == [None] * 32
    wire.rights = EVERYTHING
    assert len(stored(bucket)) == 1  # The one test object.


def test_a_key_that_is_refused_is_not_taken_for_missing(bucket: Bucket, wire: Wire) -> None:
    put(bucket)
    wire.refused_keys = (JOB_ID,)
    with pytest.raises(PermanentStorageError, match="AccessDenied"):
        bucket.find(JOB_ID, PNG)
    assert bucket.find("f" * 32, PNG) is None


@pytest.mark.parametrize("hidden", [frozenset(), frozenset({"s3:ListBucket"})], ids=["listed", "not listed"])
def test_rights_that_lapse_are_not_taken_for_missing(
    bucket: Bucket, wire: Wire, hidden: frozenset[str]
) -> None:
    put(bucket)
    wire.rights = frozenset({"s3:DeleteObject"}) - hidden
    with pytest.raises(PermanentStorageError, match="AccessDenied"):
        bucket.find(JOB_ID, PNG)


def test_who_may_only_read_is_refused_what_is_missing_with_the_remedy(bucket: Bucket, wire: Wire) -> None:
    """Without the right to put, nothing can be tried out."""
    put(bucket)
    wire.rights = frozenset({"s3:GetObject"})
    assert bucket.find(JOB_ID, PNG) == b'{"job": 1}'
    with pytest.raises(
        PermanentStorageError, match=r"s3:ListBucket, without which S3 refuses also what is miss"
    ):
        bucket.find("f" * 32, PNG)
    wire.rights = frozenset({"s3:GetObject", "s3:ListBucket"})
    assert bucket.find("f" * 32, PNG) is None
    with pytest.raises(UnknownJobError):
        bucket.get(bucket.uri("f" * 32, PNG))


def test_a_test_object_is_as_large_as_asked(bucket: Bucket, wire: Wire) -> None:
    bucket.probe(100_000)
    (length,) = [headers["content-length"] for method, _, headers in wire.requests if method == "PUT"]
    assert length == "100000"
    assert stored(bucket) == []


def test_keys_that_are_rotated_in_their_file_are_used_before_the_old_ones_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Links, for which nobody is asked, are signed with the new ones, too."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    bucket = Bucket("pictures")
    for name in ("first-key", "other-key", "third-key"):
        beside = tmp_path / name
        beside.write_text(f"[default]\naws_access_key_id = {name}\naws_secret_access_key = {'x' * 20}\n")
        beside.replace(file)
        assert f"X-Amz-Credential={name}%2F" in bucket.url("s3://pictures/cat.png")
    made = bucket._client
    assert bucket._client is made


@pytest.mark.parametrize("ask", [put, Bucket.check, Bucket.probe, lambda bucket: bucket.find(JOB_ID, PNG)])
def test_keys_that_were_renewed_in_their_file_are_used(
    s3_environment: EmptyBucket,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ask: Callable[[Bucket], object],
) -> None:
    """As a sidecar or `aws sso login` renews them: boto3 itself reads the file once."""
    keys = s3_environment.environment
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    text = (
        "[default]\n"
        "aws_access_key_id = {AWS_ACCESS_KEY_ID}\n"
        "aws_secret_access_key = {AWS_SECRET_ACCESS_KEY}\n"
    )
    bucket = Bucket(s3_environment.name)
    file.write_text(text.format(**keys | {"AWS_SECRET_ACCESS_KEY": "x" * 20}))
    with pytest.raises(PermanentStorageError):
        ask(bucket)
    file.write_text(text.format(**keys))
    ask(bucket)
