"""The files that jobs begin with, on a real S3 server: put once, renewed, each tenant's apart."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable

import boto3
import pytest

from deploy.embedded.servers import S3Process
from tests.conftest import EmptyBucket
from tests.worker.storage.servers import SERVERS
from tests.worker.storage.wire import Wire
from worker.contract.errors import StorageError
from worker.contract.object_keys import input_key
from worker.storage import inputs as inputs_module
from worker.storage.bucket import Bucket
from worker.storage.inputs import Inputs
from worker.storage.options import BucketOptions

DATA = b"a picture"
SHA256 = hashlib.sha256(DATA).hexdigest()


def made(environment: EmptyBucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in environment.environment.items():
        monkeypatch.setenv(name, value)
    return Bucket(environment.name, "a/prefix", attempts=2)


@pytest.fixture
def bucket(s3_environment: EmptyBucket) -> Bucket:
    return Bucket(s3_environment.name, "a/prefix", attempts=2)


def requests(wire: Wire) -> list[str]:
    return [action for action, _ in wire.needed]


def test_a_file_is_there_by_its_content_and_each_tenants_apart(bucket: Bucket) -> None:
    assert Inputs(bucket).put(DATA, "image/png") == SHA256
    assert Inputs(bucket).put(DATA + b"!", "image/png", "acme") != SHA256
    assert bucket.read_input(SHA256) == DATA
    assert bucket.read_input(SHA256, "acme") is None
    assert bucket.read_input("0" * 64) is None
    assert {address for address, _ in bucket.below(bucket.root)} == {
        f"{bucket.root}inputs/{SHA256}",
        f"{bucket.root}inputs/tenants/acme/{hashlib.sha256(DATA + b'!').hexdigest()}",
    }


def test_a_file_that_is_there_costs_one_request(bucket: Bucket, wire: Wire) -> None:
    Inputs(bucket).put(DATA, "image/png")
    first = len(wire.needed)
    Inputs(bucket).put(DATA, "image/png")
    assert len(wire.needed) == first + 1


def test_what_was_put_long_ago_is_put_again(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, wire: Wire
) -> None:
    Inputs(bucket).put(DATA, "image/png")
    monkeypatch.setattr(inputs_module, "RENEW_S", -60.0)
    wire.needed.clear()
    assert Inputs(bucket).renew(SHA256)
    assert "s3:PutObject" in requests(wire)
    wire.needed.clear()
    Inputs(bucket).put(DATA, "image/png")
    assert "s3:PutObject" in requests(wire)
    assert bucket.read_input(SHA256) == DATA
    head = bucket._client.head_object(Bucket=bucket.name, Key=f"a/prefix/{input_key(SHA256)}")
    assert head["ContentType"] == "image/png"


def test_half_a_file_under_its_name_is_put_again(bucket: Bucket) -> None:
    bucket._client.put_object(Bucket=bucket.name, Key=f"a/prefix/{input_key(SHA256)}", Body=DATA[:4])
    Inputs(bucket).put(DATA, "image/png")
    assert bucket.read_input(SHA256) == DATA


def test_of_a_file_over_the_limit_no_more_is_read_than_shows_it(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.storage.bucket.MAX_INPUT_BYTES", 1_000)
    bucket._client.put_object(Bucket=bucket.name, Key=f"a/prefix/{input_key(SHA256)}", Body=bytes(5_000))
    assert len(bucket.read_input(SHA256) or b"") == 1_001


def test_inputs_are_neither_public_nor_locked_whatever_pictures_are() -> None:
    options = BucketOptions(
        acl="public-read", cache_control="public", object_lock="GOVERNANCE", object_lock_days=9, sse="AES256"
    )
    assert options.for_inputs() == BucketOptions(sse="AES256")
    kept = BucketOptions(acl="bucket-owner-full-control")
    assert kept.for_inputs() == kept


def test_a_bucket_that_is_away_is_said_in_a_sentence(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="is out of reach"):
        Inputs(bucket).put(DATA, "image/png")


@pytest.mark.services
@pytest.mark.parametrize("name", SERVERS)
def test_other_servers_take_and_renew_files(
    name: str, services: Callable[[str], S3Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy onto itself with new metadata is S3's way of a new date; not all servers have it alike."""
    server = services(name)
    environment = EmptyBucket(f"test-{secrets.token_hex(4)}", server.environment("x"))
    bucket = made(environment, monkeypatch)
    boto3.session.Session().client("s3").create_bucket(Bucket=bucket.name)
    Inputs(bucket).put(DATA, "image/png")
    monkeypatch.setattr(inputs_module, "RENEW_S", -60.0)
    assert Inputs(bucket).renew(SHA256)
    assert bucket.read_input(SHA256) == DATA
