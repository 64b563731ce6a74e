"""Previews of running jobs, made beside the engine's steps while somebody looks at them, and never else.

    "preview <id>" from Redis ─► ask ─► thread: latents ─► a tiny WebP ─► smallcat:preview:<id>

The thread begins with the first question and ends when nobody has asked for some seconds. It reads latents
that the engine has finished with, so that no step waits for it.
"""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from PIL import Image

from worker.state.previews import ASKED_S, Preview

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from worker.engine.ticket import Ticket

logger = logging.getLogger("smallcat.jobs")

#: Seconds between two previews of one job, at least.
EVERY_S: Final = 0.5
#: Previews that are made within that time, at most, so that many who look cost no throughput.
MOST: Final = 8
#: Jobs that are remembered as asked for, at most.
_MOST_ASKED: Final = 1_000
_QUALITY: Final = 80


class PreviewMaker:
    """Makes previews for one worker. Thread-safe.

    `tickets` returns the jobs in flight; `draw` makes (height, width, 3) uint8 pixels of what the runner
    keeps of one, None where there are none (yet); `put` writes the preview of a job. An error of theirs ends
    nothing: the job goes on without a preview.
    """

    def __init__(
        self,
        tickets: Callable[[], Mapping[str, Ticket[Any]]],
        draw: Callable[[Any], NDArray[np.uint8] | None],
        put: Callable[[str, Preview], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tickets, self._draw, self._put, self._clock = tickets, draw, put, clock
        self._lock = threading.Lock()
        #: Until when each job is asked for, by the clock.
        self._asked: dict[str, float] = {}
        #: The step of the last preview of each job.
        self._shown: dict[str, int] = {}
        self._thread: threading.Thread | None = None

    def ask(self, job_id: str) -> None:
        """Somebody looks at the job: make previews of it for the next seconds, if it is in flight here."""
        if job_id not in self._tickets():
            return
        with self._lock:
            if len(self._asked) >= _MOST_ASKED and job_id not in self._asked:
                return
            # At the end of those that wait their turn, if it was not among them.
            self._asked[job_id] = self._clock() + ASKED_S
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="previews", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while self.make_due():
            time.sleep(EVERY_S)

    def make_due(self) -> bool:
        """Make the previews that are due. False: nobody asks any more, and the thread is to end."""
        tickets = self._tickets()
        with self._lock:
            now_s = self._clock()
            self._asked = {
                name: until_s for name, until_s in self._asked.items() if until_s > now_s and name in tickets
            }
            self._shown = {name: step for name, step in self._shown.items() if name in self._asked}
            if not self._asked:
                self._thread = None
                return False
            asked = list(self._asked)
        made = 0
        for name in asked:
            if made == MOST:
                break
            made += self._make(name, tickets[name])
        self._take_turns(asked[: max(1, made)])
        return True

    def _take_turns(self, served: list[str]) -> None:
        """Let others be first the next time."""
        with self._lock:
            for name in served:
                if (until_s := self._asked.pop(name, None)) is not None:
                    self._asked[name] = until_s

    def _make(self, name: str, ticket: Ticket[Any]) -> bool:
        """Make one preview, if the job has moved on. Returns whether it was made."""
        step, steps = ticket.progress
        if not step or self._shown.get(name) == step:
            return False
        try:
            pixels = self._draw(ticket.state)
            if pixels is None:
                return False
            self._put(name, Preview(step, steps, _file(pixels)))
        except Exception as error:  # noqa: BLE001 - a job needs no preview
            logger.debug("Job %s has no preview: %s", name, error)
            return False
        self._shown[name] = step
        return True


def _file(pixels: NDArray[np.uint8]) -> bytes:
    """The pixels as WebP."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=_QUALITY, method=0)
    return file.getvalue()
