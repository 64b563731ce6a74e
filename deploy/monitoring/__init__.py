"""Alert rules, their runbook and the Grafana dashboard: `python -m deploy.monitoring` writes the files."""
