"""Submissions of jobs: what is sent of each, and many in one round trip. `Records.submitted` sends one.

A job's record and its message are written in one step: there is none without the other.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from worker.contract.errors import QueueError
from worker.contract.found_message import digest_of
from worker.contract.job import SUBMISSION_FIELDS, Job
from worker.contract.refusals import code_of
from worker.state import scripts
from worker.state.chains import refusal
from worker.state.keys import FAILED, QUEUES, job_key, latest_key, submission_key
from worker.state.shared_scripts import LOADED_WITHIN_S, RETRY_S, WrittenLately, load

if TYPE_CHECKING:
    from redis.client import Redis

_DEFAULTS: Final = {
    name: Job.model_fields[name].get_default(call_default_factory=True) for name in SUBMISSION_FIELDS
}
_DIGEST: Final = hashlib.sha1(scripts.SUBMIT.encode(), usedforsecurity=False).hexdigest()


def said(own: Mapping[str, Any]) -> dict[str, Any]:
    """What is a submission's own, without what is at its default: it stays for days, and there are many.

    But for the priority: earlier versions take one that says nothing for an unknown submission.
    """
    return {name: own[name] for name in own if name == "priority" or own[name] != _DEFAULTS[name]}


class Submission(NamedTuple):
    """One submission of a job, ready to be sent."""

    #: The job's id.
    job_id: str
    #: The job as JSON.
    job: str
    #: The name of its queue.
    queue: str
    #: The submission's own id.
    submission: str
    #: What is the submission's own, as JSON.
    own: str
    #: The id of its message.
    message_id: str
    #: The Redis list that the message goes to, and the message. Without a list no message is put.
    list: str = ""
    message: str = ""
    #: The fingerprint of the message; empty: that of `message`, which was written just now. "1": unknown, as
    #: with earlier versions.
    noted: str = ""
    #: Whose job it is.
    tenant: str = ""
    #: Its webhook, as `worker.contract.webhook.hook_of` makes it; empty: it has none.
    hook: str = ""
    #: The ids of the jobs whose pictures it begins with: it waits for those that are not done.
    parents: tuple[str, ...] = ()

    def call(self, ttl_s: int, is_named: int) -> tuple[Sequence[str], Sequence[str | int]]:
        """Keys and words of `submit.lua`. `is_named`: 1 where the sender named the queue lately, else 0."""
        record, own = job_key(self.job_id), submission_key(self.job_id, self.submission)
        keys = [record, QUEUES, FAILED, own, latest_key(self.tenant), *([self.list] if self.list else [])]
        about = (self.job, self.queue, ttl_s, self.job_id, self.submission, self.own)
        noted = self.noted or digest_of(self.message)
        return keys, [
            *about,
            self.message_id,
            noted,
            is_named,
            self.message,
            self.hook,
            " ".join(self.parents),
        ]


class Submissions:
    """Sends submissions to one Redis. Thread-safe."""

    def __init__(self, client: Redis, ttl_s: int) -> None:
        self._redis = client
        self._ttl_s = ttl_s
        self._named = WrittenLately(ttl_s)

    def send(
        self, submissions: Sequence[Submission], replicas: int = 0, wait_s: float = 0.0
    ) -> tuple[list[Exception | None], int]:
        """Send all in one round trip. Returns what each was refused with, and the replicas that have them.

        With `replicas`, waits up to `wait_s` seconds until so many have all of it. What was not refused is in
        Redis. Raises redis-py's errors where the connection is lost: then any of them may have been sent.
        """
        deadline_s = time.monotonic() + LOADED_WITHIN_S
        while True:
            results, have_it = self._send(submissions, replicas, wait_s)
            if not any(type(each).__name__ == "NoScriptError" for each in results):
                break
            # With Sentinel, the next connection asks where the primary is: all of it goes to one server.
            self._redis.connection_pool.disconnect(inuse_connections=False)
            self._load(deadline_s)
        return [each if isinstance(each, Exception) else refusal(each) for each in results], have_it

    def of(self, job_id: str) -> list[str]:
        """The ids of a job's submissions that were not given up since it was last queued."""
        names = cast("list[str]", self._redis.hkeys(job_key(job_id)))
        return [name.removeprefix("sub:") for name in names if name.startswith("sub:") and name != "sub:"]

    def _send(self, submissions: Sequence[Submission], replicas: int, wait_s: float) -> tuple[list[Any], int]:
        with self._redis.pipeline(transaction=False) as pipe:
            for each in submissions:
                keys, words = each.call(self._ttl_s, self._named.has(each.queue))
                pipe.evalsha(_DIGEST, len(keys), *keys, *words)
            if replicas:
                pipe.wait(replicas, max(1, int(1_000 * wait_s)))
            results: list[Any] = pipe.execute(raise_on_error=False)
        if not any(isinstance(each, Exception) for each in results):
            for each in submissions:
                self._named.note(each.queue)
        have_it = results.pop() if replicas else 0
        if isinstance(have_it, Exception):
            raise have_it
        return results, int(have_it)

    def _load(self, deadline_s: float) -> None:
        """Load the scripts, or wait until a worker has."""
        try:
            load(self._redis)
        except Exception as error:
            if code_of(error) != "NOPERM":
                raise
            if time.monotonic() > deadline_s:
                raise QueueError(
                    "Redis does not have the scripts of this version of smallcat, and this user may not load "
                    "them: start a worker of this version, which does, or give this user the right to SCRIPT "
                    "LOAD."
                ) from error
            time.sleep(RETRY_S)
