"""What a worker notes of an attempt."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.worker.engine.fake_runner import SOON_S, FakeRunner, FakeState, job_of
from worker.contract.job_scope import job_scope
from worker.engine.engine import Engine
from worker.engine.step_watch import MOST_MATES, StepWatch
from worker.tracing import attempts, exporter
from worker.tracing.context import TraceContext

JOB, TRACE, SPAN = "a" * 32, "b" * 32, "c" * 16


@pytest.fixture
def sent() -> Iterator[list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []
    attempts.trace_to(found.append)
    yield found
    attempts.trace_to(None)


def test_an_attempt_has_its_stages_in_order_and_its_trace(sent: list[dict[str, Any]]) -> None:
    with attempts.attempt(JOB, f"00-{TRACE}-{SPAN}-01", "v=1"):
        assert job_scope() == (JOB, TRACE)
        with attempts.stage("claim"):
            pass
        attempts.note(1.5, attempt=1)
        with pytest.raises(KeyError), attempts.stage("upload", size=3):
            raise KeyError
        attempts.failed(ValueError("It failed.\nwith more"))
    [found] = sent
    assert (found["job"], found["trace"], found["parent"], found["state"]) == (JOB, TRACE, SPAN, "v=1")
    assert found["span"] not in ("", SPAN)
    assert [(stage[0], stage[3]) for stage in found["stages"]] == [("claim", {}), ("upload", {"size": 3})]
    times = [found["queued"], found["began"], *(time for stage in found["stages"] for time in stage[1:3])]
    assert [*times, found["ended"]] == sorted([*times, found["ended"]])
    assert found["began"] - found["queued"] == pytest.approx(1.5e9, rel=1e-6)
    assert found["attributes"] == {"attempt": 1}
    assert found["error"] == ("ValueError", "It failed.")
    assert attempts.current() is None


@pytest.mark.parametrize("parent", [None, "nonsense"])
def test_a_message_of_an_old_producer_begins_a_trace(parent: str | None, sent: list[dict[str, Any]]) -> None:
    with attempts.attempt(JOB, parent, None):
        trace = job_scope().trace
    assert (sent[0]["parent"], sent[0]["trace"]) == ("", trace)
    assert len(trace) == 32


def test_a_job_that_is_not_sampled_is_not_noted(sent: list[dict[str, Any]]) -> None:
    with attempts.attempt(JOB, f"00-{TRACE}-{SPAN}-00", None):
        assert attempts.current() is None
        assert job_scope() == (JOB, "")
        with attempts.stage("claim"):
            attempts.note(1.0, attempt=1)
            attempts.failed(ValueError())
    assert sent == []


def test_without_a_collector_the_log_still_says_the_trace() -> None:
    with attempts.attempt(JOB, f"00-{TRACE}-{SPAN}-01", None):
        assert attempts.current() is None
        assert job_scope() == (JOB, TRACE)


def test_a_line_for_the_process_is_always_whole() -> None:
    """Longer ones could be mixed with those of other threads: what is left out are links, then stages."""
    made = attempts.Attempt(JOB, TraceContext(TRACE, SPAN, True, "v" * 512))
    mates = [TraceContext(f"{number:032x}", f"{number:016x}") for number in range(MOST_MATES)]
    made.add("steps", 0, 1, {"steps": 50, "rows": 16.5, "step_s": 0.064, "wait_s": 0.1}, mates)
    made.fail(ValueError("x" * 10_000))
    line = exporter._line(made.as_json())
    assert len(line) <= 4096
    assert len(json.loads(line)["stages"][0][4]) == MOST_MATES
    for _ in range(40):
        made.add("steps", 0, 1, {"steps": 50}, mates)
    line = exporter._line(made.as_json())
    assert len(line) <= 4096
    assert json.loads(line)["error"][0] == "ValueError"


def test_a_watch_knows_the_steps_of_its_job_and_whom_they_were_shared_with() -> None:
    runner = FakeRunner()
    engine: Engine[FakeState] = Engine(runner, job_timeout_s=60, on_failure=lambda error: None)
    watches = [StepWatch(name) for name in "ab"]
    futures = [
        engine.submit(name, job_of(seed, steps=3), None, watch)
        for seed, (name, watch) in enumerate(zip("ab", watches, strict=True))
    ]
    unwatched = engine.submit("c", job_of(9, steps=3))
    engine.start()
    for future in (*futures, unwatched):
        future.result(SOON_S)
    engine.stop()
    first, second = watches
    assert (list(first.mates), list(second.mates)) == (["b"], ["a"])
    assert first.steps == 3
    assert first.rows > first.steps
    assert first.began_s is not None
    assert 0 <= first.in_steps_s <= first.ended_s - first.began_s


def test_a_watch_remembers_a_bounded_number_of_mates() -> None:
    watch = StepWatch(0)
    for step in range(10):
        watch.stepped(step, step + 1, 8, range(step * 20, step * 20 + 20))
    assert len(watch.mates) == MOST_MATES
    assert (watch.steps, watch.rows, watch.in_steps_s) == (10, 80, 10)


def test_a_process_that_cannot_run_is_not_started_for_each_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a variable of OpenTelemetry's that its SDK refuses."""
    starts = tmp_path / "starts"
    program = tmp_path / "process.py"
    program.write_text(f"import sys; open({str(starts)!r}, 'a').write('start\\n'); sys.exit(3)")
    process = exporter.SpanProcess(program)
    process.start()
    made = attempts.Attempt(JOB, None).as_json()
    for ended in (1, 1, 2):
        if ended == 2:
            monkeypatch.setattr(process, "_rests_until_s", 0.0)
        assert process._process is not None
        assert process._process.wait(30) == 3
        process.send(made)
        assert process._process.wait(30) == 3
        assert starts.read_text().count("start") == ended
    assert [record.getMessage() for record in caplog.records] == [
        "The process that sends spans has ended with 3: it is started again."
    ]
    process.stop()
    process.send(made)


