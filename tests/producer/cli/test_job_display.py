"""What a person sees while a job runs, at a terminal and elsewhere."""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from producer import JobHandle, JobResult, Progress
from producer.cli.job_display import can_draw, follow, show_picture
from producer.cli.plain_console import PlainConsole
from tests.worker.engine.fake_runner import SOON_S, job_of
from worker.contract.errors import NotFiniteError, QueueError
from worker.contract.record import State


def result_of(**fields: Any) -> JobResult:
    return JobResult.model_validate({"id": "x", "state": "done", "job": job_of(3).model_dump()} | fields)


class Running(JobHandle):
    """A handle that plays a script of progress, each item seen once, and then its end."""

    def __init__(self, script: list[Progress | Exception], end: JobResult | Exception) -> None:
        super().__init__("x")
        self._script, self._end = list(script), end
        self._over = threading.Event()

    def progress(self) -> Progress:
        if not self._script:
            # The last one has been shown: who asks again came round.
            self._over.set()
            return progress(State.DONE, 4)
        step = self._script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def result(self, timeout: float | None = None) -> JobResult:
        assert self._over.wait(SOON_S)
        if isinstance(self._end, Exception):
            raise self._end
        return self._end


def progress(state: State, step: int = 0, note: str = "") -> Progress:
    return Progress(state, step, 4, 1, 1, note)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producer.cli.job_display.POLL_EVERY_S", 0.001)


def on(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Have output go to a console of that kind; returns what it got."""
    file = io.StringIO()

    def console(stderr: bool = False) -> Console:
        return Console(file=file, force_terminal=terminal, width=100, color_system=None)

    def plain_console(stderr: bool) -> PlainConsole:
        return PlainConsole(file=file, force_terminal=terminal, width=100, color_system=None)

    monkeypatch.setattr("producer.cli.job_display.Console", console)
    monkeypatch.setattr("producer.cli.job_display.PlainConsole", plain_console)
    return file.getvalue


@pytest.mark.usefixtures("quick")
def test_without_a_terminal_each_change_of_state_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on(False, monkeypatch)
    script = [
        progress(State.QUEUED),
        progress(State.QUEUED, note="No worker serves it."),
        progress(State.RUNNING, 1),
        progress(State.RUNNING, 2),
        progress(State.DONE, 4),
    ]
    end = result_of()
    assert follow(Running([*script], end), 1) is end
    lines = [line.strip() for line in shown().splitlines() if line.strip()]
    assert lines == ["queued", "queued  No worker serves it.", "running", "done"]


@pytest.mark.usefixtures("quick")
def test_at_a_terminal_a_bar_shows_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on(True, monkeypatch)
    follow(Running([progress(State.RUNNING, 2), progress(State.RUNNING, 3)], result_of()), 1)
    assert "step 4 of 4" in shown()


@pytest.mark.usefixtures("quick")
def test_what_goes_wrong_while_looking_does_not_end_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    on(False, monkeypatch)
    end = result_of()
    assert follow(Running([QueueError("away")], end), 1) is end


@pytest.mark.usefixtures("quick")
def test_the_jobs_own_error_comes_through_and_no_thread_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    on(False, monkeypatch)
    with pytest.raises(NotFiniteError):
        follow(Running([progress(State.FAILED)], NotFiniteError("NaN")), 1)
    assert "progress" not in {thread.name for thread in threading.enumerate()}


def test_without_a_terminal_a_picture_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on(False, monkeypatch)
    job = job_of(3).model_copy(update={"prompt": "[bold]a small cat[/bold]"})
    show_picture(result_of(job=job.model_dump()))
    assert shown() == '"[bold]a small cat[/bold]", 64x64, seed 3, 4 steps\n'


def test_at_a_terminal_a_picture_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on(True, monkeypatch)
    picture = Image.fromarray(np.full((8, 8, 3), 200, np.uint8))
    monkeypatch.setattr(JobResult, "image", lambda self: picture)
    show_picture(result_of())
    assert len(shown()) > 50


def test_a_terminal_without_a_size_is_not_drawn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producer.cli.job_display.os.get_terminal_size", lambda descriptor: (0, 0))
    with open(os.devnull, "w") as file:  # noqa: PTH123 - a file with a descriptor
        assert not can_draw(Console(file=file, force_terminal=True))


def test_what_textual_image_logs_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """In a live display it would draw the picture again, and so log again, without end."""
    can_draw(Console(file=io.StringIO(), force_terminal=True))
    logging.getLogger("textual_image._terminal").warning("No answer.", exc_info=TimeoutError())
    assert capsys.readouterr().err == ""
