"""What a real worker logs as JSON: an object a line, whoever writes it, and a line an event of a job."""

from __future__ import annotations

import json
import signal
from collections import defaultdict
from typing import Any

import pytest

from producer import submit_job
from tests.faults.harness import Ground, wait_until

pytestmark = pytest.mark.timeout(150)


def test_each_line_is_an_object_and_each_event_of_a_job_is_one(ground: Ground) -> None:
    settings = {"SMALLCAT_LOG": "json", "SMALLCAT_MAX_ATTEMPTS": "1"}
    worker = ground.worker(settings=settings)
    job = ground.job()
    handle = submit_job(job)
    handle.result(timeout=60)
    [bad] = ground.submit(1, "raise:Exception@step")
    wait_until("fails", lambda: ground.states([bad]) == {"failed": 1})
    submit_job(job)
    wait_until("is found", lambda: ground.journal.count("leave")[job.id] == 2)
    worker._asked_to_end = True
    worker._popen.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
    assert worker.wait(60)
    lines: list[dict[str, Any]] = [json.loads(line) for line in worker.output().splitlines()]
    assert all({"timestamp", "level", "logger", "message"} <= line.keys() for line in lines)
    of = defaultdict(list)
    for line in lines:
        if "job" in line:
            of[line["job"]].append(line)
    assert of.keys() == {job.id, bad}
    first, second, third, *again = [line["message"].partition(":")[0] for line in of[job.id]]
    assert first == f"Job {job.id} begins"
    assert second == f"Job {job.id} is rendered"
    assert third.startswith(f"Job {job.id} is done")
    assert again == [f"Job {job.id} begins", f"Job {job.id} is done"]
    begun, rendered, done = of[job.id][:3]
    assert begun["attempt"] == 1
    assert begun["queued_s"] < 60
    assert rendered["steps"] == job.steps
    assert done["size"] > 0
    assert [(line["level"], line.get("error")) for line in of[bad]] == [
        *(("INFO", None), ("ERROR", "RenderError")),
    ]
    text = worker.output()
    assert job.prompt not in text
    assert any(line["message"].startswith("stopping: 0 jobs") for line in lines)
