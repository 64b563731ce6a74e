"""`smallcat metrics`: what a fleet is scaled by."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from producer.cli.main import cli
from tests.worker.health.probes import free_port, wait_for
from worker.state.redis_client import connect

ROOT = Path(__file__).parents[3]


def figures(text: str) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels.get("model", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_figures_are_printed_once(environment: dict[str, str]) -> None:
    from producer import submit_job

    for seed in range(3):
        submit_job("a small cat", seed=seed, model="sdxl")
    printed = CliRunner().invoke(cli, ["metrics"], catch_exceptions=False)
    assert printed.exit_code == 0
    found = figures(printed.output)
    assert found["smallcat_queue_jobs_waiting", "sdxl"] == 3
    assert found["smallcat_queue_jobs_in_flight", "sdxl"] == 0
    assert found["smallcat_redis_up", ""] == 1
    # They are no tenant's.
    assert 'smallcat_queue_depth{model="sdxl",revision="",tenants="no"} 3.0' in printed.output
    assert 'smallcat_queue_depth{model="sdxl",revision="",tenants="yes"} 0.0' in printed.output
    assert 0 <= found["smallcat_queue_oldest_seconds", "sdxl"] < 60


def test_how_full_redis_is_is_a_figure_where_it_has_a_limit(environment: dict[str, str]) -> None:
    def shown() -> str:
        return CliRunner().invoke(cli, ["metrics"], catch_exceptions=False).output

    assert "smallcat_redis_memory_ratio" not in shown()
    with connect(environment["REDIS_URL"], retry_s=1) as client:
        client.config_set("maxmemory", 2 * client.info("memory")["used_memory"])
        try:
            assert 0.3 < figures(shown())["smallcat_redis_memory_ratio", ""] < 0.7
        finally:
            client.config_set("maxmemory", 0)


def test_a_prometheus_that_asks_is_told_whether_redis_answers(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "producer", "metrics", "--port", str(port)]
    nowhere = environment | {"REDIS_URL": "redis://127.0.0.1:9/0"}
    with subprocess.Popen(command, cwd=ROOT, env=nowhere, stderr=subprocess.DEVNULL) as served:
        try:
            found: list[str] = []

            def answers() -> bool:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                        found.append(answer.read().decode())
                except OSError:
                    return False
                return True

            wait_for(answers, lambda: "it does not listen")
            shown = figures(found[-1])
            assert shown == {("smallcat_build_info", ""): 1, ("smallcat_redis_up", ""): 0}
        finally:
            served.terminate()
    assert served.returncode == 0
