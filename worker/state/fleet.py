"""Which workers are alive and what they serve; from that, the model revision and the queue of a job.

A worker announces itself every few seconds; its announcement expires when it no longer does.

A job that names a model gets the revision of the newest live worker that serves it. A job that names none
gets the fleet's default: the model of the worker that has been up longest. A worker takes only jobs of its
own model and revision, so a new revision never answers with the old one's pictures.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from worker.contract.job import DEFAULT_MODEL, Job
from worker.contract.queues import lists_of, queues_of
from worker.contract.refusals import code_of
from worker.contract.served_model import ServedModel
from worker.state.keys import QUEUES, SERVED, WORKERS, worker_key
from worker.state.shared_scripts import load

if TYPE_CHECKING:
    from redis.client import Redis

#: Seconds between two announcements of a worker, and seconds until the last one expires.
ANNOUNCE_EVERY_S, ANNOUNCE_TTL_S = 5, 15
#: Announcements that are remembered, at most.
MAX_SEEN = 1_000


class WorkerInfo(BaseModel):
    """A worker as it announces itself."""

    model_config = ConfigDict(frozen=True)

    #: Celery's node name.
    name: str
    #: What it serves.
    served: ServedModel
    #: Unix seconds by Redis' clock when it started.
    started_at: float
    #: What it runs on, such as "NVIDIA H200" or "CPU, 2 threads".
    device: str
    #: Attention backend in use.
    attention: str
    #: Rows of one forward pass, at most: its largest batch size.
    max_rows: int
    #: Versions of what it runs, by package.
    versions: dict[str, str]
    #: Why it takes no jobs at present; empty while it does.
    paused: str = ""


class Fleet:
    """The workers of one Redis. Workers announce themselves, producers ask. Thread-safe."""

    def __init__(self, client: Redis, ttl_s: int) -> None:
        self._redis = client
        self._ttl_s = ttl_s

    def now(self) -> float:
        """Unix seconds by Redis' clock."""
        seconds, micros = self._redis.time()
        return float(seconds + micros / 1e6)

    def announce(self, worker: WorkerInfo) -> None:
        """Announce `worker` for the next `ANNOUNCE_TTL_S` seconds, and load the producers' scripts."""
        load(self._redis)
        with self._redis.pipeline() as pipe:
            pipe.set(
                worker_key(worker.name), worker.model_dump_json(exclude_defaults=True), ex=ANNOUNCE_TTL_S
            )
            pipe.sadd(WORKERS, worker.name)
            pipe.expire(WORKERS, self._ttl_s)
            pipe.execute()
        live = self.workers()
        models = {each.served.name for each in live}
        # Models that no live worker serves come after those that are served.
        away = [each for each in self._last_seen() if each.served.name not in models]
        seen = json.dumps(
            [each.model_dump(mode="json", exclude_defaults=True) for each in [*live, *away][:MAX_SEEN]]
        )
        self._redis.set(SERVED, seen, ex=self._ttl_s)

    def withdraw(self, name: str) -> None:
        """Remove the announcement of a worker that is leaving."""
        with self._redis.pipeline() as pipe:
            pipe.delete(worker_key(name))
            pipe.srem(WORKERS, name)
            pipe.execute()

    def workers(self) -> list[WorkerInfo]:
        """The live workers, those that have been up longest first."""
        names = sorted(str(name) for name in self._redis.smembers(WORKERS))
        if not names:
            return []
        texts = self._redis.mget([worker_key(name) for name in names])
        gone = [name for name, text in zip(names, texts, strict=True) if text is None]
        if gone:
            self._forget(gone)
        live = [WorkerInfo.model_validate_json(text) for text in texts if text is not None]
        return sorted(live, key=lambda worker: (worker.started_at, worker.name))

    def _forget(self, names: list[str]) -> None:
        try:
            self._redis.srem(WORKERS, *names)
        except Exception as error:
            if code_of(error) != "NOPERM":
                raise
            # A producer may not: the next worker that announces itself does.

    def resolve(self, job: Job) -> Job:
        """`job` with the model and revision that it means; open where no worker ever announced the model.

        A job that names a revision that nobody serves stays as it is, and waits for such a worker.
        """
        live = self.workers()
        for workers in (live, self._last_seen()):
            model = workers[0].served.name if workers and job.model == DEFAULT_MODEL else job.model
            served = [
                worker.served
                for worker in workers
                if worker.served.name == model and job.revision in ("", worker.served.revision)
            ]
            if served:
                return job.resolved(served[-1])
        return job if job.revision else job.opened()

    def serving(self, queue: str) -> list[WorkerInfo]:
        """The live workers that take jobs from `queue`."""
        return [worker for worker in self.workers() if queue in queues_of(worker.served)]

    def waiting(self) -> dict[str, int]:
        """The number of messages that wait in each queue that jobs were sent to lately."""
        queues = sorted(str(queue) for queue in self._redis.smembers(QUEUES))
        return {queue: self.length(queue) for queue in queues}

    def length(self, queue: str) -> int:
        """The number of messages that wait in `queue`, of all priorities."""
        with self._redis.pipeline(transaction=False) as pipe:
            for name in lists_of(queue):
                pipe.llen(name)
            return sum(pipe.execute())

    def _last_seen(self) -> list[WorkerInfo]:
        text = self._redis.get(SERVED)
        return [WorkerInfo.model_validate(each) for each in json.loads(text)] if text else []
