"""Empties queues faster than any worker: `python -m tests.drain QUEUE...`, until SIGTERM.

Messages are taken by hundreds, read as a worker reads them, and ended with the workers' own scripts. Each
message is a line in `DRAIN_JOURNAL`: the number of its job in its run. Nothing is rendered.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import redis

from worker.contract.errors import InvalidJobError
from worker.contract.message import Message, RunMark, payload_in
from worker.contract.queues import lists_of
from worker.contract.record import JobRecord, State
from worker.state import scripts as scripts
from worker.state.keys import DRAWN, FAILED, attempts_key, job_key
from worker.state.records import Claim, Records

AT_ONCE = 500


class Drain:
    """A worker in this process, for tests: ends the jobs of some queues with the records' own calls."""

    def __init__(self, redis_url: str, *queues: str) -> None:
        self.client = redis.Redis.from_url(redis_url, decode_responses=True)
        self.records = Records(self.client, 600)
        self.queues = queues
        #: (number in the run, id) of each message, in the order in which they came.
        self.seen: list[tuple[int, str]] = []

    def take(self) -> tuple[Message, str] | None:
        """The next message, claimed; None when there is none."""
        for name in (name for queue in self.queues for name in lists_of(queue)):
            if text := self.client.rpop(name):
                payload, task_id = read(str(text))
                message = Message.parse(payload)
                self.seen.append((RunMark.parse(message.run).number, message.id))
                self.claim(message, task_id)
                return message, task_id
        return None

    def claim(self, message: Message, task_id: str) -> Claim:
        """Claim a message's job."""
        return self.records.claim(
            message.job,
            task_id,
            worker="drain",
            lease_s=30,
            max_attempts=3,
            queue=self.queues[0],
            run=message.run,
        )[0]

    def end(self, message: Message, task_id: str) -> None:
        """End a job; one whose prompt says so fails."""
        if message.job.prompt.startswith("fail"):
            self.records.failed(message.id, task_id, InvalidJobError("It was asked to fail."))
            return
        uri = f"s3://nowhere/{message.id}.png"
        self.records.done(JobRecord(id=message.id, state=State.DONE, job=message.job, uri=uri))

    def all(self) -> int:
        """End all jobs that wait; how many."""
        number = 0
        while found := self.take():
            self.end(*found)
            number += 1
        return number


def main(queues: list[str]) -> None:
    client = redis.Redis.from_url(os.environ["REDIS_URL"], decode_responses=True)
    lists = [name for queue in queues for name in lists_of(queue)]
    claim, finish = client.script_load(scripts.CLAIM), client.script_load(scripts.FINISH)
    over: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: over.append(number))
    with open(os.environ.get("DRAIN_JOURNAL", os.devnull), "a", buffering=1 << 20) as journal:  # noqa: PTH123
        while not over:
            with client.pipeline(transaction=False) as pipe:
                for name in lists:
                    pipe.rpop(name, AT_ONCE)
                texts = [text for found in pipe.execute() for text in found or ()]
            if not texts:
                journal.flush()
                time.sleep(0.02)
                continue
            messages = [read(text) for text in texts]
            with client.pipeline(transaction=False) as pipe:
                for payload, task_id in messages:
                    record = job_key(payload["id"])
                    job = json.dumps(payload["job"])
                    run = payload["run"]
                    keys = (record, attempts_key(payload["id"]))
                    claims = (task_id, task_id, "drain", 30, 3, 600, job, queues[0], task_id, run, "yes")
                    pipe.evalsha(claim, 2, *keys, *claims)
                    ends = ("done", 600, "", "", payload["id"], "", "", 0, "uri", "s3://nowhere/x.png")
                    pipe.evalsha(finish, 4, record, FAILED, keys[1], DRAWN, *ends)
                    pipe.delete(record)
                    journal.write(f"{RunMark.parse(run).number} {payload['id']}\n")
                pipe.execute()


def read(text: str) -> tuple[dict[str, str], str]:
    """A message's payload and id. The first of each hundred is checked as a worker would."""
    message = json.loads(text)
    payload = payload_in(message)
    if RunMark.parse(payload["run"]).number % 100 == 0:
        Message.parse(payload)
    return payload, message["headers"]["id"]


if __name__ == "__main__":
    main(sys.argv[1:])
