"""The spans that a worker's attempts become, and what is said of a collector that does not take them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.otlp import Collector, collecting
from worker.tracing.attempts import Attempt
from worker.tracing.context import TraceContext
from worker.tracing.spans import AttemptSpans

TRACE, SPAN = "b" * 32, "c" * 16


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as made:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
        yield made


def attempt_of(job_id: str, **fields: Any) -> dict[str, Any]:
    return Attempt(job_id, TraceContext(TRACE, SPAN)).as_json() | fields


def test_no_attempt_loses_the_spans_that_are_sent_with_it(collector: Collector) -> None:
    """What a record or a message says cannot keep others' spans from being encoded."""
    made = AttemptSpans(1)
    wild = [-(10**320), -1, 10**30, 1 << 63]
    for number, at in enumerate(wild):
        stages = [["claim", at, at, {"size": at}, []]]
        made.make(attempt_of(f"wild {number}", queued=at, began=at, ended=at, stages=stages))
    made.make(attempt_of("half \ud800", attributes={"worker": "\udfff"}, error=["ValueError", "\ud800"]))
    made.make(attempt_of("honest"))
    made.end()
    found = {span.attributes.get("smallcat.job.id") for span in collector.spans()}
    assert found - {None} == {*(f"wild {number}" for number in range(len(wild))), "half \\ud800", "honest"}
