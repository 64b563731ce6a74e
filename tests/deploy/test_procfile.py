"""The Procfile, run by honcho as it is."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.deploy.processes import BIN, ROOT, WORKER_S, command_lines, here, running
from tests.worker.health.probes import free_port, wait_for


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - of this machine
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.services
@pytest.mark.timeout(240)
def test_honcho_runs_it_and_a_job_becomes_a_picture(stack_env: dict[str, str], tmp_path: Path) -> None:
    http, flower = free_port(), free_port()
    environment = {
        **stack_env,
        "SMALLCAT_HTTP_PORT": str(http),
        "SMALLCAT_HTTP_DATA_DIR": str(tmp_path / "runs"),
        "FLOWER_PORT": str(flower),
        "SMALLCAT_DRAIN_S": "2",
    }
    log = tmp_path / "log"
    with running([str(BIN / "honcho"), "start"], environment, log) as honcho:

        def shown() -> str:
            return log.read_text(errors="replace")[-3000:]

        wait_for(lambda: "Notifications are sent" in log.read_text(), shown, WORKER_S)
        wait_for(lambda: "ready: takes jobs" in log.read_text(), shown, WORKER_S)
        wait_for(lambda: status_of(f"http://127.0.0.1:{http}/readyz") == 200, shown, 60)
        wait_for(lambda: status_of(f"http://127.0.0.1:{flower}/workers") == 200, shown, 60)
        password = stack_env["REDIS_URL"].split(":")[2].split("@")[0]
        assert password not in command_lines(honcho)
        submit = [sys.executable, "-m", "producer", "submit", "a small cat", "--steps", "2", "--wait"]
        done = subprocess.run(
            submit, cwd=ROOT, env=here(environment), capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        honcho.send_signal(signal.SIGTERM)
        honcho.wait(60)
    assert "stopping: 0 jobs in flight" in log.read_text()
