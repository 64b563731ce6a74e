"""Measures how long a tenant's few jobs take while another tenant has very many waiting.

    python -m tests.benchmarks.shares --jobs 100000 --rows 8
    python -m tests.benchmarks.shares --jobs 2000 --tenants 20

One real worker process with a fake renderer (`tests.faults.app`), whose steps take the same time however many
rows they have. First ten jobs at once on an idle queue, some times; then the same while `--jobs` jobs of
another tenant wait, and 20 of each of `--tenants` more. What must hold: the 95th percentile beside the others
is at most that on an idle queue plus the 95th percentile of how long one job takes in full batches, from when
its worker begins it to its last step: in a worker it waits for a place in the batch. Exits with 1 otherwise.
With `--tenants` nothing must hold: those have come lately, too, so each of them has as good a claim.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
import redis
from kombu.pools import producers

from deploy.embedded.stack import Stack
from producer import submit_job
from producer.ingest.message_templates import JobTemplates, MessageTemplate
from producer.session import session
from tests.faults.harness import Ground, slots, wait_until
from tests.faults.runner import SERVED
from worker.celery import connection
from worker.contract.message import route_of
from worker.contract.queues import arrivals_of

#: Jobs that a tenant submits at once, and messages that are put in one command.
FEW, AT_ONCE = 10, 500


def p95(values: Sequence[float]) -> float:
    """The value that 95 of 100 do not exceed."""
    return sorted(values)[max(0, -(-95 * len(values) // 100) - 1)]


def fill(ground: Ground, client: redis.Redis, tenant: str, count: int, **fields: int) -> list[str]:
    """Put messages of so many jobs of a tenant into the queue, without records as in runs; their ids."""
    route = route_of(ground.job(tenant=tenant, **fields))
    templates = JobTemplates(lambda job: job.resolved(SERVED))
    with producers[connection(ground.stack.valkey.url)].acquire(block=True) as producer:
        template = MessageTemplate(route, producer)
    ids: list[str] = []
    texts: list[str] = []
    for number in range(count):
        job = templates.fill({"prompt": f"bulk-{tenant}-{number}", "seed": number, **fields}, tenant)
        texts.append(template.fill(job, "", f"{job.id}-{secrets.token_hex(4)}", str(uuid.uuid4())))
        ids.append(job.id)
    for start in range(0, count, AT_ONCE):
        client.lpush(template.list, *texts[start : start + AT_ONCE])
    client.lpush(arrivals_of(route.queue, route.priority), tenant)
    return ids


def few(ground: Ground, steps: int, step_s: float, rounds: int) -> list[float]:
    """Seconds from the submission of each of `FEW` jobs at once to its end, some times."""
    took = []
    for _ in range(rounds):
        began = {}
        for _ in range(FEW):
            job = ground.job(steps=steps, tenant="small")
            at_s = time.monotonic()
            began[submit_job(job).id] = at_s
        ground.journal.wait_for("leave", began, timeout_s=300)
        ended = {event.job: event.at_s for event in ground.journal.events() if event.what == "leave"}
        took += [ended[job_id] - at_s for job_id, at_s in began.items()]
        # The next ones do not come while these count.
        time.sleep(2 * steps * step_s)
    return took


def durations(ground: Ground, ids: set[str]) -> list[float]:
    """Seconds from when a worker began it to its last step, of those of these jobs that have ended."""
    began = {event.job: event.at_s for event in ground.journal.events() if event.what == "start"}
    ended = {event.job: event.at_s for event in ground.journal.events() if event.what == "end"}
    return [ended[job_id] - began[job_id] for job_id in ids & began.keys() & ended.keys()]


def run(
    ground: Ground,
    jobs: int,
    priority: int,
    rows: int,
    steps: int,
    step_s: float,
    tenants: int,
    rounds: int,
) -> dict[str, float]:
    """Measure. Returns seconds by name."""
    ground.worker(rows=rows, step_s=step_s, settings={"SMALLCAT_LEASE_S": "30"}, storage="folder", marks="0")
    idle = few(ground, steps, step_s, rounds)
    with ground.redis as client:
        ids = fill(ground, client, "bulk", jobs, steps=steps, priority=priority)
        for number in range(tenants):
            fill(ground, client, f"t{number}", 20, steps=steps, priority=priority)
    full = ground.journal.total("leave") + 2 * slots(rows)
    wait_until("full batches", lambda: ground.journal.total("leave") >= full, 300)
    beside = few(ground, steps, step_s, rounds)
    of_one = p95(durations(ground, set(ids)))
    left = sum(session().fleet.waiting().values())
    return {
        "idle queue, p95": p95(idle),
        "one job in full batches, p95": of_one,
        "allowed": p95(idle) + of_one,
        "beside the others, p95": p95(beside),
        "beside the others, median": sorted(beside)[len(beside) // 2],
        "jobs that still wait": left,
    }


@click.command(help=__doc__)
@click.option("--jobs", default=100_000, show_default=True, help="Jobs of the other tenant.")
@click.option("--priority", default=5, show_default=True, help="Their priority; that of prompt files is 3.")
@click.option("--tenants", default=0, show_default=True, help="More that come at once, with 20 jobs each.")
@click.option("--rows", default=8, show_default=True, help="Jobs that share a step.")
@click.option("--steps", default=20, show_default=True, help="Steps of a job.")
@click.option("--step-s", default=0.05, show_default=True, help="Seconds of a step.")
@click.option("--rounds", default=5, show_default=True, help="Times that ten jobs are submitted at once.")
def main(jobs: int, priority: int, tenants: int, rows: int, steps: int, step_s: float, rounds: int) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        Stack(workers=0) as stack,
    ):
        ground = Ground(stack, Path(folder))
        os.environ.update({"OMP_NUM_THREADS": "1"})
        ground.use(patch)
        found = run(ground, jobs, priority, rows, steps, step_s, tenants, rounds)
        print(json.dumps({name: round(value, 3) for name, value in found.items()}))
    sys.exit(0 if tenants or found["beside the others, p95"] <= found["allowed"] else 1)


if __name__ == "__main__":
    main()
