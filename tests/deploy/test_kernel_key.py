"""The key that signs compiled code is with workers, and nowhere else: who has it runs code on them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy import new_secrets
from tests.deploy.compose import parsed
from tests.deploy.processes import DEPLOY
from worker.contract.settings import worker_settings

KEY, SECRET = "SMALLCAT_KERNEL_CACHE_KEY", "KERNEL_CACHE_SECRET"


def test_compose_gives_it_to_workers_alone(tmp_path: Path) -> None:
    having = {
        name
        for name, service in parsed()["services"].items()
        if KEY in service.get("environment", {}) or SECRET in str(service)
    }
    assert having == {"worker"}
    new_secrets.main(tmp_path / ".env")
    [key] = re.findall(rf"^{SECRET}=(.+)$", (tmp_path / ".env").read_text(), re.MULTILINE)
    assert worker_settings({KEY: key}).kernel_cache_key == key


@pytest.mark.parametrize("folder", ["kubernetes", "systemd"])
def test_no_file_that_several_services_read_has_it(folder: str) -> None:
    """In Kubernetes it is in the workers' secret; under systemd in a file that their units alone read."""
    for path in (DEPLOY / folder).rglob("*.*"):
        lines = path.read_text().splitlines()
        assert not [line for line in lines if KEY in line and not line.lstrip().startswith("#")], path
    readers = [
        path.name
        for path in (DEPLOY / "systemd").glob("*.service")
        if "EnvironmentFile=-/etc/smallcat/worker\n" in path.read_text()
    ]
    assert readers == ["smallcat-worker@.service"]


def test_images_have_no_key() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert not [line for line in lines if KEY in line and not line.startswith("#")]
