"""The Grafana dashboard: its rows, its panels and their queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: What a query is followed by in the legend: Grafana puts labels in.
Query = tuple[str, str]
#: Rates are taken over it: Grafana makes it fit the scrapes and the time that is shown.
RATE = "$__rate_interval"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_HEIGHT, _ACROSS, _WIDTH = 8, 3, 24


@dataclass(frozen=True)
class Panel:
    """One panel: a curve for each result of each query."""

    title: str
    #: As Grafana names units.
    unit: str
    queries: tuple[Query, ...]
    #: What its reader should know.
    text: str = ""
    #: Whether its metrics are there on a GPU alone.
    on_gpu: bool = False


def _quantiles(metric: str) -> tuple[Query, ...]:
    by = f"sum by (le) (rate({metric}_bucket[{RATE}]))"
    return tuple(
        (f"histogram_quantile({share}, {by})", name) for share, name in ((0.5, "half"), (0.95, "95%"))
    )


def _rate(metric: str, by: str = "", what: str = "") -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({metric}{what}[{RATE}]))"


def _padding() -> str:
    padded = _rate("smallcat_step_padded_rows_total")
    return f"{padded} / ({padded} + {_rate('smallcat_step_rows_sum')})"


ROWS: dict[str, tuple[Panel, ...]] = {
    "The queue": (
        Panel(
            "Jobs that wait",
            "short",
            (
                (
                    "sum by (model, tenants) (max by (model, revision, tenants) (smallcat_queue_depth))",
                    "{{model}}, of tenants: {{tenants}}",
                ),
            ),
        ),
        Panel(
            "Age of the oldest",
            "s",
            (
                (
                    "max by (model, tenants) (smallcat_queue_oldest_seconds)",
                    "{{model}}, of tenants: {{tenants}}",
                ),
            ),
        ),
        Panel(
            "In flight and workers",
            "short",
            (
                (
                    "sum by (model) (max by (model, revision) (smallcat_queue_jobs_in_flight))",
                    "{{model}}: jobs in flight",
                ),
                ("sum by (model) (max by (model, revision) (smallcat_workers))", "{{model}}: workers"),
            ),
        ),
        Panel("Wait in the queue", "s", _quantiles("smallcat_queued_seconds")),
        Panel("Redis answers", "bool_yes_no", (("min(smallcat_redis_up)", "Redis"),)),
        Panel("Workers that are paused", "short", (("sum(smallcat_paused)", "paused"),)),
    ),
    "Jobs": (
        Panel(
            "Pictures a second",
            "ops",
            ((_rate("smallcat_jobs_total", what='{outcome="rendered"}'), "pictures"),),
        ),
        Panel("Jobs by outcome", "ops", ((_rate("smallcat_jobs_total", "outcome"), "{{outcome}}"),)),
        Panel(
            "Failures, attempts that failed, and jobs given back, by reason",
            "ops",
            (
                (
                    _rate("smallcat_jobs_total", "outcome, reason", '{outcome=~"failed|retried|given_back"}'),
                    "{{outcome}}: {{reason}}",
                ),
            ),
            "Empty while there were none.",
        ),
        Panel(
            "Attempts, redeliveries, messages set aside",
            "ops",
            (
                (_rate("smallcat_attempts_total"), "attempts"),
                (_rate("smallcat_redeliveries_total"), "redeliveries"),
                (_rate("smallcat_messages_set_aside_total", "reason"), "set aside: {{reason}}"),
            ),
        ),
        Panel(
            "With workers",
            "short",
            (("sum(smallcat_jobs_in_flight)", "jobs in flight"), ("sum(smallcat_leases)", "messages held")),
        ),
        Panel(
            "What runs",
            "short",
            (
                (
                    "count by (smallcat, torch, model) (smallcat_build_info)",
                    "{{smallcat}}, torch {{torch}}, {{model}}",
                ),
            ),
        ),
    ),
    "Where time goes": (
        Panel("Text", "s", _quantiles("smallcat_text_encoded_seconds")),
        Panel("In the engine", "s", _quantiles("smallcat_rendered_seconds")),
        Panel("A step", "s", _quantiles("smallcat_step_seconds")),
        Panel("Decode", "s", _quantiles("smallcat_decoded_seconds")),
        Panel("File", "s", _quantiles("smallcat_encoded_seconds")),
        Panel("Upload", "s", _quantiles("smallcat_uploaded_seconds")),
    ),
    "The GPU": (
        Panel(
            "Rows of a step",
            "short",
            ((f"{_rate('smallcat_step_rows_sum')} / {_rate('smallcat_step_rows_count')}", "mean"),),
            "Low while jobs wait: the batches are not full.",
        ),
        Panel(
            "Padding",
            "percentunit",
            ((_padding(), "rows beside those of jobs"),),
        ),
        Panel(
            "Time in steps",
            "percentunit",
            ((_rate("smallcat_step_seconds_sum", "instance"), "{{instance}}"),),
        ),
        Panel("Out of memory", "ops", ((_rate("smallcat_out_of_memory_total", "instance"), "{{instance}}"),)),
        Panel("Memory", "bytes", (("smallcat_gpu_memory_bytes", "{{instance}}: {{what}}"),), on_gpu=True),
        Panel(
            "Utilisation",
            "percentunit",
            (("smallcat_gpu_utilisation_ratio", "{{instance}}"),),
            "As the driver counts. Needs nvidia-ml-py, which the extra `cuda` has.",
            on_gpu=True,
        ),
    ),
    "Webhooks": (
        Panel("Notifications that wait", "short", (("max(smallcat_webhooks_waiting)", "wait"),)),
        Panel("Attempts", "ops", ((_rate("smallcat_webhooks_total", "ended"), "{{ended}}"),)),
        Panel("Given up", "short", (("max(smallcat_webhooks_given_up)", "given up"),)),
    ),
}


def panels() -> tuple[Panel, ...]:
    """All panels."""
    return tuple(panel for row in ROWS.values() for panel in row)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's JSON."""
    shown: list[dict[str, Any]] = []
    number, y = 1, 0
    for title, row in ROWS.items():
        place = {"h": 1, "w": _WIDTH, "x": 0, "y": y}
        shown.append(
            {"type": "row", "id": number, "title": title, "collapsed": False, "gridPos": place, "panels": []}
        )
        number, y = number + 1, y + 1
        for place_in_row, panel in enumerate(row):
            down, across = divmod(place_in_row, _ACROSS)
            width = _WIDTH // _ACROSS
            place = {"h": _HEIGHT, "w": width, "x": across * width, "y": y + down * _HEIGHT}
            shown.append(_panel(panel, number, place))
            number += 1
        y += -(-len(row) // _ACROSS) * _HEIGHT
    source = {"name": "datasource", "type": "datasource", "label": "Prometheus", "query": "prometheus"}
    return {
        "uid": "smallcat",
        "title": "smallcat",
        "tags": ["smallcat"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "schemaVersion": 39,
        "fiscalYearStartMonth": 0,
        "templating": {"list": [source]},
        "annotations": {"list": []},
        "panels": shown,
    }


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + at),
            "datasource": _SOURCE,
            "expr": expr,
            "legendFormat": legend,
            "range": True,
        }
        for at, (expr, legend) in enumerate(panel.queries)
    ]
    return {
        "type": "timeseries",
        "id": number,
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}},
    }
