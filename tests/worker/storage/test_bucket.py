"""The bucket, on a real S3 server: what is put is there, whole, and every refusal is one sentence."""

from __future__ import annotations

import base64
import hashlib
import resource
import secrets
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import boto3
import botocore.exceptions
import pytest

from deploy.embedded.stack import BUCKET, Stack
from tests.conftest import EmptyBucket
from tests.worker.storage.servers import SERVERS, UNCHECKED
from worker.contract.choices import ImageFormat
from worker.contract.errors import PermanentStorageError, StorageError, UnknownJobError
from worker.storage.bucket import Bucket

JOB_ID = "0123456789abcdef0123456789abcdef"
PNG, WEBP = ImageFormat.PNG, ImageFormat.WEBP


@pytest.fixture(params=["rclone", *(pytest.param(name, marks=pytest.mark.services) for name in SERVERS)])
def s3(request: pytest.FixtureRequest) -> EmptyBucket:
    """An empty bucket for one test, on each server in turn."""
    if request.param == "rclone":
        server = request.getfixturevalue("servers").s3
    else:
        server = request.getfixturevalue("services")(request.param)
    name = f"test-{secrets.token_hex(4)}"
    bucket = EmptyBucket(name, server.environment(name))
    boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=server.region,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    ).create_bucket(Bucket=bucket.name)
    return bucket


@pytest.fixture
def only_if_checked(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Skips the test on a server that does not check the access key, the secret key or the MD5."""

    def skip(what: str) -> None:
        server = request.node.callspec.params["s3"]
        if what in UNCHECKED.get(server, ()):
            pytest.skip(f"{server} checks no {what}")

    return skip


@pytest.fixture
def storage(s3_environment: EmptyBucket) -> Bucket:
    return Bucket(s3_environment.name, "a/prefix")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """botocore's pauses between its tries, which are noted instead of slept."""
    noted: list[float] = []
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=noted.append))
    return noted


def put(storage: Bucket, picture: bytes = b"picture", record: bytes = b'{"job": 1}') -> None:
    storage.put(JOB_ID, PNG, picture, record, "image/png")


def test_what_was_put_is_there(storage: Bucket) -> None:
    assert storage.find(JOB_ID, PNG) is None
    assert storage.record(JOB_ID) is None
    put(storage)
    assert storage.find(JOB_ID, PNG) == b'{"job": 1}'
    assert storage.record(JOB_ID) == b'{"job": 1}'
    assert storage.get(storage.uri(JOB_ID, PNG)) == b"picture"
    # Another format is another picture.
    assert storage.find(JOB_ID, WEBP) is None


def test_addresses_follow_from_the_id_alone(storage: Bucket, s3_environment: EmptyBucket) -> None:
    assert storage.uri(JOB_ID, PNG) == f"s3://{s3_environment.name}/a/prefix/images/01/{JOB_ID}.png"
    assert storage.root == f"s3://{s3_environment.name}/a/prefix/"
    assert Bucket("bucket").uri(JOB_ID, WEBP) == f"s3://bucket/images/01/{JOB_ID}.webp"
    assert Bucket("bucket").root == "s3://bucket/"


def test_prefixes_do_not_see_each_other(storage: Bucket, s3_environment: EmptyBucket) -> None:
    put(storage)
    assert Bucket(s3_environment.name, "another").find(JOB_ID, PNG) is None
    assert Bucket(s3_environment.name).find(JOB_ID, PNG) is None


def test_putting_twice_is_putting_once(storage: Bucket) -> None:
    put(storage, b"first")
    put(storage, b"second")
    assert storage.get(storage.uri(JOB_ID, PNG)) == b"second"


def test_deleting_leaves_nothing_and_may_be_done_twice(storage: Bucket) -> None:
    put(storage)
    storage.delete(JOB_ID, PNG)
    storage.delete(JOB_ID, PNG)
    assert storage.find(JOB_ID, PNG) is None
    assert storage.record(JOB_ID) is None


def test_a_link_opens_without_keys(storage: Bucket) -> None:
    put(storage)
    link = storage.url(storage.uri(JOB_ID, PNG), expires_s=60)
    with urllib.request.urlopen(link, timeout=10) as answer:  # noqa: S310 - our own server
        assert answer.read() == b"picture"
        assert answer.headers["Content-Type"] == "image/png"


@pytest.mark.parametrize("expires_s", [0, -1, 604_801])
def test_a_link_of_a_life_that_s3_does_not_allow_is_refused(storage: Bucket, expires_s: int) -> None:
    with pytest.raises(ValueError, match="S3 allows 1 to 604,800 seconds"):
        storage.url(storage.uri(JOB_ID, PNG), expires_s)


