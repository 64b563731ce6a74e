"""Presigned links: the host that they name. Hosts are those of botocore 1.44's endpoint rules."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.worker.storage.wire import Wire, response_of
from worker.contract.errors import StorageError
from worker.storage.bucket import ASK_AGAIN_S, Bucket
from worker.storage.options import BucketOptions


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLEEXAMPLE00")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def told(region: str | None, status: int = 403) -> Any:
    """AWS' answer to a HEAD of the bucket by nobody: the region, and no more."""
    headers = {"x-amz-bucket-region": region} if region else {}
    return lambda request: response_of(request, status, headers)


def place_of(bucket: Bucket, key: str = "a/b.png") -> str:
    """Scheme, host and path of a link."""
    return urlsplit(bucket.url(f"s3://{bucket.name}/{key}"))._replace(query="").geturl()


@pytest.mark.parametrize(
    ("configured", "region", "host"),
    [
        ("eu-central-1", "eu-central-1", "pictures.s3.eu-central-1.amazonaws.com"),
        ("us-east-1", "us-east-1", "pictures.s3.us-east-1.amazonaws.com"),
        # The bucket is elsewhere than AWS_REGION says, or that is not set.
        ("us-east-1", "eu-north-1", "pictures.s3.eu-north-1.amazonaws.com"),
        ("ap-south-1", "us-east-1", "pictures.s3.us-east-1.amazonaws.com"),
        (None, "us-west-2", "pictures.s3.us-west-2.amazonaws.com"),
        ("cn-north-1", "cn-northwest-1", "pictures.s3.cn-northwest-1.amazonaws.com.cn"),
    ],
)
def test_a_link_names_the_region_that_the_bucket_is_in(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, configured: str | None, region: str, host: str
) -> None:
    if configured:
        monkeypatch.setenv("AWS_REGION", configured)
        monkeypatch.setenv("AWS_DEFAULT_REGION", configured)
    wire.answer = told(region)
    bucket = Bucket("pictures")
    link = urlsplit(bucket.url("s3://pictures/a/b.png"))
    assert link._replace(query="").geturl() == f"https://{host}/a/b.png"
    assert f"%2F{region}%2Fs3%2Faws4_request" in link.query


def test_aws_is_asked_for_the_region_once_and_without_keys(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    wire.answer = told("eu-west-1")
    bucket = Bucket("pictures")
    for number in range(3):
        bucket.url(f"s3://pictures/{number}.png")
    ((method, _, headers),) = wire.requests
    assert method == "HEAD"
    assert "authorization" not in headers
    bucket.url("s3://others/x.png")  # Another bucket may be elsewhere.
    assert len(wire.requests) == 2


@pytest.mark.parametrize("answer", ["silent", "down"])
def test_where_aws_does_not_name_the_region_the_link_names_the_configured_one(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: str
) -> None:
    def down(_: object) -> Any:
        raise botocore_error

    from botocore.exceptions import EndpointConnectionError

    botocore_error = EndpointConnectionError(endpoint_url="https://s3.eu-west-1.amazonaws.com")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda _: None)
    wire.answer = told(None) if answer == "silent" else down
    assert place_of(Bucket("pictures")) == "https://pictures.s3.eu-west-1.amazonaws.com/a/b.png"
    assert "links name AWS_REGION" in caplog.text


def test_a_region_that_aws_did_not_name_is_asked_for_again_after_a_while(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    wire.answer = told(None)
    bucket = Bucket("pictures")
    for _ in range(3):
        assert place_of(bucket) == "https://pictures.s3.eu-west-1.amazonaws.com/a/b.png"
    assert len(wire.requests) == 1
    wire.answer = told("eu-north-1")
    now_s = time.monotonic()
    monkeypatch.setattr("worker.storage.bucket.time", SimpleNamespace(monotonic=lambda: now_s + ASK_AGAIN_S))
    for _ in range(3):
        assert place_of(bucket) == "https://pictures.s3.eu-north-1.amazonaws.com/a/b.png"
    assert len(wire.requests) == 2


@pytest.mark.parametrize("name", ["pic.tures", "Pic_tures"])
def test_a_bucket_that_cannot_be_in_a_hosts_name_is_in_the_path(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A dot is not covered by a wildcard certificate."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    wire.answer = told("eu-west-1")
    assert place_of(Bucket(name)) == f"https://s3.eu-west-1.amazonaws.com/{name}/a/b.png"


def test_an_endpoint_of_aws_that_is_named_counts_as_aws(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.eu-west-1.amazonaws.com")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    wire.answer = told("eu-west-1")
    assert place_of(Bucket("pictures")) == "https://pictures.s3.eu-west-1.amazonaws.com/a/b.png"


@pytest.mark.parametrize(
    ("endpoint", "addressing", "place"),
    [
        ("https://minio.example.com", "auto", "https://minio.example.com/pictures/a/b.png"),
        ("https://minio.example.com", "path", "https://minio.example.com/pictures/a/b.png"),
        ("https://minio.example.com", "virtual", "https://pictures.minio.example.com/a/b.png"),
        ("https://minio.example.com:9000/s3", "auto", "https://minio.example.com:9000/s3/pictures/a/b.png"),
        # An address of numbers has no names below it.
        ("http://127.0.0.1:9000", "virtual", "http://127.0.0.1:9000/pictures/a/b.png"),
        ("http://[::1]:9000", "auto", "http://[::1]:9000/pictures/a/b.png"),
        (
            "https://example.com.evil-amazonaws.com",
            "auto",
            "https://example.com.evil-amazonaws.com/pictures/a/b.png",
        ),
    ],
)
def test_another_server_is_addressed_by_path_unless_set(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, endpoint: str, addressing: str, place: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    bucket = Bucket("pictures", options=BucketOptions(addressing=addressing))
    assert place_of(bucket) == place
    assert wire.requests == [], "nobody is asked"


def test_boto3s_own_setting_of_the_style_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    config = tmp_path / "config"
    config.write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://minio.example.com")
    assert place_of(Bucket("pictures")) == "https://pictures.minio.example.com/a/b.png"


def test_a_link_of_an_hour_and_of_a_week(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://minio.example.com")
    bucket = Bucket("pictures")
    assert "X-Amz-Expires=3600&" in bucket.url("s3://pictures/k")
    assert "X-Amz-Expires=604800&" in bucket.url("s3://pictures/k", 604_800)


def test_a_link_without_keys_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://minio.example.com")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID"):
        Bucket("pictures").url("s3://pictures/k")
