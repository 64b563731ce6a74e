"""Which workers are alive and what they serve; from that, the model revision and the queue of a job.

A worker announces itself every few seconds; its announcement expires when it no longer does. With it the
worker keeps a digest up to date: which models are served, and by how many. That is all that a producer needs,
and it is as small for a thousand workers as for one; `workers` reads all announcements.

A worker takes only jobs of its own model and revision, so a new revision never answers with the old one's
pictures. `groups` says which of them a job means.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from worker.contract.choices import PromptSyntax
from worker.contract.file_index import FileIndex
from worker.contract.job import Job
from worker.contract.queues import Takers, lists_of, queues_of
from worker.contract.refusals import code_of
from worker.state.file_indexes import FileIndexes
from worker.state.groups import Group, Meant, groups_in, groups_of, meant_by, takers, version_read
from worker.state.groups import WorkerInfo as WorkerInfo
from worker.state.keys import BOOK, DIGEST, LATEST, QUEUES, SERVED, WORKERS, worker_key
from worker.state.scripts import ANNOUNCE, WITHDRAW
from worker.state.shared_scripts import load
from worker.state.tenants import lists_of_tenant, waiting_of_tenants

if TYPE_CHECKING:
    from redis.client import Redis

#: Seconds between two announcements of a worker, and seconds until the last one expires.
ANNOUNCE_EVERY_S, ANNOUNCE_TTL_S = 5, 15
#: Announcements that are remembered, at most.
MAX_SEEN = 1_000


@dataclass(frozen=True)
class FleetSnapshot:
    """What the workers serve at one moment."""

    #: The groups of live workers.
    live: Sequence[Group]
    #: What was served last, those that were live last first.
    last_seen: Sequence[Group]
    #: The index of each digest in these.
    indexes: Mapping[str, FileIndex]

    def meant(self, job: Job) -> Meant | None:
        """As `Fleet.meant`, at that moment."""
        group = meant_by(job, lambda: self.live, lambda: self.last_seen)
        return group.meaning(self.indexes[group.files]) if group else None

    def resolve(self, job: Job) -> Job:
        """As `Fleet.resolve`, at that moment."""
        return resolved_by(self.meant(job), job)


def resolved_by(meant: Meant | None, job: Job) -> Job:
    """`job` by what it means; open where no worker announced its model. Raises `InvalidJobError`."""
    if meant is not None:
        return meant.resolve(job)
    return job if job.revision else job.opened()


class Fleet:
    """The workers of one Redis. Workers announce themselves, producers ask. Thread-safe."""

    def __init__(self, client: Redis, ttl_s: int) -> None:
        self._redis = client
        self._ttl_s = ttl_s
        #: The groups of live workers as they were read last, and the monotonic seconds of then.
        self._known: tuple[float, Sequence[Group]] = (float("-inf"), ())
        self._announce = client.register_script(ANNOUNCE)
        self._withdraw = client.register_script(WITHDRAW)
        #: The files that workers offer.
        self.indexes = FileIndexes(client, ttl_s)

    def now(self) -> float:
        """Unix seconds by Redis' clock."""
        seconds, micros = self._redis.time()
        return float(seconds + micros / 1e6)

    def announce(self, worker: WorkerInfo) -> None:
        """Announce `worker` for the next `ANNOUNCE_TTL_S` seconds, and load the producers' scripts."""
        load(self._redis)
        served = f'"served":{worker.served.model_dump_json(exclude_defaults=True)}'
        if worker.reads > 1:
            served += f',"reads":{worker.reads}'
        if worker.paused:
            served += ',"paused":true'
        if worker.prompt_syntax is not PromptSyntax.PLAIN:
            served += f',"prompt_syntax":"{worker.prompt_syntax}"'
        if worker.files:
            served += f',"files":"{worker.files}"'
        if worker.retiring:
            served += ',"retiring":true'
        group = hashlib.sha256(served.encode()).hexdigest()[:16]
        said = worker.model_dump_json(exclude_defaults=True)
        keys = [worker_key(worker.name), WORKERS, DIGEST, BOOK, SERVED, QUEUES, LATEST]
        lifetimes = (ANNOUNCE_TTL_S, self._ttl_s)
        args = [worker.name, said, *map(str, lifetimes), group, served, repr(worker.started_at)]
        if version := self._announce(keys=keys, args=args):
            self._note_seen(str(version))

    def _note_seen(self, version: str) -> None:
        """Write what is served now as last seen, for when its workers are away."""
        groups = groups_in(self._redis.get(DIGEST))
        if groups is None:
            live = self.workers()
        else:
            names = {name for group in groups for _, name in (group.first, group.last)}
            live = self._announced(sorted(names))
        # Models that no live worker serves come after those that are served, and where the live ones retire
        # so do other revisions of their model: these are meant while their workers are away.
        models = {each.served.name for each in live if not each.retiring}
        here = {each.served for each in live}
        before = [each for each in self._last_seen() if each.served not in here]
        away = [each for each in before if each.served.name not in models]
        seen = json.dumps(
            [each.model_dump(mode="json", exclude_defaults=True) for each in [*live, *away][:MAX_SEEN]]
        )
        with self._redis.pipeline() as pipe:
            pipe.set(SERVED, seen, ex=self._ttl_s)
            pipe.set(f"{BOOK}:seen", version, ex=self._ttl_s)
            pipe.execute()

    def withdraw(self, name: str) -> None:
        """Remove the announcement of a worker that is leaving."""
        self._withdraw(keys=[worker_key(name), WORKERS, DIGEST, BOOK], args=[name, ANNOUNCE_TTL_S])

    def groups(self, age_s: float = 0.0) -> Sequence[Group]:
        """The live workers by what they serve; as they were read last, if less than `age_s` seconds ago."""
        read_s, known = self._known
        if time.monotonic() - read_s < age_s:
            return known
        groups = groups_in(self._redis.get(DIGEST))
        # No worker of this version is live, or some of earlier ones are, too.
        found = groups_of(self.workers()) if groups is None else groups
        self._known = time.monotonic(), found
        return found

    def workers(self) -> list[WorkerInfo]:
        """The live workers, those that have been up longest first."""
        return self._announced(sorted(str(name) for name in self._redis.smembers(WORKERS)))

    def _announced(self, names: list[str]) -> list[WorkerInfo]:
        texts = self._redis.mget([worker_key(name) for name in names]) if names else []
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

    def meant(self, job: Job, age_s: float = 0.0) -> Meant | None:
        """What `job` means; None where no worker announced its model. `age_s`: as `groups`."""
        group = meant_by(job, partial(self.groups, age_s), self.groups, self._groups_last_seen)
        return group.meaning(self.indexes.get(group.files)) if group else None

    def resolve(self, job: Job, age_s: float = 0.0) -> Job:
        """`job` with the model, revision, syntax and files that it means. `age_s`: as `groups`.

        Open where no worker announced the model. A job that names a revision that nobody serves stays as it
        is, and waits for such a worker. Raises `InvalidJobError` for a file that cannot be used.
        """
        return resolved_by(self.meant(job, age_s), job)

    def snapshot(self) -> FleetSnapshot:
        """What is served now, for who resolves many jobs."""
        live, last_seen = self.groups(), self._groups_last_seen()
        indexes = {group.files: self.indexes.get(group.files) for group in (*live, *last_seen)}
        return FleetSnapshot(live, last_seen, indexes)

    def serving(self, *queues: str, version: int = 1) -> int:
        """The number of live workers that take messages of `version` from one of `queues`."""
        return sum(
            group.workers
            for group in self.groups()
            if group.reads >= version
            and not group.paused
            and not set(queues).isdisjoint(queues_of(group.served))
        )

    def takers(self, queue: str, job: Job) -> Takers:
        """Who takes messages of `job` from `queue`."""
        return takers(self.groups(), queue, job, self.indexes.get)

    def version_read(self, queue: str) -> int:
        """The version of messages up to which a live worker takes jobs from `queue`; 0 where none does."""
        return version_read(self.groups(), queue)

    def waiting(self, tenant: str | None = None) -> dict[str, int]:
        """The number of messages that wait in each queue that jobs were sent to lately.

        `tenant`: of its messages alone; None: of all.
        """
        queues = sorted(str(queue) for queue in self._redis.smembers(QUEUES))
        if tenant is not None:
            found = {queue: self.length(queue, tenant=tenant) for queue in queues}
            return {queue: count for queue, count in found.items() if count}
        of_tenants = {queue: sum(waiting_of_tenants(self._redis, queue).values()) for queue in queues}
        return {queue: self.length(queue) + of_tenants[queue] for queue in queues}

    def length(self, queue: str, version: int = 1, tenant: str = "") -> int:
        """The number of messages of a tenant, or of jobs without one, that wait in `queue`.

        Those for newer workers are counted up to `version`, which a worker must read to take them.
        """
        names = lists_of_tenant(queue, tenant) if tenant else lists_of(queue, version)
        with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.llen(name)
            found = pipe.execute(raise_on_error=False)
        for each in found:
            # What is no list is no queue, whoever named it.
            if isinstance(each, Exception) and "WRONGTYPE" not in str(each):
                raise each
        return sum(each for each in found if isinstance(each, int))

    def _last_seen(self) -> list[WorkerInfo]:
        text = self._redis.get(SERVED)
        return [WorkerInfo.model_validate(each) for each in json.loads(text)] if text else []

    def _groups_last_seen(self) -> Sequence[Group]:
        """Their order says more than when they started: those that were live last come first."""
        found = []
        for number, worker in enumerate(self._last_seen()):
            place = (float(number), worker.name)
            found.append(
                Group(
                    served=worker.served,
                    workers=0,
                    first=place,
                    last=place,
                    prompt_syntax=worker.prompt_syntax,
                    files=worker.files,
                    retiring=worker.retiring,
                )
            )
        return found
