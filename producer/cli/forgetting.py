"""What `smallcat forget` does: first what Redis has goes, then the objects, then those that come late.

Each step finds what is left to do by itself, so after an interruption the same command goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

from worker.contract.errors import StorageError
from worker.contract.plain_text import counted
from worker.state.forgetting import Forgetting, Scope

if TYPE_CHECKING:
    from producer.session import Session
    from worker.storage.deletion import Deletion, Stored

#: Begins the keys of what was removed so far, until all is.
_SO_FAR: Final = "smallcat:forgetting:"
#: What is counted, in the order in which it is shown, and what it is.
COUNTED: Final = {
    "records": "records of jobs in Redis",
    "submissions": "submissions, with their metadata",
    "messages": "messages in queues",
    "set_aside": "messages that were set aside",
    "runs": "runs",
    "notifications": "notifications to webhooks",
    "answers": "answers to requests with an Idempotency-Key",
    "pictures": "pictures",
    "lasting_records": "records in the bucket",
    "inputs": "files that jobs begin with",
    "older_versions": "older versions in the bucket",
}
#: Seconds between two looks at jobs that a worker has.
_LOOK_EVERY_S: Final = 0.5


@dataclass
class Forgotten:
    """What was removed."""

    #: How many of each, by the words of `COUNTED`.
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    #: What the bucket did not let go, a sentence each.
    kept: list[str] = field(default_factory=list)


class Forget:
    """Forgets what a scope has. Raises `QueueError`, `StorageError`."""

    def __init__(
        self, session: Session, scope: Scope, *, is_dry: bool, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """`tell` is called with a sentence while it takes long."""
        self._session, self._scope, self._is_dry, self._tell = session, scope, is_dry, tell
        self._redis = session.redis
        self._so_far = f"{_SO_FAR}{scope.name}"
        self._done = Forgotten()
        self._state = Forgetting(
            session.redis, session.settings.record_ttl_s, scope, self._count, is_dry=is_dry
        )

    def __call__(self) -> Forgotten:
        """Do it all, or go on where it was interrupted."""
        with self._session.queue_errors():
            if not self._is_dry:
                self._redis.hsetnx(self._so_far, "begun", int(self._state.now()))
                self._redis.expire(self._so_far, 30 * 86_400)
            deletion = self._deletion()
            # Before they are deleted: by them submissions are found of which nothing else is left.
            for each in self._objects(deletion):
                self._state.jobs[each.job_id] = each.tenant
            self._state.tell_servers()
            self._state.runs()
            self._state.records()
            if self._scope.job:
                self._state.forget({self._scope.job: self._state.jobs.get(self._scope.job, "")})
            self._state.messages()
            self._state.set_aside()
            self._state.notifications()
            self._state.rest()
            self._delete(deletion, self._objects(deletion))
            self._delete(deletion, self._inputs(deletion))
            if not self._is_dry:
                self._wait(deletion)
                self._finish()
        return self._done

    def _deletion(self) -> Deletion:
        from worker.storage.deletion import Deletion

        if self._session.bucket is None:
            raise StorageError("S3_BUCKET is not set: name the bucket that the pictures are in.")
        return Deletion(self._session.bucket)

    def _objects(self, deletion: Deletion) -> Iterator[Stored]:
        """The objects that are to be deleted."""
        if self._scope.tenant:
            yield from deletion.of_tenant(self._scope.tenant)
        elif self._scope.job:
            known = self._state.jobs.get(self._scope.job)
            tenants = ["", *deletion.tenants()] if known is None else [known]
            yield from deletion.of_job(self._scope.job, tenants)
        else:
            yield from (each for each in deletion.of_all() if each.at < self._scope.before)

    def _inputs(self, deletion: Deletion) -> Iterator[Stored]:
        """The files to be deleted that jobs begin with. Those of one job may be others' as well, and stay."""
        if self._scope.tenant:
            yield from deletion.inputs_of_tenant(self._scope.tenant)
        elif not self._scope.job:
            yield from deletion.inputs_before(self._scope.before)

    def _delete(self, deletion: Deletion, objects: Iterator[Stored]) -> None:
        from worker.storage.deletion import batches

        for batch in batches(objects):
            stays: list[str] = []
            if not self._is_dry:
                stays = deletion.delete(batch)
                self._done.kept += stays
            refused = {said.partition(":")[0] for said in stays}
            gone = [each for each in batch if each.key not in refused]
            pictures = [each for each in gone if each.job_id]
            is_record = [each.key.endswith(".json") for each in pictures if each.is_current]
            self._count("pictures", len(is_record) - sum(is_record))
            self._count("lasting_records", sum(is_record))
            self._count("older_versions", sum(not each.is_current for each in gone))
            self._count("inputs", sum(not each.job_id and each.is_current for each in gone))

    def _wait(self, deletion: Deletion) -> None:
        """Until no worker works on one of the jobs; then delete what they have put meanwhile."""
        late, is_told = dict.fromkeys(self._state.held), False
        while self._state.wait():
            if not is_told:
                is_told = True
                held = counted(len(self._state.held), "job is", "jobs are")
                self._tell(f"{held} on a worker: waiting for the end.")
            time.sleep(_LOOK_EVERY_S)
        for job_id in late:
            tenant = self._state.jobs[job_id]
            self._delete(deletion, deletion.of_job(job_id, [tenant]))
            self._state.forget({job_id: tenant})

    def _count(self, what: str, number: int) -> None:
        if number:
            self._done.counts[what] += number
            if not self._is_dry:
                self._redis.hincrby(self._so_far, what, number)

    def _finish(self) -> None:
        """The counts of all calls together; the next call begins anew."""
        found = cast("dict[str, Any]", self._redis.hgetall(self._so_far))
        self._done.counts = {what: int(found.get(what, 0)) for what in COUNTED}
        self._redis.delete(self._so_far)
