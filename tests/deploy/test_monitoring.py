"""Alerts, runbook, dashboard: the files are as the code makes them, alerts fire, each query has data."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.embedded.stack import Stack
from deploy.monitoring.__main__ import DASHBOARD, RULES, RULES_OBJECT, files
from deploy.monitoring.alerts import ALERTS
from deploy.monitoring.dashboard import RATE, dashboard, panels
from producer import submit_job
from tests.deploy.alert_examples import EXAMPLES
from tests.deploy.processes import ROOT, WORKER_S, running
from tests.worker.health.probes import free_port, wait_for
from worker.contract.record import State
from worker.state.redis_client import connect

RULES_OF = {rule["alert"]: rule for rule in yaml.safe_load((ROOT / RULES).read_text())["groups"][0]["rules"]}


def test_the_files_are_as_the_code_makes_them() -> None:
    for name, text in files().items():
        assert (ROOT / name).read_text("utf-8") == text, "run `python -m deploy.monitoring`"


def test_every_alert_leads_to_its_part_of_the_runbook() -> None:
    for alert in ALERTS:
        path, _, anchor = RULES_OF[alert.name]["annotations"]["runbook_url"].partition("#")
        headings = re.findall(r"^## (\w+)$", (ROOT / path).read_text("utf-8"), re.MULTILINE)
        assert anchor in map(str.lower, headings)
    assert (
        "https://example.org/docs/runbook.md#smallcatredisaway" in files("https://example.org/docs/")[RULES]
    )


def test_alerts_and_panels_read_metrics_that_are_documented() -> None:
    known = re.findall(
        r"^\| `(smallcat_\w+)`", (ROOT / "docs/operations.md").read_text("utf-8"), re.MULTILINE
    )
    read = [alert.expr for alert in ALERTS] + [expr for panel in panels() for expr, _ in panel.queries]
    named = {name for expr in read for name in re.findall(r"\bsmallcat_\w+", expr)}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in named} <= set(known)


def _promtool(*words: str) -> str:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool, as Debian's prometheus has it")
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kubernetes_has_the_same_rules() -> None:
    object_ = yaml.safe_load((ROOT / RULES_OBJECT).read_text())
    assert (object_["apiVersion"], object_["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert object_["spec"] == yaml.safe_load((ROOT / RULES).read_text())


@pytest.mark.services
@pytest.mark.parametrize("job", ["smallcat-worker", "smallcat/smallcat", "monitoring/smallcat-workers"])
def test_a_target_that_never_answered_is_known_by_the_name_of_its_job(job: str, tmp_path: Path) -> None:
    rule = RULES_OF["SmallcatTargetDown"]
    firing = {
        "exp_labels": {**rule["labels"], "job": job, "instance": "a"},
        "exp_annotations": rule["annotations"],
    }
    series = {"series": f'up{{job="{job}", instance="a"}}', "values": "0x30"}
    alerts = {"eval_time": "30m", "alertname": "SmallcatTargetDown", "exp_alerts": [firing]}
    tests = [{"interval": "1m", "input_series": [series], "alert_rule_test": [alerts]}]
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ROOT / RULES)], "tests": tests}))
    _promtool("test", "rules", str(file))


@pytest.mark.services
def test_promtool_takes_the_rules() -> None:
    assert f"{len(ALERTS)} rules found" in _promtool("check", "rules", str(ROOT / RULES))


@pytest.mark.services
@pytest.mark.parametrize("name", [alert.name for alert in ALERTS])
def test_the_alert_fires_and_is_quiet(name: str, tmp_path: Path) -> None:
    example, rule = EXAMPLES[name], RULES_OF[name]
    firing = {"exp_labels": {**rule["labels"], **example.labels}, "exp_annotations": rule["annotations"]}
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": key, "values": values} for key, values in series.items()],
            "alert_rule_test": [{"eval_time": "30m", "alertname": name, "exp_alerts": expected}],
        }
        for series, expected in ((example.fires, [firing]), (example.quiet, []))
    ]
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ROOT / RULES)], "tests": tests}))
    _promtool("test", "rules", str(file))


@pytest.mark.services
def test_grafanas_own_types_read_the_whole_dashboard() -> None:
    """By grafana-foundation-sdk, which is made from Grafana's schemas: what it does not know is left out."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    read = Dashboard.from_json(json.loads((ROOT / DASHBOARD).read_text()))
    written = json.loads(JSONEncoder(sort_keys=True).encode(read))
    assert _missing(dashboard(), written) == []


