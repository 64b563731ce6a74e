"""The HTTP API answers probes on a port of its own, too, where a proxy cannot reach them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.worker.health.probes import ask, free_port, wait_until

ROOT = Path(__file__).parents[3]


def test_the_server_is_ready_until_it_is_about_to_end(stack_env: dict[str, str], tmp_path: Path) -> None:
    port, health = free_port(), free_port()
    settings = {"SMALLCAT_HEALTH_PORT": str(health), "SMALLCAT_HTTP_DATA_DIR": str(tmp_path / "runs")}
    command = [sys.executable, "-m", "producer", "serve", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, env=stack_env | settings) as server:
        try:
            wait_until(health, "/ready", 200)
            assert ask(health, "/live")[0] == ask(health, "/startup")[0] == 200
        finally:
            server.terminate()
    assert server.returncode == 0
