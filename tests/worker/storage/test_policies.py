"""The IAM policies of deploy/: what worker and producer ask of the bucket, and nothing else."""

from __future__ import annotations

import json
import re
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import boto3
import pytest

from deploy.embedded.servers import S3Process
from producer.cli.doctor import Finding, _bucket
from producer.session import session
from tests.conftest import EmptyBucket
from tests.worker.storage.wire import Wire
from worker.contract.choices import ImageFormat
from worker.contract.errors import PermanentStorageError
from worker.storage.bucket import Bucket
from worker.storage.deletion import Deletion
from worker.storage.inputs import Inputs
from worker.storage.options import BucketOptions
from worker.storage.shared_code import InBucket

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy"
PREFIX = "a/prefix"
JOB_ID, ABSENT = "0123456789abcdef0123456789abcdef", "f" * 32
PNG = ImageFormat.PNG


def policy_of(side: str, bucket: str = "BUCKET", prefix: str = "PREFIX") -> Any:
    text = (FOLDER / f"s3-{side}-policy.json").read_text()
    return json.loads(text.replace("BUCKET", bucket).replace("PREFIX", prefix))


def allowed(policy: Any) -> Iterator[tuple[str, str]]:
    """Each action that the policy allows, with the ARN it is allowed on."""
    for statement in policy["Statement"]:
        actions = statement["Action"]
        for action in [actions] if isinstance(actions, str) else actions:
            yield action, statement["Resource"]


def work(bucket: Bucket) -> None:
    """All that a worker asks of the bucket once it has started."""
    assert bucket.probe(100) == ()
    assert bucket.find(ABSENT, PNG) is None
    bucket.put(JOB_ID, PNG, b"picture", b"{}", "image/png")
    assert bucket.find(JOB_ID, PNG) == b"{}"
    assert bucket.read_input("0" * 64) is None


def produce(bucket: Bucket) -> None:
    """All that a producer asks of the bucket that holds a job."""
    uri = bucket.uri(JOB_ID, PNG)
    assert bucket.get(uri) == b"picture"
    with bucket.open(uri) as body:
        assert body.read() == b"picture"
    assert bucket.record(JOB_ID) == b"{}"
    assert bucket.find(ABSENT, PNG) is None
    inputs = Inputs(bucket)
    sha256 = inputs.put(b"input", "image/png")
    assert inputs.put(b"input", "image/png") == sha256
    assert inputs.renew(sha256)
    assert not inputs.renew("0" * 64)
    assert uri in {address for address, _ in bucket.below(bucket.root)}


def share(bucket: Bucket) -> None:
    """All that a worker asks of the bucket that the fleet's compiled code is in."""
    store = InBucket(Bucket(bucket.name, f"{PREFIX}/kernels"))
    assert store.get("setup/name.kernels") is None
    store.put("setup/name.kernels", b"code")
    assert store.get("setup/name.kernels") == b"code"


@pytest.mark.parametrize("side", ["worker", "producer", "forget", "kernels"])
def test_a_policy_is_iam_s_json_for_one_bucket_and_prefix(side: str) -> None:
    policy = policy_of(side)
    assert set(policy) == {"Version", "Statement"}
    assert policy["Version"] == "2012-10-17"
    for statement in policy["Statement"]:
        assert set(statement) == {"Sid", "Effect", "Action", "Resource"}
        assert statement["Effect"] == "Allow"
        assert re.fullmatch(r"[A-Za-z0-9]+", statement["Sid"]), "AWS takes no other characters in it"
        below = r"arn:aws:s3:::BUCKET(/PREFIX/(images|inputs|kernels)/[.\w-]*\*)?"
        assert re.fullmatch(below, statement["Resource"])
    assert not [action for action, _ in allowed(policy) if "*" in action]