def _missing(wanted: Any, found: Any, where: str = "") -> list[str]:
    """Where `found` lacks something of `wanted`."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [
            each
            for key, value in wanted.items()
            for each in _missing(value, found.get(key), f"{where}.{key}")
        ]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        return [
            each
            for at, (one, other) in enumerate(zip(wanted, found, strict=True))
            for each in _missing(one, other, f"{where}[{at}]")
        ]
    return [] if wanted == found else [f"{where}: {wanted!r} became {found!r}"]


class Prometheus:
    """A real Prometheus with the rules of the file, that scrapes each second."""

    def __init__(self, folder: Path, targets: dict[str, int]) -> None:
        self.port = free_port()
        jobs = [
            {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
            for name, port in targets.items()
        ]
        every = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config = folder / "prometheus.yaml"
        config.write_text(
            json.dumps({"global": every, "rule_files": [str(ROOT / RULES)], "scrape_configs": jobs})
        )
        self.command = [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]

    def ask(self, path: str) -> Any:
        """The data of an answer; None while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}", timeout=5) as answer:
                return json.loads(answer.read())["data"]
        except OSError:
            return None

    def has_data(self, query: str) -> bool:
        found = self.ask(f"query?query={urllib.parse.quote(query)}")
        return bool(found and found["result"])


@pytest.mark.services
@pytest.mark.timeout(300)
def test_every_query_of_the_dashboard_has_data_while_jobs_run(
    new_stack: Callable[..., Stack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but those of a GPU, which there is none of."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus, as Debian has it")
    ports = {name: free_port() for name in ("worker", "queue", "webhooks")}
    stack = new_stack(workers=0)
    for name, value in stack.variables.items():
        monkeypatch.setenv(name, value)
    smallcat = [sys.executable, "-m", "producer"]
    commands = {
        "worker": [sys.executable, "-m", "celery", "-A", "worker", "worker"],
        "queue": [*smallcat, "metrics", "--port", str(ports["queue"])],
        "webhooks": [*smallcat, "webhooks", "run", "--metrics-port", str(ports["webhooks"])],
    }
    prometheus = Prometheus(tmp_path, ports)
    environment = {
        **stack.environment,
        "SMALLCAT_METRICS_PORT": str(ports["worker"]),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    logs = {name: tmp_path / f"{name}.log" for name in (*commands, "prometheus")}

    def shown() -> str:
        return "\n".join(f"{name}: {log.read_text()[-1500:]}" for name, log in logs.items() if log.exists())

    wanted = {expr.replace(RATE, "1m") for panel in panels() if not panel.on_gpu for expr, _ in panel.queries}
    with (
        running(commands["worker"], environment, logs["worker"]),
        running(commands["queue"], environment, logs["queue"]),
        running(commands["webhooks"], environment, logs["webhooks"]),
        running(prometheus.command, environment, logs["prometheus"], tmp_path),
    ):
        wait_for(lambda: prometheus.has_data("smallcat_attempts_total"), shown, WORKER_S)
        # One that comes to a worker of another revision: there is a failure, too.
        strange = submit_job("a small cat", model="smallcat-demo", revision="other")
        with connect(stack.environment["REDIS_URL"], retry_s=1) as client:
            (waits,) = client.keys("smallcat.smallcat-demo@other*")
            client.rename(waits, waits.replace("smallcat.smallcat-demo@other", "smallcat.default"))
        wait_for(lambda: strange.state() is State.FAILED, shown, WORKER_S)
        jobs = [submit_job("a small cat", seed=seed, steps=4) for seed in range(12)]
        assert {job.result(WORKER_S).state for job in jobs} == {State.DONE}, shown()
        lacking: list[str] = []

        def all_have_data() -> bool:
            lacking[:] = [query for query in sorted(wanted) if not prometheus.has_data(query)]
            return not lacking

        wait_for(all_have_data, lambda: f"without data: {lacking} {shown()}", 60)
        groups = prometheus.ask("rules")["groups"]
        assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
