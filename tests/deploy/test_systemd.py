"""The units of deploy/systemd: systemd takes them; what they start is ready, lives and ends as they say."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.deploy.processes import BIN, DEPLOY, WORKER_S, command_lines, running
from tests.worker.health.probes import free_port, wait_for
from worker.contract.settings import WorkerSettings, variables

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
units = pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)


def entries(unit: Path, instance: str = "0") -> list[tuple[str, str]]:
    """The settings of a unit in their order, with the instance's name in its place."""
    found = re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE)
    return [(name, value.replace("%i", instance)) for name, value in found]


def only(unit: Path, name: str) -> str:
    [value] = [value for each, value in entries(unit) if each == name]
    return value


def environment_of(unit: Path, folder: Path) -> dict[str, str]:
    """What the unit's own lines set, with systemd's folders below `folder`."""
    lines = [value for name, value in entries(unit) if name == "Environment"]
    return {
        name: re.sub(r"^/var/\w+", str(folder), value)
        for name, _, value in (line.partition("=") for line in lines)
    }


def command_of(unit: Path) -> list[str]:
    """As systemd runs it, with the programs of this environment."""
    command = only(unit, "ExecStart").replace("/srv/smallcat/bin", str(BIN)).replace("$$", "$")
    return shlex.split(command)


def seconds(value: str) -> float:
    number, _, unit = re.fullmatch(r"(\d+)()(min|)", value).groups()  # type: ignore[union-attr]
    return float(number) * (60 if unit == "min" else 1)


@units
def test_systemd_finds_nothing_wrong(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    copy = tmp_path / unit.name.replace("@", "@0")
    copy.write_text(unit.read_text().replace("/srv/smallcat/bin", str(BIN)))
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=50)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if unit.stem.rstrip("@") in line]
    assert ours == []


@units
def test_a_unit_restarts_hides_and_sets_only_what_there_is(unit: Path) -> None:
    names = {name for name, value in entries(unit) if name == "Environment" for name in [value.split("=")[0]]}
    assert {name for name in names if name.startswith("SMALLCAT_")} <= set(variables())
    assert only(unit, "Restart") == "always"
    assert only(unit, "StartLimitIntervalSec") == "0", "however long Redis is away"
    assert only(unit, "DynamicUser") == "yes"


def test_a_worker_has_the_gpu_of_its_instance_and_the_time_it_needs() -> None:
    [unit] = [each for each in UNITS if each.name == "smallcat-worker@.service"]
    assert ("Environment", "CUDA_VISIBLE_DEVICES=7") in entries(unit, "7")
    assert seconds(only(unit, "TimeoutStopSec")) > WorkerSettings.model_fields["drain_s"].default


@pytest.mark.services
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", ["smallcat-worker@.service", "smallcat-api.service", "smallcat-webhooks.service"]
)
def test_what_a_unit_starts_tells_systemd_that_it_is_ready_lives_and_ends(
    name: str, stack_env: dict[str, str], tmp_path: Path
) -> None:
    """By the protocol of sd_notify(3): systemd is a socket."""
    unit = DEPLOY / "systemd" / name
    watchdog_s = seconds(only(unit, "WatchdogSec"))
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(address))
        environment = {
            **stack_env,
            **environment_of(unit, tmp_path),
            "CUDA_VISIBLE_DEVICES": "",
            "SMALLCAT_HTTP_PORT": str(free_port()),
            "NOTIFY_SOCKET": str(address),
            # systemd's own has the seconds of the unit; shorter here, so that the test sees several.
            "WATCHDOG_USEC": "1500000",
        }
        log = tmp_path / "log"
        with running(command_of(unit), environment, log, tmp_path) as process:
            told: list[str] = []

            def until(line: str, timeout_s: float) -> None:
                told.clear()
                systemd.settimeout(timeout_s)
                while line not in told:
                    told.extend(systemd.recv(4096).decode().splitlines())

            assert seconds(only(unit, "TimeoutStartSec")) >= WORKER_S
            until("READY=1", WORKER_S)
            assert only(unit, "Type") == "notify"
            assert only(unit, "NotifyAccess") == "all", "the sender is another process than the main one"
            until("STATUS=ready", 30)
            for _ in range(2):
                until("WATCHDOG=1", 5)
            assert watchdog_s >= 30
            process.send_signal(signal.SIGTERM)
            began_s = time.monotonic()
            assert process.wait(seconds(only(unit, "TimeoutStopSec"))) == 0, log.read_text()[-2000:]
            assert time.monotonic() - began_s < 20, "nothing was in flight"


@pytest.mark.services
@pytest.mark.timeout(120)
def test_flower_listens_on_loopback_and_shows_nobody_the_broker(
    stack_env: dict[str, str], tmp_path: Path
) -> None:
    unit, port = DEPLOY / "systemd" / "smallcat-flower.service", free_port()
    environment = {**stack_env, **environment_of(unit, tmp_path), "FLOWER_PORT": str(port)}
    with running(command_of(unit), environment, tmp_path / "log", tmp_path) as process:

        def listens() -> list[str]:
            found = psutil.Process(process.pid).net_connections(kind="inet")
            return [each.laddr.ip for each in found if each.status == "LISTEN" and each.laddr.port == port]

        wait_for(lambda: bool(listens()), lambda: (tmp_path / "log").read_text()[-2000:], 60)
        assert listens() == ["127.0.0.1"]
        assert "redis://" not in command_lines(process)
        assert stack_env["REDIS_URL"].split(":")[2].split("@")[0] not in command_lines(process)
