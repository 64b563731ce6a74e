"""Shows a job at a terminal: a progress bar while it runs, then its picture."""

from __future__ import annotations

import logging
import os
import threading

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from producer.cli.plain_console import PlainConsole
from producer.client import JobHandle
from producer.client.job_result import JobResult
from worker.contract.plain_text import plain

#: Seconds between two polls of a job's progress.
POLL_EVERY_S = 0.25


def follow(handle: JobHandle, timeout: float | None) -> JobResult:
    """Wait for a job's result; raises as `JobHandle.result`.

    On a terminal a bar shows its steps. Elsewhere each change of state is a line on standard error.
    """
    console = PlainConsole(stderr=True)
    over = threading.Event()
    watcher = threading.Thread(target=_watch, name="progress", args=(handle, console, over), daemon=True)
    watcher.start()
    try:
        return handle.result(timeout)
    finally:
        over.set()
        watcher.join(timeout=5)


def can_draw(console: Console) -> bool:
    """Whether a picture can be drawn on this terminal: some pseudo-terminals have no size.

    textual_image logs a traceback where a terminal does not say how large its characters are. A live display
    would draw the picture once more to show that log, and so log again, without end: its logger is silenced.
    """
    quiet = logging.getLogger("textual_image")
    quiet.addHandler(logging.NullHandler())
    quiet.propagate = False
    try:
        size: tuple[int, int] = os.get_terminal_size(console.file.fileno())
    except (OSError, ValueError):  # No file of the system's: what is drawn is kept by a test, say.
        size = console.size
    return console.is_terminal and min(size) > 0


def show_picture(result: JobResult) -> None:
    """Draw the picture in the terminal. Where standard output is no terminal, print one line about it."""
    console = Console()
    if can_draw(console):
        # Queries the terminal at import for what it can draw.
        from textual_image.renderable import Image

        console.print(Image(result.image(), width=min(48, console.width), height="auto"))
    else:
        job = result.job
        console.print(
            f'"{plain(job.prompt)}", {result.width}x{result.height}, seed {job.seed}, {job.steps} steps',
            markup=False,
            highlight=False,
        )


def _watch(handle: JobHandle, console: Console, over: threading.Event) -> None:
    """Show progress until `over`. An error here is shown; `result` raises it to the caller."""
    shown = ""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
    )
    bar = Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    )
    with bar:
        task = bar.add_task("queued", total=None, text="")
        while not over.is_set():
            try:
                now = handle.progress()
            except Exception as error:  # noqa: BLE001 - the waiting thread reports it with its type
                bar.update(task, text=escape(plain(error)))
                over.wait(POLL_EVERY_S)
                continue
            note = plain(now.note)
            text = escape(note) or (f"step {now.step} of {now.steps}" if now.steps else "")
            bar.update(task, description=now.state, total=now.steps or None, completed=now.step, text=text)
            if not console.is_terminal and (line := f"{now.state}  {note}".strip()) != shown:
                console.print(line, markup=False, highlight=False)
                shown = line
            over.wait(POLL_EVERY_S)