@pytest.mark.parametrize("side", ["worker", "producer", "kernels"])
def test_a_policy_allows_what_is_asked_and_nothing_else(
    s3_environment: EmptyBucket, wire: Wire, side: str
) -> None:
    bucket = Bucket(s3_environment.name, PREFIX)
    bucket.put(JOB_ID, PNG, b"picture", b"{}", "image/png")
    wire.needed.clear()
    if side == "worker":
        assert bucket.check() == ()
    {"worker": work, "producer": produce, "kernels": share}[side](bucket)
    rules = list(allowed(policy_of(side, bucket.name, PREFIX)))
    needed = set(wire.needed)

    def permits(rule: tuple[str, str], need: tuple[str, str]) -> bool:
        return rule[0] == need[0] and fnmatchcase(need[1], rule[1])

    assert needed
    assert [need for need in needed if not any(permits(rule, need) for rule in rules)] == []
    assert [rule for rule in rules if not any(permits(rule, need) for need in needed)] == []


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("SMALLCAT_S3_ACL", BucketOptions(acl="bucket-owner-full-control")),
        ("SMALLCAT_S3_OBJECT_LOCK", BucketOptions(object_lock="GOVERNANCE", object_lock_days=1)),
        ("SMALLCAT_S3_CACHE_CONTROL", BucketOptions(cache_control="max-age=60")),
        ("SMALLCAT_S3_SSE", BucketOptions(sse="AES256")),
        ("SMALLCAT_S3_SSE_KMS_KEY_ID", BucketOptions(sse="aws:kms", sse_kms_key_id="alias/pictures")),
    ],
)
def test_what_a_setting_needs_besides_is_documented(
    s3_environment: EmptyBucket, wire: Wire, setting: str, options: BucketOptions
) -> None:
    bucket = Bucket(s3_environment.name, PREFIX, options=options)
    # rclone does not know all of these headers: only what is asked counts.
    wire.rights = frozenset()
    with pytest.raises(PermanentStorageError):
        bucket.put(JOB_ID, PNG, b"picture", b"{}", "image/png")
    besides = wire.used - {action for action, _ in allowed(policy_of("worker"))}
    if options.sse.startswith("aws:kms"):
        # By S3, in the caller's name: "Using server-side encryption with AWS KMS keys", Amazon S3 User Guide.
        besides |= {"kms:GenerateDataKey", "kms:Decrypt"}
    page = (ROOT / "docs" / "operations.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|") and f"`{setting}`" in line]
    documented = {right for line in rows for right in re.findall(r"`((?:s3|kms):\w+)`", line.split("|")[2])}
    assert documented == besides


# Judged by another program: moto 5.2. Its IAM has a right for HeadBucket, which AWS has not, and it fails at
# presigned links then: hence neither `check` nor links here.


@pytest.fixture
def keys_of(services: Callable[[str], S3Process], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a bucket and a user for each side, then has moto judge each request by its user's policy."""
    server = services("moto")

    def judge(requests_before: str) -> None:
        ask = urllib.request.Request(  # noqa: S310 - our own server
            f"{server.endpoint}/moto-api/reset-auth", requests_before.encode(), {"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(ask, timeout=10).close()  # noqa: S310

    for name, value in server.environment("").items():
        monkeypatch.setenv(name, value)
    bucket = f"policy-{secrets.token_hex(4)}"
    aws = boto3.session.Session()
    aws.client("s3").create_bucket(Bucket=bucket)
    iam = aws.client("iam", endpoint_url=server.endpoint)

    def use(side: str) -> str:
        """Use the keys of a new user of that side from now on. Returns the bucket's name."""
        judge("inf")
        user = f"{side}-{secrets.token_hex(4)}"
        iam.create_user(UserName=user)
        policy = json.dumps(policy_of(side, bucket, PREFIX))
        iam.put_user_policy(UserName=user, PolicyName="smallcat", PolicyDocument=policy)
        made = iam.create_access_key(UserName=user)["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", made["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", made["SecretAccessKey"])
        monkeypatch.setenv("S3_BUCKET", bucket)
        monkeypatch.setenv("S3_PREFIX", PREFIX)
        judge("0")
        return bucket

    yield use
    judge("inf")


@pytest.mark.services
def test_forgetting_does_with_its_policy_by_moto_s_iam(keys_of: Callable[[str], str]) -> None:
    work(Bucket(keys_of("worker"), PREFIX))
    bucket = Bucket(keys_of("forget"), PREFIX)
    deletion = Deletion(bucket)
    # Of many at once, moto asks for s3:DeleteObjects, a right that AWS does not have.
    assert [deletion._delete_one(each) for each in list(deletion.of_all())] == ["", ""]
    assert list(deletion.of_all()) == []
    with pytest.raises(PermanentStorageError, match="AccessDenied"):
        bucket.put(JOB_ID, PNG, b"picture", b"{}", "image/png")


@pytest.mark.services
def test_worker_and_producer_do_with_their_policies_by_moto_s_iam(keys_of: Callable[[str], str]) -> None:
    work(Bucket(keys_of("worker"), PREFIX))
    with pytest.raises(PermanentStorageError, match="AccessDenied"):
        Bucket(keys_of("worker"), "elsewhere").check()
    bucket = Bucket(keys_of("producer"), PREFIX)
    produce(bucket)
    with pytest.raises(PermanentStorageError, match="AccessDenied"):
        bucket.put(JOB_ID, PNG, b"picture", b"{}", "image/png")
    with pytest.raises(PermanentStorageError, match="AccessDenied"):
        bucket.delete(JOB_ID, PNG)


@pytest.mark.services
def test_the_doctor_is_content_with_the_producer_s_policy_by_moto_s_iam(
    keys_of: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.cli.doctor.importlib.util.find_spec", lambda name: None)
    keys_of("producer")
    findings: list[Finding] = list(_bucket(session()))
    assert findings
    assert all(finding.ok for finding in findings), findings
