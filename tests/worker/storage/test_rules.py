"""Buckets with rules of their own, on servers that have them: encryption, ACL, retention, Cache-Control."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Callable
from typing import Any

import boto3
import pytest

from deploy.embedded.servers import S3Process
from worker.contract.choices import ImageFormat
from worker.storage.bucket import Bucket
from worker.storage.options import BucketOptions

JOB_ID = "0123456789abcdef0123456789abcdef"
PNG = ImageFormat.PNG
pytestmark = pytest.mark.services


@pytest.fixture(params=["moto", "seaweedfs"])
def server(
    request: pytest.FixtureRequest, services: Callable[[str], S3Process], monkeypatch: pytest.MonkeyPatch
) -> S3Process:
    server = services(request.param)
    for name, value in server.environment("").items():
        monkeypatch.setenv(name, value)
    return server


def new_bucket(**options: Any) -> str:
    name = f"rules-{secrets.token_hex(4)}"
    boto3.session.Session().client("s3").create_bucket(Bucket=name, **options)
    return name


def put(bucket: Bucket) -> list[Any]:
    """The heads of a job's two objects."""
    bucket.put(JOB_ID, PNG, b"picture", b"{}", "image/png")
    assert bucket.find(JOB_ID, PNG) == b"{}"
    keys = [bucket._key(JOB_ID, ending) for ending in ("png", "json")]
    return [bucket._client.head_object(Bucket=bucket.name, Key=key) for key in keys]


def test_objects_are_encrypted_as_set(server: S3Process) -> None:
    bucket = Bucket(new_bucket(), options=BucketOptions(sse="AES256"))
    assert bucket.check() == ()
    assert [head["ServerSideEncryption"] for head in put(bucket)] == ["AES256"] * 2


def test_objects_are_encrypted_by_the_key_that_is_set(server: S3Process) -> None:
    if server.name == "seaweedfs":
        pytest.skip("SeaweedFS has no KMS unless it is configured")
    bucket = Bucket(new_bucket(), options=BucketOptions(sse="aws:kms", sse_kms_key_id="alias/pictures"))
    assert bucket.check() == ()
    for head in put(bucket):
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "alias/pictures")


def test_objects_are_retained_as_set_and_put_again_all_the_same(server: S3Process) -> None:
    name = new_bucket(ObjectLockEnabledForBucket=True)
    bucket = Bucket(name, options=BucketOptions(object_lock="GOVERNANCE", object_lock_days=2))
    bucket.check()
    for _ in range(2):
        for head in put(bucket):
            assert head["ObjectLockMode"] == "GOVERNANCE"
            left = head["ObjectLockRetainUntilDate"] - datetime.datetime.now(datetime.UTC)
            assert datetime.timedelta(days=1, hours=23) < left <= datetime.timedelta(days=2)


def test_a_bucket_that_retains_by_itself_takes_objects_and_test_objects(server: S3Process) -> None:
    name = new_bucket(ObjectLockEnabledForBucket=True)
    boto3.session.Session().client("s3").put_object_lock_configuration(
        Bucket=name,
        ObjectLockConfiguration={
            "ObjectLockEnabled": "Enabled",
            "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}},
        },
    )
    bucket = Bucket(name)
    bucket.check()
    assert {head.get("ObjectLockMode") for head in put(bucket)} == {"GOVERNANCE"}
    bucket.delete(JOB_ID, PNG)
    assert bucket.find(JOB_ID, PNG) is None


def test_cache_control_comes_with_the_object(server: S3Process) -> None:
    bucket = Bucket(new_bucket(), options=BucketOptions(cache_control="public, max-age=60"))
    assert {head["CacheControl"] for head in put(bucket)} == {"public, max-age=60"}


def test_an_acl_is_set(server: S3Process) -> None:
    bucket = Bucket(new_bucket(), options=BucketOptions(acl="bucket-owner-full-control"))
    assert bucket.check() == ()
    put(bucket)
    key = bucket._key(JOB_ID, "png")
    grants = bucket._client.get_object_acl(Bucket=bucket.name, Key=key)["Grants"]
    assert "FULL_CONTROL" in {grant["Permission"] for grant in grants}
