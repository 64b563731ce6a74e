"""compose.yaml: valid by its schema, without default passwords, and its services run, without Docker."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path

import pytest
import redis

from deploy import new_secrets
from producer.webhooks.secrets import Secrets
from tests.deploy.compose import FILE, Machine, interpolated, parsed
from tests.deploy.processes import ROOT, WORKER_S, command_lines, here, running
from tests.worker.health.probes import wait_for
from worker.contract.settings import variables


def secrets_of(env: Path) -> dict[str, str]:
    lines = [line for line in env.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


# Passwords


def test_secrets_are_made_once_and_for_their_owner_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = tmp_path / ".env"
    assert new_secrets.main(env) == 0
    assert stat.S_IMODE(env.stat().st_mode) == 0o600
    first = secrets_of(env)
    assert set(first) == set(new_secrets.names(FILE.read_text()))
    assert len(set(first.values())) == len(first)
    assert all(re.fullmatch("(whsec_)?[0-9a-zA-Z+/=]{20,}", value) for value in first.values())
    Secrets(first["WEBHOOK_SECRET"], "")  # Raises where it is none.
    shown = capsys.readouterr()
    assert not [value for value in first.values() if value in shown.out + shown.err]

    assert new_secrets.main(env) == 1
    assert "left alone" in capsys.readouterr().err
    assert secrets_of(env) == first


def test_there_is_no_default_password() -> None:
    """Without `make secrets` Compose refuses the file, and no secret has a value in it."""
    text = FILE.read_text()
    with pytest.raises(KeyError):
        interpolated(text, {})
    for name in re.findall(r"\$\{(\w+)", text):
        if re.search("PASSWORD|SECRET|_KEY", name):
            assert not re.search(rf"\${{{name}:-", text), name
    for service in parsed()["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|ACCESS_KEY|REDIS_URL|AUTH$", name):
                assert "${" in value, name


# What the file says


def test_each_service_is_confined_and_listens_on_loopback_alone() -> None:
    for name, service in parsed()["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "healthcheck" in service or name == "client", name


def test_the_settings_are_there_are() -> None:
    names = {name for service in parsed()["services"].values() for name in service.get("environment", {})}
    assert {name for name in names if name.startswith("SMALLCAT_")} <= set(variables())


@pytest.mark.services
def test_the_file_is_valid_by_the_schema_of_compose() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", FILE],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# What the services do


def status_of(url: str, password: str = "") -> int:
    request = urllib.request.Request(url)  # noqa: S310 - of this machine
    if password:
        request.add_header("Authorization", f"Basic {b64encode(password.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.services
@pytest.mark.timeout(400)
def test_the_services_start_in_their_order_are_healthy_and_draw(tmp_path: Path) -> None:
    """All but Grafana, of which there is no package here. Prometheus where the machine has it."""
    new_secrets.main(tmp_path / ".env")
    secrets = secrets_of(tmp_path / ".env")
    machine = Machine(tmp_path, secrets)
    names = ["valkey", "s3", "worker", "http", "webhooks", "flower", "metrics"]
    if shutil.which("prometheus"):
        names.append("prometheus")
    services = {name: machine.service(name) for name in [*names, "client"]}
    with contextlib.ExitStack() as stack:
        processes = {}
        for name in names:
            service = services[name]
            for other in parsed()["services"][name].get("depends_on", {}):
                wait_for(services[other].is_healthy, services[other].shown, 60)
            processes[name] = stack.enter_context(
                running(service.command, service.started(), service.log, tmp_path / name)
            )
        for name in names:
            wait_for(services[name].is_healthy, services[name].shown, WORKER_S)

        client = services["client"]
        submit = [*client.entrypoint, "submit", "a small cat", "--steps", "2", "--wait", "--json"]
        done = subprocess.run(
            submit, cwd=ROOT, env=here(client.started()), capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr + services["worker"].shown()
        assert '"state": "done"' in done.stdout

        # The queue: kept, bounded, and each user with its own rights.
        worker, http = (
            redis.Redis.from_url(services[name].environment["REDIS_URL"]) for name in ("worker", "http")
        )
        assert worker.info("persistence")["aof_enabled"] == 1
        assert worker.info("memory")["maxmemory_policy"] == "noeviction"
        assert worker.info("memory")["maxmemory"] == 2 * 2**30
        for command in (["FLUSHALL"], ["CONFIG", "GET", "*"], ["KEYS", "*"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                http.execute_command(*command)
        with pytest.raises(redis.exceptions.AuthenticationError):
            redis.Redis(port=machine.ports["valkey", 6379]).ping()

        # The bucket: the HTTP API reads, and does not write.
        import boto3
        import botocore.exceptions

        where = services["http"].environment
        bucket = boto3.client(
            "s3",
            endpoint_url=where["AWS_ENDPOINT_URL_S3"],
            region_name=where["AWS_REGION"],
            aws_access_key_id=where["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=where["AWS_SECRET_ACCESS_KEY"],
        )
        assert bucket.list_objects_v2(Bucket="smallcat")["KeyCount"] >= 2
        with pytest.raises(botocore.exceptions.ClientError, match="AccessDenied"):
            bucket.put_object(Bucket="smallcat", Key="x", Body=b"")

        flower = f"http://127.0.0.1:{machine.ports['flower', 5555]}/workers"
        assert status_of(flower) == 401
        assert status_of(flower, f"flower:{secrets['FLOWER_PASSWORD']}") == 200
        if "prometheus" in processes:
            url = f"http://127.0.0.1:{machine.ports['prometheus', 9090]}/api/v1/query?query=sum(up)"

            def scraped() -> bytes:
                with urllib.request.urlopen(url, timeout=10) as answer:
                    return bytes(answer.read())

            wait_for(lambda: b'"3"' in scraped(), lambda: scraped().decode(), 60)

        shown = "\n".join(command_lines(process) for process in processes.values())
        assert not [name for name, value in secrets.items() if value in shown], "every user can read them"
        for name in reversed(names):
            processes[name].send_signal(signal.SIGTERM)
            processes[name].wait(services[name].grace_s)
        assert {name: processes[name].returncode for name in ("worker", "http", "webhooks", "metrics")} == {
            "worker": 0,
            "http": 0,
            "webhooks": 0,
            "metrics": 0,
        }
        assert os.listdir(tmp_path / "volumes" / "valkey")  # noqa: PTH208 - a test of what was kept
