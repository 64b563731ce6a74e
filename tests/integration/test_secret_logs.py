"""What a worker logs at DEBUG has no secrets and no prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from deploy.embedded.stack import Stack
from producer import submit_job
from tests.deploy.processes import WORKER_S, running
from worker.contract.record import State


@pytest.mark.services
@pytest.mark.timeout(200)
@pytest.mark.parametrize("form", ["human", "json"])
def test_a_worker_at_debug_logs_neither_secrets_nor_prompts(
    form: str, new_stack: Callable[..., Stack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, log = new_stack(workers=0), tmp_path / "worker.log"
    for name, value in stack.variables.items():
        monkeypatch.setenv(name, value)
    secrets = {
        "prompt": "a unicorn that nobody knows of",
        "negative prompt": "rainbows that nobody likes",
        "token": "token-of-the-session",
        "key": stack.variables["AWS_SECRET_ACCESS_KEY"],
        "password": str(urlsplit(stack.variables["REDIS_URL"]).password),
    }
    environment = {
        **stack.environment,
        "AWS_SESSION_TOKEN": secrets["token"],
        "SMALLCAT_LOG": form,
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, "-m", "celery", "-A", "worker", "worker", "--loglevel", "DEBUG"]
    with running(command, environment, log) as process:
        job = submit_job(secrets["prompt"], negative_prompt=secrets["negative prompt"], steps=2)
        assert job.result(WORKER_S).state is State.DONE, log.read_text()[-3000:]
        process.terminate()
        process.wait(60)
    text = log.read_text()
    assert "DEBUG" in text
    if form == "json":
        assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
    assert [name for name, secret in secrets.items() if secret in text] == []
