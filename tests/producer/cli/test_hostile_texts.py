"""Whatever others wrote into Redis: no command lets it move the terminal or forge a line; no traceback."""

from __future__ import annotations

import io
import json
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from producer.cli import main as command_line
from producer.cli.doctor import Finding
from producer.cli.plain_console import PlainConsole
from producer.client import submit_job
from producer.session import session
from tests.worker.engine.fake_runner import SERVED
from worker.contract.errors import RenderError
from worker.contract.queues import UNDECODABLE, queue_of
from worker.state.fleet import Fleet, WorkerInfo
from worker.state.keys import RUNS, job_key, run_key
from worker.state.redis_client import connect

HOSTILE = "a\x1b[2J\x1b]0;owned\x07\r\nFORGED line\u202e\x9b31m\u2028b"
#: What a producer can write into a job's record by hand, in each field that is text or holds one.
TEXTS: dict[str, dict[str, Any]] = {
    **{name: {name: HOSTILE} for name in ("error", "error_type", "worker", "queue", "uri", "runs")},
    "warnings": {"warnings": json.dumps([HOSTILE])},
    "an attempt": {
        "try:1": json.dumps(
            {"attempt": 1, "worker": HOSTILE, "at": 1.0, "error_type": HOSTILE, "error": HOSTILE}
        )
    },
    "a state": {"state": HOSTILE},
    "bytes": {"error": b"\xff\xfe\x1b"},
    "a strange time": {"submitted_at": "1e300", "try:1": '{"attempt": 1, "worker": "w", "at": NaN}'},
    "an endless time": {"submitted_at": "Infinity"},
    "another job": {"job": json.dumps({"prompt": HOSTILE})},
    "no job": {"job": HOSTILE},
}


@pytest.fixture
def client(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "1")
    with connect(environment["REDIS_URL"], retry_s=2) as client:
        worker = WorkerInfo(
            name=HOSTILE, served=SERVED, started_at=1.0, device=HOSTILE, attention=HOSTILE, max_rows=8,
            versions={HOSTILE: HOSTILE}, paused=HOSTILE,
        )  # fmt: skip
        Fleet(client, 1_000).announce(worker)
        yield client


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    """A command's exit code and what it printed, which is checked."""
    monkeypatch.setattr(sys, "argv", ["smallcat", *words])
    with pytest.raises(SystemExit) as exit_:
        command_line.main()
    out, err = capsys.readouterr()
    for text in (out, err):
        assert "Traceback" not in text, words
        assert not [line for line in text.splitlines() if line.startswith("FORGED")], words
        hidden = {each for each in text if unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
        assert hidden <= {"\n"}, (words, hidden)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, out, err


def failed_job() -> str:
    """A job that has failed, after it was submitted."""
    handle = submit_job("a cat", seed=1)
    records, job = session().records, handle.record().job
    records.claim(job, "m1", worker="w1", lease_s=30, max_attempts=1, queue=queue_of(job))
    assert records.failed(handle.id, "m1", RenderError("x"))
    return handle.id


@pytest.mark.parametrize("field", TEXTS)
def test_a_record_of_others_is_shown_with_nothing_hidden(
    client: Redis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    job_id = failed_job()
    with Redis.from_url(session().settings.redis_url) as raw:
        raw.hset(job_key(job_id), mapping=TEXTS[field])
    for words in (
        ["status", job_id],
        ["status"],
        ["failed", "list"],
        ["failed", "show", job_id],
        ["fetch", job_id, "--timeout", "0"],
        ["cancel", job_id],
    ):
        run(monkeypatch, capsys, *words)
        if words != ["fetch", job_id, "--timeout", "0"]:
            _, out, _ = run(monkeypatch, capsys, *words, "--json")
            assert not out or json.loads(out) is not None
    # Others' jobs are listed beside it.
    other = submit_job("a dog", seed=2)
    _, out, _ = run(monkeypatch, capsys, "status")
    assert other.id in out


def test_what_others_announced_is_shown_with_nothing_hidden(
    client: Redis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [worker] = session().fleet.workers()
    texts = [HOSTILE, *map(str, vars(worker).values())]
    findings = [Finding("workers", ok, text) for ok in (True, False) for text in texts]
    monkeypatch.setattr("producer.cli.doctor.examine", lambda: findings)
    code, out, _ = run(monkeypatch, capsys, "doctor")
    assert code == 3
    assert out.count("FORGED") >= 2


def test_the_error_that_a_job_failed_with_is_shown_indented(
    client: Redis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = failed_job()
    client.hset(job_key(job_id), mapping={"error": HOSTILE, "error_type": "RenderError"})
    code, _, err = run(monkeypatch, capsys, "fetch", job_id)
    assert code == 1
    assert "\n  FORGED line\\u202e" in err


@pytest.mark.parametrize(
    "fields",
    [
        {"files": json.dumps([HOSTILE]), "manifest": f"{HOSTILE} 1 2", "fed": 1},
        {"files": json.dumps([HOSTILE]), "fed": 1, "created": "1" * 30, "total": 9},
        *({"fed": 1, name: HOSTILE} for name in ("files", "created", "total", "ended", "rejected")),
        {"fed": HOSTILE},
    ],
)
def test_a_run_of_others_is_shown_with_nothing_hidden(
    client: Redis,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
) -> None:
    client.hset(run_key("mine"), mapping={"fed": 1, "created": 1})
    client.hset(run_key("theirs"), mapping=fields)
    client.set(f"{run_key('theirs')}:feeder", HOSTILE)
    client.set(run_key("text"), HOSTILE)
    client.zadd(RUNS, {"mine": 1, "theirs": 2, "text": 3, HOSTILE: 4})
    for words in (["runs"], ["runs", "--json"], ["status", "--run", "theirs"], ["cancel", "--run", "theirs"]):
        _, out, _ = run(monkeypatch, capsys, *words)
        assert words[0] != "runs" or "mine" in out


def test_messages_that_nobody_can_read_are_shown_with_nothing_hidden(
    client: Redis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = json.dumps({"at": 1e300, "queue": HOSTILE, "reason": HOSTILE, "bytes": 5})
    client.lpush(UNDECODABLE, f"{head}\n{HOSTILE}", HOSTILE)
    for more in ([], ["--json"]):
        run(monkeypatch, capsys, "failed", "list", "--unreadable", *more)


def test_a_console_escapes_what_is_in_any_of_its_texts() -> None:
    from rich.table import Table
    from rich.text import Text

    out = io.StringIO()
    console = PlainConsole(file=out, width=300, force_terminal=True, color_system="standard")
    table = Table.grid()
    table.add_row("\x9b31mb", Text("\u202ec"))
    console.print("[red]a\x1b]0;owned\x07[/red]", Text("\x1b[2J"), table, highlight=False)
    assert "\x1b[31ma\\x1b]0;owned" in out.getvalue()  # Its own colours stay.
    assert re.findall(r"\x1b(?!\[[0-9;]*m)|[\x9b\u202e]", out.getvalue()) == []


def test_commands_print_through_one_function_alone() -> None:
    """So that what they show is escaped whoever writes the next one."""
    allowed = {
        "json_output.py": {"click.echo", "click.style"},
        "ingest_display.py": {"print"},  # JSON in which nothing is hidden.
        "job_display.py": {"Console"},  # Draws the picture.
    }
    for path in sorted(Path(command_line.__file__).parent.glob("*.py")):
        text = path.read_text()
        found = set(re.findall(r"click\.(?:echo|secho|style)(?=\()|(?<![\w.])(?:print|Console)(?=\()", text))
        assert found <= allowed.get(path.name, set()), path.name
