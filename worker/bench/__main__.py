"""`python -m worker.bench`: measure what this machine makes of a model, and show it.

    a  one picture, "a small cat", with and without memory-efficient attention: the origin's experiment
    b  one attention by the picture's size, its time and its memory: N^2 against N
    c  pictures a second by the jobs in a batch, eager and compiled

Prints tables; writes bench.json and a PNG for each experiment. Progress goes to the standard error output.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import shlex
import sys
from pathlib import Path
from typing import get_args

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from worker.bench import measuring, shapes, tables
from worker.bench.report import Experiment, Report
from worker.contract.errors import SmallcatError
from worker.contract.settings import WorkerSettings, worker_settings


@click.command()
@click.option(
    "--model", metavar="MODEL", help="What to measure, as SMALLCAT_MODEL. Not set: what a worker serves."
)
@click.option("--shapes", "kind", type=click.Choice(get_args(shapes.Shapes)), help="Random weights instead.")
@click.option("--only", multiple=True, type=click.Choice(get_args(Experiment)), help="May be repeated.")
@click.option("--steps", default=50, show_default=True, type=click.IntRange(1, 150), help="Of a picture.")
@click.option("--quick", is_flag=True, help="Fewer sizes, fewer setups, less time each.")
@click.option(
    "--output",
    default=Path("outputs/bench"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for bench.json and the plots.",
)
def main(
    model: str | None,
    kind: shapes.Shapes | None,
    only: tuple[Experiment, ...],
    steps: int,
    quick: bool,
    output: Path,
) -> None:
    """Measure one picture, one attention, and pictures a second; write tables, JSON and plots.

    All other settings are a worker's, from the environment.
    """
    if model and kind:
        raise click.UsageError("--model and --shapes exclude each other.")
    console = Console(stderr=True)
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    try:
        settings = worker_settings()
        with Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
        ) as progress:
            report = _measure(settings, model, kind, only, steps, quick, progress)
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
        progress.update(task, description=f"Making a model with the shapes of {kind}")
        model = str(shapes.make(kind, settings.cache_folder / "shapes" / kind))
    if model:
        settings = settings.model_copy(update={"model": model})
    run = measuring.Measuring(
        settings,
        only or get_args(Experiment),
        measuring.QUICK if quick else measuring.FULL,
        steps=steps,
        command=shlex.join(["python", "-m", "worker.bench", *sys.argv[1:]]),
    )
    progress.update(task, total=run.total, completed=-1)

    def tell(what: str) -> None:
        progress.update(task, description=what, advance=1)

    report = run.report(tell)
    progress.update(task, description="Done", completed=run.total)
    return report


def _show(report: Report, folder: Path) -> None:
    console = Console()
    for each in tables.tables(report):
        console.print(each)
    # As they are, for copying.
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(f"Figures: {folder / 'bench.json'}")
    if importlib.util.find_spec("matplotlib") is None:
        say("No plots: install matplotlib with pip install '.[bench]'.")
        return
    # Not at the top: it may be absent.
    from worker.bench import plots

    for path in plots.draw(report, folder):
        say(f"Plot: {path}")


if __name__ == "__main__":
    main()
