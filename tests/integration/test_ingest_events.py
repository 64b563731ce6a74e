"""`ingest --lines --json` as a script reads it: docs/command-line.md, "Events of a run", is the contract."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.embedded.servers import ValkeyProcess
from tests.drain import Drain
from tests.fast_worker import SERVED, announce
from worker.contract.queues import queues_of

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "command-line.md").read_text()


def documented() -> dict[str, set[str]]:
    """The fields of each event, as the document's table has them."""
    table = DOCUMENT.partition("## Events of a run")[2].partition("\n## ")[0]
    found = {}
    for line in re.findall(r"^\| (`.*)$", table, re.MULTILINE):
        if not line.startswith("`event`"):
            events, _, fields = line.split(" | ")[:3]
            for event in re.findall(r"`(\w+)`", events):
                found[event] = set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", fields))) - {"json"}
    return found


@pytest.fixture
def drain(valkey: ValkeyProcess) -> Iterator[Drain]:
    announce(valkey.url)
    drain = Drain(valkey.url, queues_of(SERVED)[0])
    yield drain
    drain.client.close()


def started(valkey: ValkeyProcess, folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "producer", "ingest", *words, "--lines", "--json"],
        cwd=folder,
        env=os.environ | {"REDIS_URL": valkey.url, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def events_of(process: subprocess.Popen[str], drain: Drain) -> list[dict[str, Any]]:
    """All events, each read as soon as it is there, while the jobs are ended."""
    over = threading.Event()
    worker = threading.Thread(target=lambda: [drain.all() for _ in iter(lambda: over.wait(0.01), True)])
    worker.start()
    assert process.stdout is not None
    events = [json.loads(line) for line in process.stdout]
    over.set()
    worker.join()
    process.wait(30)
    return events


def test_a_script_reads_each_job_once_and_the_end(
    valkey: ValkeyProcess, drain: Drain, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a cat\nfail\nbad \1 line\n" + "\u2028 a dog\n" * 3)
    (tmp_path / "b.csv").write_text("prompt,steps\na bird,999\na fox,5\n")
    process = started(valkey, tmp_path, "a.txt", "b.csv", "--images", "2")
    *events, end = events_of(process, drain)
    assert process.returncode == 1
    assert (end["event"], end["state"], end["done"], end["failed"], end["rejected"]) == (
        *("end", "finished", 10, 2, 2),
    )
    jobs = {each["number"]: each for each in events if each["event"] in ("done", "failed")}
    assert sorted(jobs) == list(range(12))
    manifest = [json.loads(line) for line in Path(tmp_path / end["manifest"]).read_text().splitlines()]
    for number, line in enumerate(manifest):
        event = jobs[number]
        assert (event["event"], event["file"], event["line"], event["id"], event.get("uri")) == (
            *(line["state"], line["file"], line["line"], line["id"], line["uri"]),
        )
    bad = [(each["file"], each["line"], each["field"]) for each in events if each["event"] == "rejected"]
    assert bad == [("a.txt", 3, "prompt"), ("b.csv", 2, "steps")]
    for each in (*events, end):
        assert set(each) - {"event", "text"} <= documented()[each["event"]], each
    assert set(end) - {"event"} == documented()["end"]
    # The run is over: what ended does not come again.
    again = events_of(started(valkey, tmp_path, "a.txt", "b.csv", "--images", "2"), drain)
    assert [each["event"] for each in again] == ["end"]


def test_every_event_has_the_documented_fields() -> None:
    """Progress comes each half minute, which no test waits for."""
    import io

    from producer.cli.ingest_display import LineDisplay
    from tests.producer.cli.test_ingest_display import BAD, COUNTS, DONE, FAILED, STATUS

    out = io.StringIO()
    display = LineDisplay(as_json=True, events=out)
    display._printed_at -= 60
    display.update(STATUS, COUNTS)
    display.ended(DONE, "p.txt")
    display.ended(FAILED._replace(error_type="RenderError"), "p.txt")
    display.rejected(BAD, "p.txt")
    events = {each["event"]: each for each in map(json.loads, out.getvalue().splitlines())}
    assert set(events) == set(documented()) - {"end", "cancelled"}
    for event, values in events.items():
        assert set(values) - {"event", "text"} == documented()[event]


def test_ctrl_c_ends_with_an_end_that_says_so(valkey: ValkeyProcess, drain: Drain, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"cat {n}\n" for n in range(300)))
    process = started(valkey, tmp_path, "p.txt", "--max-queued", "20")
    while (first := drain.take()) is None:
        pass
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "No more is sent" not in process.stderr.readline():
        pass
    drain.end(*first)
    *events, end = events_of(process, drain)
    assert (process.returncode, end["event"], end["state"]) == (130, "end", "stopped")
    assert end["done"] == end["sent"] == len(events) < 300


def test_a_reader_that_leaves_ends_the_command_without_a_word(
    valkey: ValkeyProcess, drain: Drain, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("".join(f"cat {n}\n" for n in range(50)))
    process = started(valkey, tmp_path, "p.txt", "--max-queued", "10")
    assert process.stdout is not None
    process.stdout.close()
    while process.poll() is None:
        drain.all()
    assert process.returncode == 141
    assert process.stderr is not None
    assert "roken pipe" not in process.stderr.read()
    # Nothing is lost: the same command goes on.
    end = events_of(started(valkey, tmp_path, "p.txt", "--max-queued", "10"), drain)[-1]
    assert (end["event"], end["done"]) == ("end", 50)


def test_a_command_that_fails_has_no_end(valkey: ValkeyProcess, drain: Drain, tmp_path: Path) -> None:
    process = started(valkey, tmp_path, "none.txt")
    assert events_of(process, drain) == []
    assert process.returncode == 2
    assert process.stderr is not None
    assert "none.txt cannot be read" in process.stderr.read()