@pytest.mark.parametrize("queued_s", [math.nan, math.inf, -math.inf, 1e308, -1e308, 1e12, -1.0])
def test_a_wait_that_cannot_have_been_is_left_out(queued_s: float, sent: list[dict[str, Any]]) -> None:
    with attempts.attempt(JOB, None, None):
        attempts.note(queued_s, attempt=1)
    assert sent[0]["queued"] is None
    assert sent[0]["attributes"] == {"attempt": 1}


class Nasty:
    """Whatever is done with it fails."""

    def __str__(self) -> str:
        raise OverflowError("no text")

    def __lt__(self, other: object) -> bool:
        raise OverflowError("no order")

    __float__ = __round__ = __gt__ = __le__ = __ge__ = __lt__  # type: ignore[assignment]


def test_no_part_of_tracing_raises_at_a_job(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The job's own errors pass, and one line says what has failed."""

    def refused(attempt: dict[str, Any]) -> None:
        raise OSError("the process cannot be started")

    class NastyError(Exception):
        __str__ = Nasty.__str__

    monkeypatch.setattr(attempts, "_send", refused)
    monkeypatch.setattr(attempts, "_has_told", False)
    nasty: Any = Nasty()
    done = []
    for _ in range(2):
        with attempts.attempt(JOB, None, None):
            attempts.note(nasty, attempt=1)
            attempts.failed(NastyError())
            monkeypatch.setattr(attempts.current(), "_offset_ns", nasty)
            with pytest.raises(KeyError), attempts.stage("claim"):
                raise KeyError
            done.append(True)
    with pytest.raises(ValueError, match="own"), attempts.attempt(JOB, None, None):
        raise ValueError("own")
    assert len(done) == 2
    [record] = caplog.records
    assert "the job goes on" in record.getMessage()
