"""Write the alert rules, their runbook and the dashboard: `python -m deploy.monitoring [--docs URL]`.

`--docs` is the address of the folder docs/ as the readers of alerts reach it; without it the links are its
path in the repository. Needs PyYAML, which the extra `yaml` has.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from deploy.monitoring.alerts import ALERTS
from deploy.monitoring.dashboard import dashboard

ROOT = Path(__file__).parents[2]
RULES, RUNBOOK = "deploy/prometheus/alerts.yaml", "docs/runbook.md"
DASHBOARD = "deploy/grafana/smallcat.json"
#: The same rules as an object of the Prometheus Operator.
RULES_OBJECT = "deploy/kubernetes/monitoring/rules.yaml"
_MADE = "# Made by `python -m deploy.monitoring`: change deploy/monitoring/alerts.py.\n"


def files(docs: str = "docs") -> dict[str, str]:
    """The text of each file, by its path in the repository."""
    groups = rule_groups(docs)
    return {
        RULES: _as_yaml(groups),
        RULES_OBJECT: _as_yaml(
            {
                "apiVersion": "monitoring.coreos.com/v1",
                "kind": "PrometheusRule",
                "metadata": {"name": "smallcat", "labels": {"app.kubernetes.io/part-of": "smallcat"}},
                "spec": groups,
            }
        ),
        RUNBOOK: runbook(),
        DASHBOARD: json.dumps(dashboard(), indent=2) + "\n",
    }


def rule_groups(docs: str) -> dict[str, Any]:
    """The rules, as Prometheus reads them."""
    found = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.lasts,
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": alert.summary,
                "description": alert.meaning,
                "runbook_url": f"{docs.rstrip('/')}/runbook.md#{alert.name.lower()}",
            },
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "smallcat", "rules": found}]}


def _as_yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, width=1_000)
    return _MADE + text


def runbook() -> str:
    """What to do at each alert, as Markdown."""
    lines = [
        "# Runbook",
        "",
        "<!-- Made by `python -m deploy.monitoring`: change deploy/monitoring/alerts.py. -->",
        "",
        "What each alert of `deploy/prometheus/alerts.yaml` means, and what to do.",
        "[Operations](operations.md#watching) has the metrics.",
        "",
    ]
    for alert in ALERTS:
        lasts = "at once" if alert.lasts == "0m" else f"after {alert.lasts}"
        lines += [f"## {alert.name}", "", f"{alert.summary} {alert.meaning}", ""]
        lines += [f"It fires {lasts}, as {alert.severity}, while this has a result:", ""]
        lines += ["```promql", alert.expr, "```", ""]
        lines += [f"{number}. {step}" for number, step in enumerate(alert.steps, 1)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(prog="python -m deploy.monitoring", description=__doc__)
    parser.add_argument("--docs", default="docs", help="where readers of alerts find docs/, such as an URL")
    for name, text in files(parser.parse_args().docs).items():
        (ROOT / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