@pytest.mark.parametrize("prefix", ["a b/ä", "a#b?c=d", "a%20b+c&d"])
def test_any_prefix_works(s3_environment: EmptyBucket, prefix: str) -> None:
    storage = Bucket(s3_environment.name, prefix)
    put(storage)
    uri = storage.uri(JOB_ID, PNG)
    assert storage.get(uri) == b"picture"
    with urllib.request.urlopen(storage.url(uri), timeout=10) as answer:  # noqa: S310 - our own server
        assert answer.read() == b"picture"


@pytest.mark.parametrize(
    "uri", ["", "picture.png", "s3://", "s3://bucket", "s3://bucket/", "http://bucket/key"]
)
def test_what_is_no_address_is_refused(storage: Bucket, uri: str) -> None:
    for ask in (storage.get, storage.url):
        with pytest.raises(ValueError, match="is no s3://bucket/key address"):
            ask(uri)


def test_nothing_at_an_address_is_an_error(storage: Bucket) -> None:
    with pytest.raises(UnknownJobError, match="Nothing is at s3://"):
        storage.get(storage.uri(JOB_ID, PNG))


def test_the_record_is_put_last_and_removed_first(storage: Bucket) -> None:
    """A job with a record is done: a worker that dies between the two leaves none."""
    requests: list[str] = []
    storage._client.meta.events.register(
        "before-send.s3", lambda request, **_: requests.append(f"{request.method} {request.url[-4:]}")
    )
    put(storage)
    storage.delete(JOB_ID, PNG)
    assert requests == ["PUT .png", "PUT json", "DELETE json", "DELETE .png"]


