"""Traces over real processes: a producer, a worker and its process that sends spans, and a collector."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from deploy.embedded.servers import _free_port
from producer.webhooks.secrets import new_secret
from tests.deploy.processes import here, running
from tests.faults.harness import ROOT, FaultWorker, Ground, wait_until
from tests.growing_file import complete_lines
from tests.otlp import Collector, Span, collecting
from tests.producer.webhooks.receiver import receiving

pytestmark = pytest.mark.timeout(150)

#: What a job's attempt consists of, in this order.
STAGES = ["claim", "find", "prepare", "steps", "decode", "encode", "upload", "done"]
#: Submits a job of each line of standard input, and prints its id.
PRODUCER = """
import json, sys
from producer import submit_job
for line in sys.stdin:
    print(submit_job(**json.loads(line)).id, flush=True)
"""
#: A trace that is not sampled.
UNSAMPLED = f"00-{'a' * 32}-{'b' * 16}-00"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


def variables(collector: Collector) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}


def produce(ground: Ground, environment: Mapping[str, str], *prompts: str) -> list[str]:
    """Ids of jobs that another process has submitted."""
    fields = [ground.job(prompt).model_dump(mode="json", exclude_defaults=True) for prompt in prompts]
    done = subprocess.run(
        [sys.executable, "-c", PRODUCER],
        input="".join(f"{json.dumps(each)}\n" for each in fields),
        env={**ground.stack.environment, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    ids = done.stdout.split()
    ground.ids += ids
    return ids


def stop(worker: FaultWorker) -> None:
    """Let it end in order: all its spans have been sent then."""
    worker._asked_to_end = True
    worker._popen.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
    assert worker.wait(60)


def of_job(collector: Collector, job_id: str) -> list[Span]:
    """All spans of the trace of a job."""
    found = [span for span in collector.spans() if span.attributes.get("smallcat.job.id") == job_id]
    [trace] = {span.trace for span in found}
    return collector.spans(trace)


def one(spans: list[Span], name: str) -> Span:
    [found] = [span for span in spans if span.name == name]
    return found


def below(spans: list[Span], parent: Span) -> list[Span]:
    return sorted((span for span in spans if span.parent == parent.id), key=lambda span: span.began)


def test_a_job_is_one_trace_and_its_mates_are_links(ground: Ground, collector: Collector) -> None:
    environment = variables(collector)
    with ground.holding() as hold:
        worker = ground.worker(settings={**environment, "SMALLCAT_LOG": "json", "SMALLCAT_MAX_ATTEMPTS": "2"})
        first, second, third = produce(ground, environment, hold, hold, "raise:Exception@step")
        [untraced] = ground.submit()
        ground.journal.wait_for("put", [untraced])
        wait_until("fails", lambda: ground.states([third]) == {"failed": 1})
    wait_until("are done", lambda: ground.states([first, second, untraced]) == {"done": 3})
    stop(worker)

    spans = of_job(collector, first)
    sent = one(spans, "submit")
    assert (sent.service, sent.parent, sent.kind) == ("smallcat-producer", "", 4)
    queue, process = below(spans, sent)
    assert (queue.name, process.name, process.kind) == ("queue", "process", 5)
    assert {queue.service, process.service} == {"smallcat-worker"}
    stages = below(spans, process)
    assert [span.name for span in stages] == STAGES
    assert len(spans) == 3 + len(STAGES)
    assert all(span.began <= span.ended for span in spans)
    assert sent.began <= process.began <= stages[0].began
    assert stages[-1].ended <= process.ended
    assert process.attributes["smallcat.outcome"] == "done"
    assert process.attributes["smallcat.attempt"] == 1
    steps = one(spans, "steps")
    assert steps.attributes["smallcat.steps"] >= 1
    assert steps.attributes["smallcat.rows"] > 1
    mate = one(of_job(collector, second), "process")
    assert (mate.trace, mate.id) in steps.links

    # Attempts are siblings.
    spans = of_job(collector, third)
    attempts = [span for span in below(spans, one(spans, "submit")) if span.name == "process"]
    assert [span.attributes["smallcat.outcome"] for span in attempts] == ["retried", "failed"]
    assert [(span.status, span.attributes["error.type"]) for span in attempts] == [(2, "RenderError")] * 2
    assert sum(span.name == "queue" for span in spans) == 1
    # A message without headers: this worker begins the trace.
    spans = of_job(collector, untraced)
    assert {span.parent for span in spans if span.name == "process"} == {""}

    lines = [json.loads(line) for line in complete_lines(worker.log)]
    assert {line["trace"] for line in lines if line.get("job") == first} == {sent.trace}


@pytest.mark.services
def test_a_request_its_jobs_and_its_webhooks_are_one_trace_and_so_is_each_job_of_a_file(
    ground: Ground, collector: Collector, tmp_path: Path
) -> None:
    environment = {
        **ground.stack.environment,
        **variables(collector),
        "SMALLCAT_LOG": "json",
        "SMALLCAT_WEBHOOK_HOSTS": "127.0.0.1",
        "SMALLCAT_WEBHOOK_SECRET": new_secret(),
    }
    port, metrics_port, log = _free_port(), _free_port(), tmp_path / "api.log"
    worker = ground.worker(settings=variables(collector))
    answers = iter([500, 204, 204])
    caller, call = "c" * 32, "d" * 16
    smallcat = [sys.executable, "-m", "producer"]
    serve = [*smallcat, "serve", "--no-auth", "--webhooks", "--port", str(port)]
    serve += ["--metrics-port", str(metrics_port)]
    with (
        receiving(lambda handler: handler.status(next(answers))) as receiver,
        running(serve, environment, log) as server,
    ):
        wait_until("listens", lambda: "listens on" in log.read_text(), 60)
        body = {
            **ground.job().model_dump(mode="json", exclude_defaults=True),
            "webhook": f"http://127.0.0.1:{receiver.server_address[1]}/hook",
        }
        headers = {"Content-Type": "application/json", "traceparent": f"00-{caller}-{call}-01"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/jobs", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - of this machine
            job_id = json.load(answer)["id"]
        wait_until("is told twice", lambda: len(receiver.requests) == 2, 60)
        lines = tmp_path / "prompts.txt"
        lines.write_text("one\ntwo\n")
        ingest = [*smallcat, "ingest", str(lines), "--model", "fake", "--steps", "1"]
        subprocess.run(
            ingest, env=here(environment), check=True, capture_output=True, timeout=60, cwd=tmp_path
        )
        # Its own sender has metrics, as one in a process of its own has.
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as page:
            shown = page.read().decode()
        assert 'smallcat_webhooks_total{ended="sent"} 1.0' in shown
        assert 'smallcat_webhooks_total{ended="later"} 1.0' in shown
        server.terminate()
        assert server.wait(30) == 0
    stop(worker)
    spans = collector.spans(caller)
    asked = one(spans, "POST /v1/jobs")
    assert (asked.parent, asked.kind, asked.service) == (call, 2, "smallcat-api")
    assert asked.attributes["http.response.status_code"] == 202
    [sent] = below(spans, asked)
    assert sent.name == "submit"
    assert [span.name for span in below(spans, sent)] == ["queue", "process", "webhook", "webhook"]
    tried = [span for span in spans if span.name == "webhook"]
    assert [(span.kind, span.status) for span in tried] == [(3, 2), (3, 0)]
    assert {span.attributes["smallcat.job.id"] for span in spans if "smallcat.job.id" in span.attributes} == {
        job_id
    }
    logged = [json.loads(line) for line in complete_lines(log)]
    of_job = [line for line in logged if line.get("job") == job_id]
    assert len(of_job) == 3
    assert {line["trace"] for line in of_job} == {caller}
    roots = [span for span in collector.spans() if span.name == "submit" and not span.parent]
    assert len(roots) == 2
    for root in roots:
        names = [span.name for span in collector.spans(root.trace)]
        assert sorted(names) == sorted(["submit", "queue", "process", *STAGES])


@pytest.mark.services
def test_what_is_not_sampled_is_not_traced_and_a_collector_that_is_away_is_two_lines(
    ground: Ground, collector: Collector
) -> None:
    environment = variables(collector)
    off = {**environment, "OTEL_TRACES_SAMPLER": "always_off"}
    worker = ground.worker(settings=environment)
    [unsampled] = produce(ground, off, "")
    wait_until("is done", lambda: ground.states([unsampled]) == {"done": 1})
    collector.status = 503
    [lost] = produce(ground, {}, "")
    said = "Spans cannot be sent"
    wait_until("says so", lambda: said in worker.output())
    collector.status = 200
    [kept] = produce(ground, {}, "")
    wait_until("is kept", lambda: any(s.attributes.get("smallcat.job.id") == kept for s in collector.spans()))
    stop(worker)
    assert {unsampled} & {span.attributes.get("smallcat.job.id") for span in collector.spans()} == set()
    assert lost not in {unsampled, kept}
    output = worker.output()
    assert (output.count(said), output.count("Spans are sent again")) == (1, 1)
    assert "Traceback" not in output
