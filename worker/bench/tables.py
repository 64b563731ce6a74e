"""Tables of a benchmark's results, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from worker.bench.peer_report import PeerReport
from worker.bench.report import Cat, Point, Rate, Report, Setup, growth

#: A row: the setup, keys, figures, and why there are none.
_Row = tuple[Setup, list[str], list[str], str]


def tables(report: Report) -> Iterator[RenderableType]:
    """A table for each experiment that was run, with its conditions below it."""
    for backend, problem in report.refused.items():
        yield Text(f"{backend} is left out: {problem}.\n")
    if report.cats:
        yield cats(report.cats)
        yield _caption(report.conditions("a"))
    if report.points:
        yield points(report.points)
        yield from growths(report.points)
        yield _caption(report.conditions("b"))
    if report.rates:
        yield rates(report.rates)
        yield _caption(report.conditions("c"))


def cats(found: Sequence[Cat]) -> Table:
    """Experiment a; the speed-up is over the baseline of 2022, eager naive attention."""
    baseline = next((each.seconds for each in found if each.setup == Setup("naive", compiled=False)), None)
    rows: list[_Row] = []
    for each in found:
        factor = baseline / each.seconds if baseline and each.seconds else None
        figures = [_number(each.seconds, 3), _number(factor, 2), _number(each.memory_gib, 2)]
        rows.append((each.setup, [], figures, each.left_out))
    names = ["seconds", "speed-up", "GPU memory, GiB"]
    return _of_setups('One picture: "a small cat"', [], names, rows)


def points(found: Sequence[Point]) -> Table:
    """Experiment b: a row for each size, two columns for each backend."""
    backends = list(dict.fromkeys(each.attention for each in found))
    table = Table(title="The UNet's first attention, by the size of the picture", title_justify="left")
    for name in ("px", "tokens", *(f"{backend}, {unit}" for backend in backends for unit in ("ms", "MiB"))):
        table.add_column(name, justify="right")
    by_size: dict[tuple[int, int], dict[str, Point]] = {}
    for each in found:
        by_size.setdefault((each.side_px, each.tokens), {})[each.attention] = each
    for (side_px, tokens), row in sorted(by_size.items()):
        cells: list[str] = []
        for backend in backends:
            point = row[backend]
            figures = [_number(point.milliseconds, 3), _number(point.memory_mib, 1)]
            cells += [escape(point.left_out), ""] if point.left_out else figures
        table.add_row(str(side_px), f"{tokens:,}", *cells)
    return table


def growths(found: Sequence[Point]) -> Iterator[Text]:
    """A line for each backend on how its time and memory grow."""
    for backend in dict.fromkeys(each.attention for each in found):
        time, memory = growth(found, backend)
        if time is not None:
            also = f" and memory as N^{memory:.1f}" if memory is not None else ""
            yield Text(f"{backend}: for N tokens, time grows as N^{time:.1f}{also}")


def rates(found: Sequence[Rate]) -> Table:
    """Experiment c."""
    rows: list[_Row] = []
    for each in found:
        figures = [
            _number(each.images_per_s, 2),
            _number(each.step_ms, 2),
            _number(each.decode_ms, 1),
            _number(each.memory_gib, 2),
        ]
        rows.append((each.setup, [str(each.jobs)], figures, each.left_out))
    names = ["images/s", "ms/step", "ms to decode", "GPU memory, GiB"]
    return _of_setups("Throughput, by jobs in a batch", ["jobs"], names, rows)


def peers(report: PeerReport) -> Iterator[RenderableType]:
    """Experiment d, with its conditions below it."""
    table = Table(title="Beside what people would use instead", title_justify="left")
    table.add_column("", no_wrap=True)
    names = ("images/s", "ratio", "dB", "MHz", "W", "GiB", "first, s")
    for name in names:
        table.add_column(name, justify="right")
    for each in report.peers:
        figures = [
            _number(each.images_s, 3),
            _number(report.ratio(each), 2),
            _number(each.psnr_db, 1),
            _number(each.mhz, 0),
            _number(each.watts, 0),
            _number(each.memory_gib, 2),
            _number(each.first_s, 0),
        ]
        table.add_row(each.title, *([escape(each.left_out)] if each.left_out else figures))
    yield table
    yield _caption(report.conditions)


def _of_setups(title: str, keys: list[str], names: list[str], rows: Sequence[_Row]) -> Table:
    """A table of `rows`, with their setup first; columns without any figure are left out."""
    shown = [column for column in range(len(names)) if any(figures[column] for _, _, figures, _ in rows)]
    table = Table(title=title, title_justify="left")
    for name in ("attention", "runs"):
        table.add_column(name)
    for name in (*keys, *(names[column] for column in shown)):
        table.add_column(name, justify="right")
    for setup, key, figures, left_out in rows:
        cells = [escape(left_out)] if left_out else [figures[column] for column in shown]
        table.add_row(setup.attention, setup.how, *key, *cells)
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _caption(text: str) -> Text:
    return Text(f"{text}\n", style="dim")
