from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from producer.cli import ingest_display
from producer.cli.ingest_display import LineDisplay, LiveDisplay, QuietDisplay, Throughput, summary
from producer.cli.plain_console import PlainConsole
from producer.ingest.ended import Ended
from producer.ingest.plan import Cursor, Rejected
from producer.ingest.run_state import Status
from producer.ingest.types import Counts

STATUS = Status(fed=500, ended=120, total=1_000, rejected=2, queued=380, cursor="0:500:0")
COUNTS = Counts(done=110, cached=5, failed=9, cancelled=1, workers=3)
DONE = Ended(0, 0, 7, "a" * 32, "done", "s3://b/x.png", {}, None, None, True, 1)
FAILED = DONE._replace(state="failed", uri=None, error="It is too [large].", cached=False)
BAD = Rejected(0, 9, "steps", "steps is 999: it must be less.", Cursor())


def drawn(display: type[QuietDisplay], **options: bool) -> str:
    file = io.StringIO()
    shown = display(Console(file=file, width=120), **options)  # type: ignore[arg-type]
    shown.update(STATUS, COUNTS)
    shown.ended(DONE, "p.txt")
    shown.ended(FAILED, "p.txt")
    shown.rejected(BAD, "p.txt")
    shown.notice("Something.")
    shown.close()
    return file.getvalue()


def test_throughput_and_time_left_are_of_the_last_while() -> None:
    now = 0.0
    throughput = Throughput(clock=lambda: now)
    assert throughput.left_s(5) is None
    for now in range(60):
        throughput.update(now * 4 if now > 30 else 0)
    assert throughput.per_s == pytest.approx(4, rel=0.2)
    assert throughput.left_s(400) == pytest.approx(100, rel=0.2)


def test_the_summary_names_what_there_is() -> None:
    line = summary(STATUS, COUNTS, Throughput())
    for part in ("images/s", "380 queued", "3 workers", "9 failed", "1 cancelled", "5 cached", "2 rejected"):
        assert part in line
    assert "failed" not in summary(STATUS, Counts(), Throughput())


def test_quiet_says_only_what_is_said() -> None:
    assert drawn(QuietDisplay) == "Something.\n"


def test_lines_are_for_logs() -> None:
    lines = drawn(LineDisplay).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("done")
    assert "(cached)" in lines[0]
    assert "line 7" in lines[1]
    assert "It is too [large]." in lines[1]
    assert "file p.txt  line 9  field steps" in lines[2]
    assert len(drawn(LineDisplay, every_job=False).splitlines()) == 3
    events = [json.loads(line) for line in drawn(LineDisplay, as_json=True).splitlines()[:3]]
    assert [event["event"] for event in events] == ["done", "failed", "rejected"]


def test_the_whole_is_shown_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_display, "_LINE_EVERY_S", -1)
    assert drawn(LineDisplay).startswith("progress")


def test_the_live_display_shows_how_far_it_is_and_what_failed() -> None:
    file = io.StringIO()
    console = Console(file=file, width=120, force_terminal=True, color_system=None)
    display = LiveDisplay(console, None)
    display.update(STATUS, COUNTS)
    display._live.refresh()
    display.ended(FAILED, "p.txt")
    display.close()
    shown = file.getvalue()
    assert "120 of 1,000" in shown
    assert "3 workers" in shown
    assert "line 7: failed: It is too [large]." in shown


def test_what_looks_like_an_emoji_s_name_is_shown_as_it_is() -> None:
    file = io.StringIO()
    QuietDisplay(PlainConsole(file=file, width=120)).notice("the prompt asks for <lora:cat:1>")
    assert file.getvalue() == "the prompt asks for <lora:cat:1>\n"
