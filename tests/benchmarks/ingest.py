"""Measures the throughput of publishing a prompt file, against plain `apply_async` in the same run.

    python -m tests.benchmarks.ingest                    100,000 lines
    python -m tests.benchmarks.ingest --lines 1000000    needs about 2 GB for Redis

The file is read, its dynamic prompts are expanded, and its jobs are checked, hashed into ids and queued. No
worker takes them. `apply_async` gets finished jobs, one by one, over one connection. It is measured before
and after, because the speed of a machine varies. Prints one JSON object: jobs/s of both, their ratio, and the
peak memory of the feeder.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from deploy.embedded.stack import Stack
from tests.fast_worker import SERVED, announce
from worker.contract.job import Job

ROOT = Path(__file__).resolve().parents[2]
#: Jobs of each of the two samples of `apply_async`.
PLAIN = 2_000


def plain(redis_url: str, jobs: int) -> float:
    """Jobs/s that Celery's own producer publishes."""
    from worker.celery import app, connection
    from worker.contract.message import TASK, payload_of, route_of

    ready = [Job(prompt=f"a photo of cat number {n}", seed=n).resolved(SERVED) for n in range(jobs)]
    with connection(redis_url) as open_connection:
        producer = app.amqp.Producer(open_connection)
        began = time.perf_counter()
        for job in ready:
            route = route_of(job)
            app.send_task(
                TASK,
                args=[payload_of(job)],
                task_id=f"{job.id}-{secrets.token_hex(4)}",
                queue=route.queue,
                priority=route.priority,
                producer=producer,
            )
        return jobs / (time.perf_counter() - began)


def fed(stack: Stack, file: Path, lines: int) -> tuple[float, float]:
    """Jobs/s that `ingest --detach` publishes, from the first to the last, and its peak memory in MB."""
    code = (
        "import sys, time, resource\n"
        "from producer.ingest.feeder import Ingest\n"
        "from producer.ingest.run_state import Run\n"
        "times = []\n"
        "feed = Run.feed\n"
        "Run.feed = lambda *args: (feed(*args), times.append(time.perf_counter()))\n"
        "make = Ingest._feed_until_over\n"
        "Ingest._feed_until_over = lambda *args: (times.append(time.perf_counter()), make(*args))[1]\n"
        "from producer import submit_file\n"
        "submit_file(sys.argv[1], detach=True)\n"
        "print(times[-1] - times[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(
        command, cwd=ROOT, env=stack.environment, check=True, capture_output=True, text=True
    )
    seconds, peak = map(float, done.stdout.split())
    return lines / seconds, peak / (1024 if sys.platform == "linux" else 1 << 20)


@click.command(help=__doc__)
@click.option("--lines", default=100_000, show_default=True, help="Lines of the prompt file.")
def main(lines: int) -> None:
    with Stack(workers=0) as stack, tempfile.TemporaryDirectory() as folder:
        announce(stack.valkey.url)
        file = Path(folder) / "prompts.txt"
        file.write_text("".join(f"a photo of cat number {number}\n" for number in range(lines)))
        before = plain(stack.valkey.url, PLAIN)
        rate, peak_mb = fed(stack, file, lines)
        after = plain(stack.valkey.url, PLAIN)
    baseline = (before + after) / 2
    print(
        json.dumps(
            {
                "lines": lines,
                "apply_async_per_s": [round(before), round(after)],
                "ingest_per_s": round(rate),
                "times_faster": round(rate / baseline, 1),
                "peak_mb": round(peak_mb),
            }
        )
    )


if __name__ == "__main__":
    main()
