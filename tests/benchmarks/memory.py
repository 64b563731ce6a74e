"""Measures how much of Redis' memory jobs take that were submitted by `submit_job`, and are done.

    python -m tests.benchmarks.memory --program /usr/bin/redis-server

A million jobs a day leave seven million submissions, which stay for seven days, and the records of an hour.
Redis' tables of keys are as full in the measurement as with those. "used" is what Redis counts, and what its
`maxmemory` limits; "resident" is what its process takes.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import redis

from deploy.embedded.servers import valkey_server
from producer.client.sending import SUBMISSION_BYTES
from tests.benchmarks.fleet import rounded
from tests.faults.runner import SERVED
from worker.contract.job import SUBMISSION_FIELDS, Job
from worker.contract.queues import queue_of
from worker.contract.record import JobRecord, State, Timings
from worker.state.keys import job_key, submission_key
from worker.state.records import Records
from worker.state.submissions import Submission, Submissions, said

DAY, HOUR = 1_000_000, 1_000_000 // 24
TTL_S = 7 * 86_400
#: How full seven million keys make a table of 2**23 places.
FULL = 7 * DAY / 2**23
#: Keys of submissions, and of submissions with their records, that are measured.
SUBMISSIONS, RECORDS = int(FULL * 2**18), int(FULL * 2**14)


@contextlib.contextmanager
def server(program: str, settings: Sequence[str]) -> Iterator[redis.Redis]:
    """A new server, without persistence."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "socket")
        argv = [program, "--port", "0", "--unixsocket", path, "--dir", folder, "--save", "", *settings]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        try:
            client = redis.Redis(unix_socket_path=path, decode_responses=True, protocol=2)
            while True:
                with contextlib.suppress(redis.exceptions.ConnectionError):
                    client.ping()
                    break
                time.sleep(0.05)
            yield client
        finally:
            process.kill()
            process.wait()


def used(client: redis.Redis) -> dict[str, float]:
    """Bytes, by what counts them."""
    info: dict[str, Any] = client.info("memory")
    return {"used": info["used_memory"], "resident": info["used_memory_rss"]}


def job(number: int) -> Job:
    """A job as others are: a prompt of some words, and the rest at its default."""
    prompt = f"a small cat that looks out of the window of house number {number}, oil painting, warm light"
    return Job(prompt=prompt, seed=number, model=SERVED.name).resolved(SERVED)


def submission(one: Job) -> Submission:
    """One as `submit_job` sends it. Its message, which does not stay, is left out."""
    own = {name: getattr(one, name) for name in SUBMISSION_FIELDS}
    return Submission(
        job_id=one.id,
        job=one.model_dump_json(),
        queue=queue_of(one),
        submission=secrets.token_hex(SUBMISSION_BYTES),
        own=json.dumps(said(own), separators=(",", ":")),
        message_id=f"{one.id}-{secrets.token_hex(4)}",
        noted=secrets.token_hex(20),
    )


def of_submissions(client: redis.Redis) -> dict[str, float]:
    """Bytes that a submission takes once its job's record has expired."""
    submissions = Submissions(client, TTL_S)
    client.set("warm", 1)
    before = used(client)
    for first in range(0, SUBMISSIONS, 200):
        part = [submission(job(number)) for number in range(first, min(first + 200, SUBMISSIONS))]
        refused, _ = submissions.send(part)
        assert not any(refused), refused
        client.delete(*(job_key(each.job_id) for each in part))
    return {name: (count - before[name]) / SUBMISSIONS for name, count in used(client).items()}


def of_records(client: redis.Redis) -> dict[str, float]:
    """Bytes that a submission and the record of a job that is done take."""
    records, submissions = Records(client, TTL_S), Submissions(client, TTL_S)
    before = used(client)
    for number in range(RECORDS):
        one = job(number)
        sent = submission(one)
        submissions.send([sent])
        where: dict[str, Any] = {"worker": "smallcat-12345@worker-1.example.com", "lease_s": 30.0}
        records.claim(one, sent.message_id, max_attempts=3, queue=sent.queue, **where)
        uri, timings = f"s3://pictures/images/{one.id[:2]}/{one.id}.png", Timings(queued=1.25, rendered=2.5)
        record = JobRecord(id=one.id, state=State.DONE, job=one, step=50, steps=50, attempts=1, uri=uri)
        more = {"timings": timings.model_copy(update={"uploaded": 0.125}), "worker": where["worker"]}
        assert records.done(record.model_copy(update=more))
    assert client.exists(job_key(one.id), submission_key(one.id, sent.submission)) == 2
    return {name: (count - before[name]) / RECORDS for name, count in used(client).items()}


@click.command(help=__doc__)
@click.option("--program", default=lambda: str(valkey_server()), help="The server; Valkey if not given.")
@click.option("--setting", "settings", multiple=True, nargs=2, help="A setting of the server and its value.")
def main(program: str, settings: Sequence[tuple[str, str]]) -> None:
    words = [word for name, value in settings for word in (f"--{name}", value)]
    with server(program, words) as client:
        info: dict[str, Any] = client.info()
        version = info.get("valkey_version") or info["redis_version"]
        print(json.dumps({"version": version, "allocator": info["mem_allocator"]}), flush=True)
        submissions = of_submissions(client)
    with server(program, words) as client:
        both = of_records(client)
    for name, of_submission in submissions.items():
        of_record = both[name] - of_submission
        total = 7 * DAY * of_submission + HOUR * of_record
        figures = {"bytes of a submission": of_submission, "of a record": of_record}
        print(json.dumps({name: rounded({**figures, "GB at a million a day": total / 1e9})}), flush=True)


if __name__ == "__main__":
    main()
