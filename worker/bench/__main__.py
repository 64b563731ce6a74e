"""`python -m worker.bench`: measure a model on this machine.

    a  one picture, "a small cat", with and without memory-efficient attention, as PhotoRoom did in 2022
    b  time and memory of one attention layer by the size of the picture
    c  throughput by the number of jobs in a batch, eager and compiled
    d  smallcat's engine beside what people would use instead: diffusers with naive attention, eager, in
       batches, compiled. Measured only when asked for, alone: `--only d`

Prints tables, and writes bench.json (of d: peers.json) and a plot (PNG) for each experiment. Progress goes to
standard error.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import click
from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from worker.bench import measuring, peers, shapes, tables
from worker.bench.peer_report import PeerName, PeerReport
from worker.bench.report import Experiment, Report
from worker.contract.errors import SmallcatError
from worker.contract.settings import WorkerSettings, worker_settings


@click.command()
@click.option("--model", metavar="MODEL", help="The model, as in SMALLCAT_MODEL. Not set: the worker's own.")
@click.option(
    "--shapes", "kind", type=click.Choice(get_args(shapes.Shapes)), help="Measure random weights instead."
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice((*get_args(Experiment), "d")),
    help="Measure only this experiment. May be repeated; d stands alone.",
)
@click.option(
    "--steps",
    default=50,
    show_default=True,
    type=click.IntRange(1, 150),
    help="Denoising steps of a picture.",
)
@click.option("--quick", is_flag=True, help="Measure fewer sizes and setups, for a shorter time.")
@click.option(
    "--output",
    default=Path("outputs/bench"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for bench.json and the plots.",
)
@click.option(
    "--peer",
    "names",
    multiple=True,
    type=click.Choice(get_args(PeerName)),
    help="d: measure only this one. May be repeated.",
)
@click.option(
    "--warm",
    "warm_s",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0, 600),
    help="d: seconds of load before each is measured.",
)
@click.option(
    "--seconds",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0.1, 3600),
    help="d: seconds for which each is measured.",
)
@click.option(
    "--limit",
    "limit_s",
    default=300.0,
    show_default=True,
    type=click.FloatRange(10, 7200),
    help="d: seconds after which one is given up, loading and compiling included.",
)
@click.option(
    "--compile-mode",
    "mode",
    default="reduce-overhead",
    show_default=True,
    type=click.Choice(["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]),
    help="d: torch.compile's mode for diffusers. diffusers' documentation has max-autotune, which is slow "
    "to compile.",
)
@click.option(
    "--batch",
    default=0,
    show_default=True,
    type=click.IntRange(0, 256),
    help="d: pictures in a batch of diffusers; 0: 8 up to 768 px, 4 above.",
)
def main(
    model: str | None,
    kind: shapes.Shapes | None,
    only: tuple[Experiment | Literal["d"], ...],
    steps: int,
    quick: bool,
    output: Path,
    **of_peers: Any,
) -> None:
    """Measure a picture, an attention layer and the throughput; print tables, write JSON and plots.

    Other settings are read from the environment, as by a worker.
    """
    if model and kind:
        raise click.UsageError("--model and --shapes exclude each other: leave one out.")
    experiments = tuple(each for each in only if each != "d")
    if experiments and experiments != only:
        raise click.UsageError("--only d is measured alone, in processes of its own: leave the others out.")
    console = Console(stderr=True)
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    try:
        settings = worker_settings()
        if only and not experiments:
            named = model or (kind and str(shapes.make(kind, settings.cache_folder / "shapes" / kind)))
            scope = peers.Scope(named or str(settings.model), steps, **of_peers)
            found = peers.report(scope, _command(), console.print, peers.in_a_process(scope.limit_s))
            _show_peers(found, output)
            return
        with Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
        ) as progress:
            report = _measure(settings, model, kind, experiments, steps, quick, progress)
    except SmallcatError as error:
        raise click.ClickException(str(error)) from None
    output.mkdir(parents=True, exist_ok=True)
    (output / "bench.json").write_text(report.as_json(), "utf-8")
    _show(report, output)


def _measure(
    settings: WorkerSettings,
    model: str | None,
    kind: shapes.Shapes | None,
    only: tuple[Experiment, ...],
    steps: int,
    quick: bool,
    progress: Progress,
) -> Report:
    task = progress.add_task("Loading the model", total=None)
    if kind:
        progress.update(task, description=f"Making a model of {kind} with random weights")
        model = str(shapes.make(kind, settings.cache_folder / "shapes" / kind))
    if model:
        settings = settings.model_copy(update={"model": model})
    benchmark = measuring.Benchmark(
        settings,
        only or get_args(Experiment),
        measuring.QUICK if quick else measuring.FULL,
        steps=steps,
        command=_command(),
    )
    progress.update(task, total=benchmark.total, completed=-1)

    def show(what: str) -> None:
        progress.update(task, description=what, advance=1)

    report = benchmark.report(show)
    progress.update(task, description="Done", completed=benchmark.total)
    return report


def _command() -> str:
    return shlex.join(["python", "-m", "worker.bench", *sys.argv[1:]])


def _show_peers(report: PeerReport, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peers.json").write_text(report.as_json(), "utf-8")
    _print(tables.peers(report), folder / "peers.json", lambda plots: plots.draw_peers(report, folder))


def _show(report: Report, folder: Path) -> None:
    _print(tables.tables(report), folder / "bench.json", lambda plots: plots.draw(report, folder))


def _print(found: Iterable[RenderableType], results: Path, draw: Callable[[Any], list[Path]]) -> None:
    console = Console()
    for each in found:
        console.print(each)
    # Unwrapped, so that paths can be copied.
    line = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    line(f"Results: {results}")
    if importlib.util.find_spec("matplotlib") is None:
        line("No plots: install matplotlib with pip install '.[bench]'.")
        return
    # Not at the top: matplotlib may be absent.
    from worker.bench import plots

    for path in draw(plots):
        line(f"Plot: {path}")


if __name__ == "__main__":
    main()
