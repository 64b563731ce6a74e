"""One client for a bucket, and another one when the environment means another bucket."""

from __future__ import annotations

import pytest

from producer.session import bucket


def test_a_bucket_is_made_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bucket("pictures", "a") is bucket("pictures", "a")
    assert bucket("pictures", "a") is not bucket("pictures", "b")
    assert bucket("pictures") is not bucket("others")
    monkeypatch.setenv("UNRELATED", "1")
    assert bucket("pictures") is bucket("pictures")


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE"])
def test_a_changed_environment_is_another_bucket(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "one")
    before = bucket("pictures")
    monkeypatch.setenv(name, "two")
    assert bucket("pictures") is not before
    monkeypatch.setenv(name, "one")
    assert bucket("pictures") is before
