"""A worker is ready while Redis and the bucket answer, and let it work."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import EmptyBucket
from worker.contract.errors import PermanentStorageError, StorageError
from worker.jobs.services import not_ready
from worker.storage.bucket import Bucket


def nothing() -> str:
    return ""


def test_a_worker_is_ready_where_both_answer(stack_env: dict[str, str], s3_environment: EmptyBucket) -> None:
    assert not_ready(stack_env["REDIS_URL"], Bucket(s3_environment.name), nothing) == ""


def test_a_redis_that_is_away_is_named_without_its_password(s3_environment: EmptyBucket) -> None:
    reason = not_ready("redis://:secret@127.0.0.1:9/0", Bucket(s3_environment.name), nothing)
    assert "127.0.0.1:9" in reason
    assert "out of reach" in reason
    assert "secret@" not in reason


@pytest.mark.parametrize(
    "change", [{"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, {"AWS_SECRET_ACCESS_KEY": "wrong-wrong-wrong"}]
)
def test_a_bucket_that_is_away_or_refuses_is_named(
    change: dict[str, str],
    stack_env: dict[str, str],
    s3_environment: EmptyBucket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    assert f'"{s3_environment.name}"' in not_ready(
        stack_env["REDIS_URL"], Bucket(s3_environment.name, attempts=1), nothing
    )


@pytest.mark.parametrize("error", [StorageError("It fails."), PermanentStorageError("It refuses.")])
def test_what_the_bucket_says_is_said(error: StorageError, stack_env: dict[str, str]) -> None:
    class Away(Bucket):
        def find(self, *_: object) -> bytes | None:
            raise error

    assert not_ready(stack_env["REDIS_URL"], Away("b"), nothing) == str(error)


def test_a_worker_that_the_bucket_refuses_pictures_of_is_not_ready(
    stack_env: dict[str, str], s3_environment: EmptyBucket
) -> None:
    reasons: list[Callable[[], str]] = [lambda: "The bucket refuses them.", nothing]
    assert [not_ready(stack_env["REDIS_URL"], Bucket(s3_environment.name), each) for each in reasons] == [
        "The bucket refuses them.",
        "",
    ]
