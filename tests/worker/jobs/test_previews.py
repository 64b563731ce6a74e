"""Previews: made for who asks, at most twice a second for each job, and never at a job's expense."""

from __future__ import annotations

import io
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from worker.jobs.previews import EVERY_S, MOST, PreviewMaker
from worker.state.previews import ASKED_S, Preview


def ticket(step: int, state: str = "fine") -> Any:
    return SimpleNamespace(progress=(step, 20), state=state)


class Ground:
    """A maker without its thread, the clock and the jobs in flight."""

    def __init__(self, *jobs: str) -> None:
        self.now_s = 100.0
        self.tickets: dict[str, Any] = {name: ticket(1) for name in jobs}
        self.put: list[tuple[str, Preview]] = []
        self.drawn = 0
        self.maker = PreviewMaker(self._tickets, self._draw, lambda *each: self.put.append(each), self._clock)
        self.maker._thread = SimpleNamespace()  # type: ignore[assignment] # None is started.

    def _clock(self) -> float:
        return self.now_s

    def _tickets(self) -> Mapping[str, Any]:
        return self.tickets

    def _draw(self, state: Any) -> Any:
        self.drawn += 1
        if state == "broken":
            raise RuntimeError("It broke.")
        return None if state == "unknown" else np.full((8, 4, 3), 200, np.uint8)


def test_nothing_is_made_while_nobody_asks() -> None:
    ground = Ground("a")
    assert not ground.maker.make_due()
    assert ground.drawn == 0


def test_a_preview_says_its_step_and_is_a_webp() -> None:
    ground = Ground("a", "b")
    ground.maker.ask("a")
    assert ground.maker.make_due()
    [(name, preview)] = ground.put
    assert (name, preview.step, preview.steps) == ("a", 1, 20)
    with Image.open(io.BytesIO(preview.data)) as image:
        assert (image.format, image.size) == ("WEBP", (4, 8))


def test_a_job_that_has_not_moved_is_not_drawn_again() -> None:
    ground = Ground("a")
    for step, count in ((1, 1), (1, 1), (2, 2)):
        ground.tickets["a"] = ticket(step)
        ground.maker.ask("a")
        ground.maker.make_due()
        assert ground.drawn == count


def test_it_ends_when_nobody_asks_any_more_or_the_job_is_over() -> None:
    ground = Ground("a")
    ground.maker.ask("a")
    ground.now_s += ASKED_S + 1
    assert not ground.maker.make_due()
    ground.maker._thread = SimpleNamespace()  # type: ignore[assignment]
    ground.maker.ask("a")
    del ground.tickets["a"]
    assert not ground.maker.make_due()
    ground.maker.ask("somebody else's")
    assert ground.maker._asked == {}


def test_many_who_look_take_turns() -> None:
    """16 a second are made at most, whoever asks: so the cost has a limit."""
    names = [f"job {number}" for number in range(3 * MOST)]
    ground = Ground(*names)
    for name in names:
        ground.maker.ask(name)
    for _ in range(3):
        before = len(ground.put)
        ground.maker.make_due()
        ground.now_s += EVERY_S
        assert len(ground.put) - before == MOST
    assert sorted(name for name, _ in ground.put) == sorted(names)


def test_a_job_without_latents_or_with_an_error_goes_on_without() -> None:
    ground = Ground("fine")
    ground.tickets |= {"new": ticket(0), "unknown": ticket(3, "unknown"), "broken": ticket(3, "broken")}
    for name in ground.tickets:
        ground.maker.ask(name)
    assert ground.maker.make_due()
    assert [name for name, _ in ground.put] == ["fine"]
