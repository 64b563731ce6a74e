"""boto3's client for S3, and the region that a bucket of AWS is in."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import boto3
import botocore
import botocore.config
import botocore.exceptions
import botocore.session

from worker.contract.given_file import at_home

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

logger = logging.getLogger("smallcat.storage")

#: Hosts of AWS itself, also where AWS_ENDPOINT_URL_S3 names one.
_AWS_HOST = re.compile(r"\.amazonaws\.(com|com\.cn|eu)$")


class KeyFiles:
    """The files with keys that boto3 reads when a client is made, whether they are there or not."""

    def __init__(self) -> None:
        session = botocore.session.get_session()
        names = ("credentials_file", "config_file")
        self._paths = [at_home(Path(str(session.get_config_variable(name)))) for name in names]

    def version(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Another value whenever one of them was written, replaced, made or removed."""
        return tuple(map(_version, self._paths))


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def make_client(*, addressing: str, connections: int, attempts: int, region: str | None = None) -> S3Client:
    """A client with boto3's own credentials, endpoint and region; `region` replaces the last.

    `addressing`: virtual, path, or auto: virtual on AWS, and elsewhere path, unless boto3's configuration
    says otherwise: an unknown server may have no host name for each bucket. Where a bucket's name cannot be
    a host name, or has a dot, which no wildcard certificate covers, boto3 uses the path.
    `connections`: kept open, at most. `attempts`: >= 1, at each request.
    """
    session = boto3.session.Session()

    def client(style: str) -> S3Client:
        # us-east-1's host by its region, as all others, and not the global one, which redirects.
        s3 = {"us_east_1_regional_endpoint": "regional"} | (
            {} if style == "auto" else {"addressing_style": style}
        )
        config = botocore.config.Config(
            # By default links for custom endpoints are signed by version 2, which rclone and Garage refuse.
            signature_version="s3v4",
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "max_attempts": attempts},
            max_pool_connections=connections,
            connect_timeout=5,
            read_timeout=30,
            s3=s3,  # type: ignore[arg-type] # the stubs lack us_east_1_regional_endpoint
        )
        return session.client("s3", config=config, region_name=region)

    made = client(addressing)
    # Left to itself, boto3 signs links to AWS for the global host, which only knows buckets of us-east-1.
    return client("virtual") if addressing == "auto" and is_aws(made) else made


def is_aws(client: S3Client) -> bool:
    """Whether the client's server is AWS' own."""
    return bool(_AWS_HOST.search(urlsplit(client.meta.endpoint_url).hostname or ""))


def region_of(bucket: str, client: S3Client) -> str | None:
    """The region that a bucket of AWS is in; None where AWS did not say, which is logged.

    One request without keys: AWS names the region to everybody.
    """
    config = botocore.config.Config(
        signature_version=botocore.UNSIGNED,
        connect_timeout=3,
        read_timeout=3,
        retries={"total_max_attempts": 2},
    )
    asking = boto3.session.Session().client("s3", config=config, region_name=client.meta.region_name)
    try:
        headers = asking.head_bucket(Bucket=bucket)["ResponseMetadata"]["HTTPHeaders"]
    except botocore.exceptions.ClientError as error:
        headers = error.response["ResponseMetadata"]["HTTPHeaders"]
    except botocore.exceptions.BotoCoreError as error:
        logger.warning("The region of bucket %r is not known (%s): links name AWS_REGION", bucket, error)
        return None
    region = headers.get("x-amz-bucket-region")
    if region is None:
        logger.warning("AWS does not name the region of bucket %r: links name AWS_REGION", bucket)
    return region
