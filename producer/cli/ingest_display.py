"""Shows a run to a person or a log: a progress bar with the last picture, lines, or notices alone."""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from producer.cli.job_display import can_draw
from producer.cli.json_output import NobodyReadsError
from producer.cli.plain_console import PlainConsole
from producer.ingest.ended import Ended
from producer.ingest.plan import Rejected
from producer.ingest.run_state import Status
from producer.ingest.types import Counts, Display
from worker.contract.plain_text import plain, plain_json

if TYPE_CHECKING:
    from worker.storage.bucket import Bucket

#: Seconds over which throughput is measured.
_MEASURED_S = 20.0
#: Seconds between two previews, and between two lines of progress in a log.
_PREVIEW_EVERY_S, _LINE_EVERY_S = 2.0, 30.0
#: Width of the preview, in characters.
_PREVIEW_WIDTH = 24


class Throughput:
    """Jobs a second over the last 20 seconds, and how long the rest will take."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, ended: int) -> None:
        """Record how many jobs have ended by now."""
        now = self._clock()
        if not self._seen or self._seen[-1][1] != ended or now - self._seen[-1][0] > 1:
            self._seen.append((now, ended))
        while len(self._seen) > 2 and now - self._seen[0][0] > _MEASURED_S:
            self._seen.popleft()

    @property
    def per_s(self) -> float:
        """Jobs a second."""
        if len(self._seen) < 2:
            return 0.0
        (began, first), last = self._seen[0], self._seen[-1][1]
        return (last - first) / max(1e-9, self._clock() - began)

    def left_s(self, jobs: int) -> float | None:
        """Seconds until `jobs` more have ended; None where nothing has ended lately."""
        return jobs / self.per_s if self.per_s > 0 else None


class QuietDisplay(Display):
    """Prints notices alone, on standard error."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or PlainConsole(stderr=True)

    def update(self, status: Status, counts: Counts) -> None:
        """Nothing."""

    def ended(self, ended: Ended, file: str) -> None:
        """Nothing."""

    def rejected(self, rejected: Rejected, file: str) -> None:
        """Nothing: the file of rejected lines has it."""

    def notice(self, text: str) -> None:
        """One line."""
        self._console.print(plain(text), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing."""


class LineDisplay(QuietDisplay):
    """A line for each event, and one on the run's progress every half minute."""

    def __init__(
        self,
        console: Console | None = None,
        *,
        every_job: bool = True,
        as_json: bool = False,
        events: TextIO | None = None,
    ) -> None:
        """Events go to `events`, notices to the console; None: both to the console."""
        super().__init__(console)
        self._events = events
        self._every_job, self._as_json = every_job, as_json
        self._throughput = Throughput()
        self._printed_at = time.monotonic()

    def update(self, status: Status, counts: Counts) -> None:
        """A line every half minute."""
        self._throughput.update(status.ended)
        if time.monotonic() - self._printed_at > _LINE_EVERY_S:
            self._printed_at = time.monotonic()
            self._event("progress", summary(status, counts, self._throughput), {}, _numbers(status, counts))

    def ended(self, ended: Ended, file: str) -> None:
        """A line. For a job that is done only with `every_job`."""
        if ended.state == "done" and not self._every_job:
            return
        what = ended.uri if ended.state == "done" else ended.error
        text = f"{what}{' (cached)' if ended.cached else ''}"
        names = ("number", "uri", "cached", "error_type", "error", "timings")
        more = {name: value for name in names if (value := getattr(ended, name)) is not None}
        self._event(ended.state, text, {"file": file, "line": ended.line, "id": ended.id}, more)

    def rejected(self, rejected: Rejected, file: str) -> None:
        """A line."""
        values = {"file": file, "line": rejected.line, "field": rejected.field}
        self._event("rejected", rejected.reason, values, {"reason": rejected.reason})

    def _event(self, event: str, text: str, values: Mapping[str, object], more: Mapping[str, object]) -> None:
        """Print an event with its values; those for programs, `more`, in JSON alone."""
        if self._as_json:
            line = plain_json({"event": event, **values, **more, "text": text}, indent=None)
            if self._events is None:
                self.notice(line)
            else:
                try:
                    print(line, file=self._events, flush=True)
                except BrokenPipeError:
                    # Not as an error of a connection, which would be taken for Redis'.
                    raise NobodyReadsError from None
        else:
            where = "  ".join(f"{name} {value}" for name, value in values.items() if value != "")
            self.notice(f"{event:9} {where}{'  ' if where else ''}{text}")


class LiveDisplay(QuietDisplay):
    """A progress bar at the foot of the terminal, under the last picture; failures scroll above."""

    def __init__(self, console: Console, bucket: Bucket | None) -> None:
        super().__init__(console)
        self._bucket = bucket
        self._throughput = Throughput()
        self._last: str | None = None
        self._picture: RenderableType | None = None
        self._over = threading.Event()
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._live.start()
        if bucket is not None and console.color_system is not None and can_draw(console):
            threading.Thread(target=self._preview, name="preview", daemon=True).start()

    def update(self, status: Status, counts: Counts) -> None:
        """Draw the bar anew."""
        self._throughput.update(status.ended)
        table = Table.grid(padding=(0, 2))
        total = status.total
        table.add_row(
            ProgressBar(total=total, completed=status.ended, width=40)
            if total
            else Text("reading the files"),
            Text(f"{status.ended:,} of {total:,}" if total else f"{status.ended:,} of {status.fed:,}+"),
        )
        text = Text(summary(status, counts, self._throughput))
        parts: list[RenderableType] = [table, text]
        self._live.update(Group(self._picture, *parts) if self._picture is not None else Group(*parts))

    def ended(self, ended: Ended, file: str) -> None:
        """Remember the picture for the preview, or print why there is none."""
        if ended.state == "done":
            self._last = ended.uri
        else:
            self.notice(f"line {ended.line}: {ended.state}: {ended.error}")

    def rejected(self, rejected: Rejected, file: str) -> None:
        """Print why."""
        self.notice(f"{file}, line {rejected.line}: {rejected.reason}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._over.set()
        self._live.stop()

    def _preview(self) -> None:
        """Fetch the last picture every other second. A picture that cannot be read is not shown."""
        from PIL import Image
        from textual_image.renderable.halfcell import Image as Halfcell

        shown = None
        while not self._over.wait(_PREVIEW_EVERY_S):
            if (uri := self._last) is None or uri == shown or self._bucket is None:
                continue
            try:
                image = Image.open(io.BytesIO(self._bucket.get(uri)))
                image.load()
            except Exception:  # noqa: BLE001, S112 - a picture that cannot be shown is not shown
                continue
            shown, self._picture = uri, Halfcell(image, width=_PREVIEW_WIDTH, height="auto")


def _numbers(status: Status, counts: Counts) -> dict[str, int | None]:
    """What `summary` says, for programs."""
    names = ("done", "cached", "failed", "cancelled", "workers")
    return {
        "sent": status.fed,
        "total": status.total,
        "ended": status.ended,
        "queued": status.queued,
        "rejected": status.rejected,
        **{name: getattr(counts, name) for name in names},
    }


def summary(status: Status, counts: Counts, throughput: Throughput) -> str:
    """The progress of a run in one line."""
    parts = [f"{throughput.per_s:.1f} images/s"]
    if status.total is not None and (left_s := throughput.left_s(status.total - status.ended)) is not None:
        parts.append(f"{_duration(left_s)} left")
    parts.append(f"{status.queued:,} queued")
    if counts.workers is not None:
        parts.append(f"{counts.workers} workers" if counts.workers != 1 else "1 worker")
    for name, value in (
        ("failed", counts.failed),
        ("cancelled", counts.cancelled),
        ("cached", counts.cached),
        ("rejected", status.rejected),
    ):
        if value:
            parts.append(f"{value:,} {name}")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