@pytest.mark.parametrize("ending", ["json", "png"])
def test_half_a_job_does_not_count(storage: Bucket, s3_environment: EmptyBucket, ending: str) -> None:
    put(storage)
    key = f"a/prefix/images/01/{JOB_ID}.{ending}"
    storage._client.delete_object(Bucket=s3_environment.name, Key=key)
    assert storage.find(JOB_ID, PNG) is None


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
def test_a_storage_that_is_full_holds_nothing_of_a_job(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full for whatever is larger than 4 KiB, as a disk is that has so much left."""
    with Stack(workers=0) as stack:
        for name, value in stack.variables.items():
            monkeypatch.setenv(name, value)
        storage = Bucket(BUCKET)
        limits = resource.prlimit(stack.s3.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(stack.s3.pid, resource.RLIMIT_FSIZE, (4096, limits[1]))
        picture = secrets.token_bytes(20_000)
        with pytest.raises(StorageError, match="fails"):
            put(storage, picture)
        assert pauses  # It was tried again.
        assert list(storage.below(f"s3://{BUCKET}")) == []
        assert not [path for path in stack.s3.folder.rglob("*") if path.is_file()]
        # A picture that fits while its record does not is no job either, and is replaced.
        with pytest.raises(StorageError, match="fails"):
            put(storage, b"picture", record=secrets.token_bytes(20_000))
        assert storage.record(JOB_ID) is None
        assert storage.find(JOB_ID, PNG) is None
        resource.prlimit(stack.s3.pid, resource.RLIMIT_FSIZE, limits)
        put(storage, picture)
        assert storage.find(JOB_ID, PNG) == b'{"job": 1}'
        assert storage.get(storage.uri(JOB_ID, PNG)) == picture


def test_each_body_is_sent_with_its_md5(storage: Bucket) -> None:
    sent: dict[bytes, str] = {}

    def note(params: dict[str, Any], **_: Any) -> None:
        sent[bytes(params["Body"])] = params["ContentMD5"]

    storage._client.meta.events.register("provide-client-params.s3.PutObject", note)
    put(storage, b"picture", b"{}")
    assert sent == {
        body: base64.b64encode(hashlib.md5(body).digest()).decode()  # noqa: S324 - what S3 asks for
        for body in (b"picture", b"{}")
    }


def test_bytes_that_changed_on_their_way_are_refused(
    storage: Bucket, pauses: list[float], only_if_checked: Callable[[str], None]
) -> None:
    only_if_checked("MD5")

    def damage(params: dict[str, Any], **_: Any) -> dict[str, Any]:
        return params | {"Body": b"damaged"}

    storage._client.meta.events.register("provide-client-params.s3.PutObject", damage)
    with pytest.raises(StorageError, match="fails"):
        put(storage)
    assert storage.find(JOB_ID, PNG) is None


def test_checking_leaves_nothing(storage: Bucket, s3_environment: EmptyBucket) -> None:
    storage.check()
    assert storage._client.list_objects_v2(Bucket=s3_environment.name).get("Contents", []) == []


def test_workers_that_start_together_do_not_disturb_each_other_s_check(storage: Bucket) -> None:
    put(storage)  # s3rver 3.7.1 ends where a folder is emptied while it writes the next object to it
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: storage.check(), range(40)))


def test_many_threads_share_one_client(storage: Bucket) -> None:
    with ThreadPoolExecutor(16) as pool:
        clients = set(pool.map(lambda _: id(storage._client), range(16)))
        assert len(clients) == 1
        ids = [f"{number:032x}" for number in range(32)]
        list(pool.map(lambda job_id: storage.put(job_id, PNG, job_id.encode(), b"{}", "image/png"), ids))
        pictures = pool.map(lambda job_id: storage.get(storage.uri(job_id, PNG)), ids)
        assert list(pictures) == [job_id.encode() for job_id in ids]


# --- refusals ---------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Bucket], Any]] = {
    "put": put,
    "find": lambda storage: storage.find(JOB_ID, PNG),
    "check": lambda storage: storage.check(),
}


@pytest.mark.parametrize("call", ["put", "check"])
def test_a_missing_bucket_is_an_error_with_the_remedy(s3_environment: EmptyBucket, call: str) -> None:
    with pytest.raises(PermanentStorageError) as caught:
        CALLS[call](Bucket("no-such-bucket"))
    sentence = str(caught.value)
    assert sentence.startswith('The bucket "no-such-bucket" refuses (')
    assert sentence.endswith("create it, or set S3_BUCKET.")


def test_no_bucket_at_all_is_an_error_with_the_remedy(s3_environment: EmptyBucket) -> None:
    with pytest.raises(StorageError, match="S3_BUCKET is not set: name the bucket"):
        Bucket("").check()


@pytest.mark.parametrize(
    ("variable", "what"), [("AWS_ACCESS_KEY_ID", "access key"), ("AWS_SECRET_ACCESS_KEY", "secret key")]
)
@pytest.mark.parametrize("call", ["put", "find"])
def test_wrong_keys_are_an_error_with_the_remedy(
    s3_environment: EmptyBucket,
    monkeypatch: pytest.MonkeyPatch,
    only_if_checked: Callable[[str], None],
    variable: str,
    what: str,
    call: str,
) -> None:
    only_if_checked(what)
    monkeypatch.setenv(variable, "x" * 20)
    with pytest.raises(PermanentStorageError) as caught:
        CALLS[call](Bucket(s3_environment.name))
    assert variable in str(caught.value)
    assert str(caught.value).startswith(f'The bucket "{s3_environment.name}" refuses (')


def test_missing_keys_are_an_error_with_the_remedy(
    s3_environment: EmptyBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(PermanentStorageError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        put(Bucket(s3_environment.name))


@pytest.fixture
def nobody(s3_environment: EmptyBucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An endpoint where connections are refused."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{held.getsockname()[1]}")
        yield


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("call", ["put", "find"])
def test_a_server_that_is_down_is_tried_again_and_is_an_error_that_may_pass(
    pauses: list[float], s3_environment: EmptyBucket, call: str
) -> None:
    with pytest.raises(StorageError) as caught:
        CALLS[call](Bucket(s3_environment.name))
    assert not isinstance(caught.value, PermanentStorageError)
    assert "is out of reach" in str(caught.value)
    assert str(caught.value).endswith("check AWS_ENDPOINT_URL_S3.")
    assert len(pauses) >= 2


@pytest.mark.usefixtures("nobody")
def test_a_server_that_is_down_at_the_start_is_an_error_soon(s3_environment: EmptyBucket) -> None:
    began = time.monotonic()
    with pytest.raises(StorageError, match="is out of reach"):
        Bucket(s3_environment.name, attempts=2).check()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("SlowDown", 503, StorageError),
        ("InternalError", 500, StorageError),
        ("InsufficientStorage", 507, PermanentStorageError),
        ("QuotaExceeded", 403, PermanentStorageError),
        ("AccessDenied", 403, PermanentStorageError),
        ("XMinioStorageFull", 507, PermanentStorageError),
        ("SomethingNew", 400, StorageError),
    ],
)
def test_an_answer_is_permanent_where_waiting_does_not_mend_it(
    storage: Bucket, monkeypatch: pytest.MonkeyPatch, code: str, status: int, kind: type[StorageError]
) -> None:
    def refuse(**_: Any) -> None:
        answer = {
            "Error": {"Code": code, "Message": "the reason"},
            "ResponseMetadata": {"HTTPStatusCode": status},
        }
        raise botocore.exceptions.ClientError(answer, "PutObject")  # type: ignore[arg-type]

    monkeypatch.setattr(storage._client, "put_object", refuse)
    with pytest.raises(StorageError) as caught:
        put(storage)
    assert type(caught.value) is kind
    assert f"({code} the reason)" in str(caught.value)
