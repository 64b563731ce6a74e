"""One session for an environment, and in it one client for each bucket; a changed environment has its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from producer.ingest.submit_file import make_ingest, make_plan, make_variants
from producer.ingest.types import Options, SilentDisplay
from producer.session import FEEDER_RETRY_S, session
from tests.conftest import EmptyBucket
from worker.contract.errors import SettingsError


def test_a_session_is_made_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    before = session()
    monkeypatch.setenv("UNRELATED", "1")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: session(), range(64))) == {before}
    assert before.redis is session().redis
    assert before.records is session().records


def test_a_bucket_is_made_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_BUCKET", "pictures")
    monkeypatch.setenv("S3_PREFIX", "a")
    bucket = session().bucket
    assert bucket is not None
    assert bucket.root == "s3://pictures/a/"
    assert bucket is session().bucket_named("pictures")
    assert bucket is session().bucket_of("s3://pictures/elsewhere/x.png")
    # Whoever waits longer for Redis reads the same bucket.
    assert bucket is session(FEEDER_RETRY_S).bucket
    other = session().bucket_of("s3://others/x.png")
    assert other is not bucket
    assert other.root == "s3://others/"
    monkeypatch.setenv("S3_PREFIX", "b")
    assert session().bucket is not bucket


def test_without_a_bucket_there_is_none() -> None:
    assert session().bucket is None


@pytest.mark.parametrize(
    "name",
    ["AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "SMALLCAT_RECORD_TTL_S", "REDIS_URL"],
)
def test_a_changed_environment_is_another_session(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    values = {"SMALLCAT_RECORD_TTL_S": ("1", "2"), "REDIS_URL": ("redis://one", "redis://two")}
    one, two = values.get(name, ("one", "two"))
    monkeypatch.setenv(name, one)
    before = session()
    monkeypatch.setenv(name, two)
    assert session() is not before
    monkeypatch.setenv(name, one)
    assert session() is before


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE"])
def test_a_changed_environment_is_another_bucket(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "one")
    before = session().bucket_named("pictures")
    monkeypatch.setenv(name, "two")
    assert session().bucket_named("pictures") is not before
    monkeypatch.setenv(name, "one")
    assert session().bucket_named("pictures") is before


def test_a_misspelt_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMOUT_S", "1")
    with pytest.raises(SettingsError, match="Did you mean SMALLCAT_SUBMIT_TIMEOUT_S"):
        session()


def test_a_submission_waits_for_redis_as_set_and_a_feeder_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "3")
    assert session().redis_retry_s == 3
    assert session(FEEDER_RETRY_S).redis_retry_s == 60
    assert session(FEEDER_RETRY_S).redis is not session().redis


def test_whoever_waits_for_a_bucket_waits_for_four_tries(
    s3_environment: EmptyBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handles, galleries, prompt files and feeders alike."""
    made: list[tuple[str, int]] = []

    def bucket(name: str, prefix: str = "", *, attempts: int = 8, **_: object) -> object:
        made.append((name, attempts))
        return object()

    monkeypatch.setattr("worker.storage.bucket.Bucket", bucket)
    (tmp_path / "p.txt").write_text("a cat\n")
    variants = make_variants({}, 1, None, {}, None, None, literal=False)
    plan = make_plan([str(tmp_path / "p.txt")], file_format=None, variants=variants)
    make_ingest(plan, Options(), SilentDisplay(), tmp_path / "pictures")
    session().bucket_of(f"s3://{s3_environment.name}-2/x.png")
    assert made == [(s3_environment.name, 4), (f"{s3_environment.name}-2", 4)]
