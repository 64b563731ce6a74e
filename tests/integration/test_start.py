"""A worker with a wrong setting does not start: it prints one sentence with the remedy, and exits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

#: An address at which no server listens.
NOWHERE = "127.0.0.1:9"


def refusal(environment: dict[str, str]) -> str:
    """Start a worker that must refuse to start; return its one sentence."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "worker", "worker"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout
    sentences = [line for line in done.stderr.splitlines() if line.startswith("smallcat: ")]
    assert len(sentences) == 1, done.stderr
    return sentences[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SMALLCAT_MODLE": "x"}, ["SMALLCAT_MODLE", "Did you mean SMALLCAT_MODEL?"]),
        ({"SMALLCAT_MAX_BATCH": "0"}, ["SMALLCAT_MAX_BATCH", "'0'", "1 to 256"]),
        ({"REDIS_URL": "http://localhost"}, ["REDIS_URL", "redis://"]),
        (
            {"REDIS_URL": f"redis://:secret@{NOWHERE}/0", "SMALLCAT_START_TIMEOUT_S": "1"},
            ["out of reach", "REDIS_URL"],
        ),
        ({"REDIS_URL": "redis://localhost/0?ssl_cert_req=none"}, ["'ssl_cert_req'", "'ssl_cert_reqs'"]),
        ({"S3_BUCKET": ""}, ["S3_BUCKET is not set"]),
        ({"S3_BUCKET": "not-there"}, ['"not-there"', "create it"]),
        (
            {"AWS_ENDPOINT_URL_S3": f"http://{NOWHERE}", "SMALLCAT_START_TIMEOUT_S": "1"},
            ["AWS_ENDPOINT_URL_S3"],
        ),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-wrong-wrong-wrong"}, ["AWS_SECRET_ACCESS_KEY"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_stops_the_start(
    stack_env: dict[str, str], change: dict[str, str], words: list[str]
) -> None:
    sentence = refusal({**stack_env, **change})
    for word in words:
        assert word in sentence
    assert "secret@" not in sentence


def test_a_missing_model_stops_the_start(stack_env: dict[str, str], tmp_path: Path) -> None:
    sentence = refusal({**stack_env, "SMALLCAT_MODEL": str(tmp_path / "nothing")})
    assert "SMALLCAT_MODEL" in sentence
