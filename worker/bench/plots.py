"""Plots of a benchmark's results. Only this module imports matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from worker.bench.peer_report import PeerReport
from worker.bench.report import Cat, Point, Rate, Report

#: A colour for each backend, distinct for colour-blind readers as well (Okabe and Ito, 2008).
COLOURS = {"naive": "#D55E00", "xformers": "#0072B2", "sdpa": "#009E73", "auto": "#CC79A7"}
#: Characters in a line of a caption.
CAPTION = 125

# The PNG backend, which needs no display.
mpl.use("Agg")


def draw(report: Report, folder: Path) -> list[Path]:
    """Write a PNG to `folder` for each experiment that has figures. Returns their paths."""
    drawn = []
    if any(each.seconds is not None for each in report.cats):
        drawn.append(_saved(_cats(report.cats), report.conditions("a"), folder / "small-cat.png"))
    if any(each.milliseconds is not None for each in report.points):
        drawn.append(_saved(_points(report.points), report.conditions("b"), folder / "attention.png"))
    if any(each.images_per_s is not None for each in report.rates):
        drawn.append(_saved(_rates(report.rates), report.conditions("c"), folder / "images-per-second.png"))
    return drawn


def draw_peers(report: PeerReport, folder: Path) -> list[Path]:
    """Write a PNG of experiment d to `folder`, if it has figures. Returns its path."""
    shown = [each for each in report.peers if each.images_s]
    if not shown:
        return []
    figure, (axes,) = _figure(1, height=1.8 + 0.5 * len(shown))
    colours = ["#D55E00" if each.peer == "smallcat" else "#0072B2" for each in shown]
    rates = [each.images_s or 0.0 for each in shown]
    bars = axes.barh([each.title for each in shown], rates, height=0.6, color=colours, alpha=0.85)
    ratios = [report.ratio(each) for each in shown]
    texts = [
        f"{rate:.3g} images/s" + (f", {ratio:.2f} times" if ratio else "")
        for rate, ratio in zip(rates, ratios, strict=True)
    ]
    axes.bar_label(bars, labels=texts, padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(rates))
    axes.set_xlabel("images/s in a steady state")
    axes.set_title("Beside what people would use instead (times diffusers one at a time)")
    return [_saved(figure, report.conditions, folder / "peers.png")]


def _cats(cats: Sequence[Cat]) -> Figure:
    shown = [each for each in cats if each.seconds is not None]
    figure, (axes,) = _figure(1, height=1.6 + 0.45 * len(shown))
    bars = axes.barh(
        [str(each.setup) for each in shown],
        [each.seconds or 0.0 for each in shown],
        height=0.6,
        color=[COLOURS.get(each.setup.attention) for each in shown],
        alpha=0.85,
    )
    axes.bar_label(bars, fmt="%.2f s", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("seconds")
    axes.set_title('"a small cat", alone: with and without memory-efficient attention')
    return figure


def _points(points: Sequence[Point]) -> Figure:
    has_memory = any(each.memory_mib for each in points)
    figure, panels = _figure(2 if has_memory else 1)
    _curves(panels[0], points, lambda each: each.milliseconds, powers={"N²": 2})
    panels[0].set_title("Time of one attention layer")
    panels[0].set_ylabel("milliseconds")
    if has_memory:
        _curves(panels[1], points, lambda each: each.memory_mib, powers={"N²": 2, "N": 1})
        panels[1].set_title("Memory of one attention layer")
        panels[1].set_ylabel("MiB beyond its inputs")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return figure


def _curves(
    axes: Axes,
    points: Sequence[Point],
    value: Callable[[Point], float | None],
    powers: dict[str, int],
) -> None:
    """A line for each backend over the picture's side, both logarithmic, with guides for `powers` of N."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ends = []
    for backend in dict.fromkeys(each.attention for each in points):
        own = [each for each in points if each.attention == backend]
        measured = [(each.side_px, each.tokens, number) for each in own if (number := value(each))]
        if not measured:
            continue
        missing = next((each for each in own if each.left_out), None)
        why = f" ({missing.side_px} px {missing.left_out})" if missing else ""
        sides, _, values = zip(*measured, strict=True)
        axes.plot(sides, values, "o-", color=COLOURS.get(backend), label=f"{backend}{why}")
        ends.append(measured[-1])
    limits = axes.get_ylim()
    sizes = sorted({(each.side_px, each.tokens) for each in points})
    for (name, power), style in zip(powers.items(), ("--", ":"), strict=False):
        # The first guide meets the end of the highest line, the second one that of the lowest line.
        _, tokens, number = (max if style == "--" else min)(ends, key=lambda end: end[2] / end[1])
        guide = [number * (each / tokens) ** power for _, each in sizes]
        sides_px = [side for side, _ in sizes]
        axes.plot(sides_px, guide, style, color="black", linewidth=1, label=f"grows as {name}", zorder=3)
    axes.set_ylim(limits)
    axes.set_xticks(sorted({each.side_px for each in points}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda side, _: f"{side:g}"))
    axes.minorticks_off()
    axes.set_xlabel("side of the picture, px (N tokens: its square)")
    axes.grid(alpha=0.3)


def _rates(rates: Sequence[Rate]) -> Figure:
    figure, (axes,) = _figure(1)
    for setup in dict.fromkeys(each.setup for each in rates):
        measured = [
            (each.jobs, each.images_per_s)
            for each in rates
            if each.setup == setup and each.images_per_s is not None
        ]
        if measured:
            jobs, values = zip(*measured, strict=True)
            style = "o-" if setup.compiled else "o--"
            axes.plot(jobs, values, style, color=COLOURS.get(setup.attention), label=str(setup))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({each.jobs for each in rates}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda jobs, _: f"{jobs:g}"))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("jobs in a batch")
    axes.set_ylabel("images/s")
    axes.set_title("Throughput")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _figure(panels: int, height: float = 4.8) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(10, height), dpi=150, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _saved(figure: Figure, caption: str, path: Path) -> Path:
    figure.supxlabel(textwrap.fill(caption, CAPTION), fontsize="x-small", color="0.35")
    figure.savefig(path)
    return path
