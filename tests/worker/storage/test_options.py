"""What the settings add to each object: encryption, ACL, Cache-Control, retention; and nothing by default."""

from __future__ import annotations

import datetime

import pytest

from tests.conftest import EmptyBucket
from tests.worker.storage.wire import Wire, response_of
from worker.contract.choices import ImageFormat
from worker.contract.settings import worker_settings
from worker.storage.bucket import Bucket
from worker.storage.bucket_process import BucketProcess
from worker.storage.options import BucketOptions

NOW = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)
#: A setting of each kind, and the headers that it adds to PutObject.
TABLE: list[tuple[dict[str, str], dict[str, str]]] = [
    ({}, {}),
    ({"SMALLCAT_S3_SSE": "AES256"}, {"x-amz-server-side-encryption": "AES256"}),
    ({"SMALLCAT_S3_SSE": "aws:kms"}, {"x-amz-server-side-encryption": "aws:kms"}),
    (
        {"SMALLCAT_S3_SSE": "aws:kms:dsse", "SMALLCAT_S3_SSE_KMS_KEY_ID": "alias/mine"},
        {
            "x-amz-server-side-encryption": "aws:kms:dsse",
            "x-amz-server-side-encryption-aws-kms-key-id": "alias/mine",
        },
    ),
    ({"SMALLCAT_S3_ACL": "bucket-owner-full-control"}, {"x-amz-acl": "bucket-owner-full-control"}),
    ({"SMALLCAT_S3_CACHE_CONTROL": "max-age=60, immutable"}, {"cache-control": "max-age=60, immutable"}),
]


def options_of(settings: dict[str, str]) -> BucketOptions:
    return BucketOptions.of(worker_settings(settings))


def sent(wire: Wire) -> list[dict[str, str]]:
    """The headers of each PUT that settings may add."""
    return [
        {
            name: value
            for name, value in headers.items()
            if name in ("cache-control", "content-md5", "x-amz-acl")
        }
        | {
            name: value
            for name, value in headers.items()
            if name.startswith(("x-amz-server-side-encryption", "x-amz-object-lock", "x-amz-checksum"))
        }
        for method, _, headers in wire.requests
        if method == "PUT"
    ]


@pytest.mark.parametrize(("settings", "headers"), TABLE, ids=str)
def test_pictures_and_records_are_put_as_set(
    s3_environment: EmptyBucket, wire: Wire, settings: dict[str, str], headers: dict[str, str]
) -> None:
    wire.answer = lambda request: response_of(request, 200, {})
    bucket = Bucket(s3_environment.name, options=options_of(settings))
    bucket.put("0" * 32, ImageFormat.PNG, b"picture", b"{}", "image/png")
    picture, record = sent(wire)
    assert picture.pop("content-md5") != record.pop("content-md5")
    assert picture == record == headers


@pytest.mark.parametrize(("settings", "headers"), TABLE, ids=str)
def test_the_test_object_is_put_in_the_same_way(
    s3_environment: EmptyBucket, wire: Wire, settings: dict[str, str], headers: dict[str, str]
) -> None:
    """A bucket that refuses what has no encryption, no MD5 or no ACL refuses it at the start, too."""
    wire.answer = lambda request: response_of(request, 200, {})
    Bucket(s3_environment.name, options=options_of(settings)).probe()
    (test,) = sent(wire)
    assert test.pop("content-md5")
    assert test == headers


@pytest.mark.parametrize("mode", ["GOVERNANCE", "COMPLIANCE"])
def test_objects_are_retained_for_days_and_test_objects_for_a_minute(mode: str) -> None:
    options = options_of({"SMALLCAT_S3_OBJECT_LOCK": mode, "SMALLCAT_S3_OBJECT_LOCK_DAYS": "30"})
    assert options.put_parameters(NOW) == {
        "ObjectLockMode": mode,
        "ObjectLockRetainUntilDate": NOW + datetime.timedelta(days=30),
    }
    assert options.put_parameters(NOW, is_test=True) == {
        "ObjectLockMode": mode,
        "ObjectLockRetainUntilDate": NOW + datetime.timedelta(minutes=1),
    }


def test_retention_goes_over_the_wire_with_the_md5(s3_environment: EmptyBucket, wire: Wire) -> None:
    wire.answer = lambda request: response_of(request, 200, {})
    options = options_of({"SMALLCAT_S3_OBJECT_LOCK": "GOVERNANCE", "SMALLCAT_S3_OBJECT_LOCK_DAYS": "1"})
    bucket = Bucket(s3_environment.name, options=options)
    bucket.put("0" * 32, ImageFormat.PNG, b"picture", b"{}", "image/png")
    for headers in sent(wire):
        assert set(headers) == {
            "content-md5",
            "x-amz-object-lock-mode",
            "x-amz-object-lock-retain-until-date",
        }
        until = datetime.datetime.fromisoformat(headers["x-amz-object-lock-retain-until-date"])
        assert until > datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=23)


def test_the_process_that_asks_the_bucket_has_the_same_options(s3_environment: EmptyBucket) -> None:
    """rclone keeps Cache-Control, and gives it back."""
    options = options_of({"SMALLCAT_S3_CACHE_CONTROL": "max-age=61"})
    bucket = BucketProcess(s3_environment.name, options=options)
    try:
        bucket.put("0" * 32, ImageFormat.PNG, b"picture", b"{}", "image/png")
        assert bucket.probe() == ()
    finally:
        bucket._remote._manager.shutdown()
    key = bucket._key("0" * 32, "png")
    answer = Bucket(s3_environment.name)._client.head_object(Bucket=bucket.name, Key=key)
    assert answer["CacheControl"] == "max-age=61"
