"""Tables of the results of the benchmark of latency under load."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from tests.benchmarks.policies import EARLY, MIX, OTHERS, PADDED, SMALLCAT, STATIC
from tests.benchmarks.simulation import Point

#: The target: smallcat's latencies over those of static batches, at most, and at which load.
TARGET, TARGET_LOAD = 0.6, 0.7


def shown(title: str, capacities: dict[str, float], points: Sequence[Point]) -> Table:
    """A table of points: latencies in seconds, by load and policy."""
    table = Table(title=title, title_justify="left")
    for heading in ("load", "policy", "jobs", "slowdown", "images/s", "mean", "p50", "p95", "p99"):
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
    for steps in MIX:
        table.add_column(f"{steps} steps:\nmean, p95", justify="right", no_wrap=True)
    for load in dict.fromkeys(point.load for point in points):
        for point in (each for each in points if each.load == load):
            if point.per_s is None:
                past = f"{point.policy}: above its capacity of {capacities[point.policy]:.3g} images/s"
                table.add_row(f"{load:.0%}", past)
                continue
            whole = point.latency["all"]
            each = [point.latency.get(str(steps)) for steps in MIX]
            table.add_row(
                f"{load:.0%}",
                point.policy,
                str(point.jobs),
                "" if point.slowed is None else f"{point.slowed:.2f}",
                *(f"{value:.3g}" for value in (point.per_s, whole.mean, whole.p50, whole.p95, whole.p99)),
                *(f"{part.mean:.3g}, {part.p95:.3g}" if part else "" for part in each),
            )
        table.add_section()
    return table


def ratios(points: Sequence[Point], policy: str, base: str) -> dict[str, float]:
    """Latencies of `policy` over those of `base` at the target's load; empty if one of them has none."""
    at = {point.policy: point.latency for point in points if point.load == TARGET_LOAD and point.latency}
    if policy not in at or base not in at:
        return {}
    return {
        f"{figure}, {jobs}": getattr(at[policy][group], figure) / getattr(at[base][group], figure)
        for group, jobs in (("all", "all jobs"), ("20", "20 steps"))
        for figure in ("mean", "p95")
        if group in at[policy]
    }


def targets(
    real: tuple[dict[str, float], Sequence[Point]], simulation: tuple[dict[str, float], Sequence[Point]]
) -> Table:
    """The targets, the measured and simulated ratios, and those of the best simulated policy."""
    table = Table(title=f"smallcat over static batches at {TARGET_LOAD:.0%} load", title_justify="left")
    for heading in ("", "target", "measured", "simulated", "best policy, simulated"):
        table.add_column(heading, justify="right" if heading else "left")
    for base, delivery in ((STATIC, "delivered together"), (EARLY, "delivered early")):
        measured, expected = ratios(real[1], SMALLCAT, base), ratios(simulation[1], SMALLCAT, base)
        best = [ratios(simulation[1], name, base) for name in (SMALLCAT, *OTHERS)]
        for what, ratio in expected.items():
            least = min(each[what] for each in best if each)
            table.add_row(
                f"{what}, {delivery}",
                f"<= {TARGET}",
                _verdict(measured.get(what), lambda value: value <= TARGET),
                _verdict(ratio, lambda value: value <= TARGET),
                f"{least:.2f}",
            )
    for base in (STATIC, PADDED):
        pairs = [
            capacities[SMALLCAT] / capacities[base] if base in capacities else None
            for capacities in (real[0], simulation[0])
        ]
        cells = [_verdict(pair, lambda value: value >= 1) for pair in pairs]
        table.add_row(f"throughput at saturation, over {base}", ">= 1", *cells, "")
    return table


def _verdict(value: float | None, holds: Callable[[float], bool]) -> str:
    return "" if value is None else f"{value:.2f} {'met' if holds(value) else 'MISSED'}"
