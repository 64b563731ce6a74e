"""The records of jobs in Redis: each is one hash with an expiry, and how a job ends is published.

A job is `queued`, then `running`, then `done`, `failed` or `cancelled`. A change that two processes could
make at once is a Lua script. All times are by Redis' clock. The lasting record is the JSON beside the picture
in the bucket; this one is for those who wait. `worker.state.keys` lists the keys and the fields.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from worker.contract.errors import InvalidJobError, PoisonJobError, SmallcatError
from worker.contract.found_message import FoundMessage, fingerprint
from worker.contract.input_reference import jobs_of
from worker.contract.job import SUBMISSION_FIELDS, Job
from worker.contract.queues import queue_of
from worker.contract.record import Attempt, JobRecord, State
from worker.state import scripts as scripts
from worker.state.chains import refusal
from worker.state.hashes import (
    count,
    fields_of,
    is_in_doubt,
    may_be_final,
    own_fields,
    readable,
    record_of,
    seen_by,
    unknown,
    unreadable,
    waited_of,
)
from worker.state.keys import (
    FAILED,
    WORKERS_CHANNEL,
    attempts_key,
    drawn_key,
    holder_of,
    job_key,
    latest_key,
    submission_key,
)
from worker.state.shared_scripts import Script, SharedScript, WrittenLately
from worker.state.submissions import Submission, said
from worker.state.together import Together
from worker.state.usage import Used

if TYPE_CHECKING:
    from redis.client import Redis

#: Seconds after which a waiting caller reads the record again, in case an event was lost with a connection.
RECHECK_S = 5.0
#: Records that are read in one round trip.
READ_AT_ONCE = 500


class Claim(StrEnum):
    """What a worker that holds a job's message should do with it."""

    #: Render it.
    RENDER = "render"
    #: Nothing: another message of the same job is in flight.
    TAKEN = "taken"
    #: Nothing: the job is done, was cancelled, or has failed for good.
    FINAL = "final"
    #: Nothing yet: the job begins with the pictures of others that are not done. The message must come back.
    WAITING = "waiting"
    #: Nothing: only a run wanted the job, and was cancelled. No record is left that says so.
    DROPPED = "dropped"
    #: Fail it: its attempts are used up.
    POISON = "poison"


class Records:
    """The jobs' records in one Redis. Thread-safe. Each call but `read` is one round trip.

    `held`: the keys of the index of held messages and of their hash (`worker.broker.layout`), where `done` is
    to acknowledge messages. `together`: that calls of several threads that claim and end jobs share round
    trips; for a client that sends a command again for as long as it takes.
    """

    def __init__(
        self, client: Redis, ttl_s: int, held: tuple[str, str] | None = None, *, together: bool = False
    ) -> None:
        self._redis = client
        self._ttl_s = ttl_s
        self._held = held
        self._submit = SharedScript(client, scripts.SUBMIT)
        self._named, self._drawn = WrittenLately(ttl_s), WrittenLately(ttl_s)
        #: Redis' clock less this process' monotonic one, as the last claim found it.
        self._clock_s: float | None = None
        shared = Together(client) if together else None
        self._claim = Script(client, scripts.CLAIM, shared)
        self._finish = Script(client, scripts.FINISH, shared)
        self._give_back = Script(client, scripts.GIVE_BACK)
        self._cancel = SharedScript(client, scripts.CANCEL)
        self._unreadable = Script(client, scripts.UNREADABLE)
        self._progress = Script(client, scripts.PROGRESS)

    def submitted(
        self,
        job: Job,
        queue: str,
        submission: str = "",
        message: str = "",
        noted: str = "1",
        put: tuple[str, str] | None = None,
        hook: str = "",
    ) -> bool:
        """Write the record of a job that is sent to `queue` as `message`, and what is the submission's own.

        `noted` is the message's fingerprint; "1": unknown, as with earlier versions. `put`: the Redis list
        and the message, which is put there in the same step. `hook` is the submission's webhook
        (`worker.contract.webhook.hook_of`). A record of a job that is queued or running stays as it is,
        unless it was cancelled. Returns whether the job waits for others, with whose pictures it begins.
        Raises `InvalidJobError` where one of them has failed, or too many wait.
        """
        own = job.model_dump_json(include=set(said({name: getattr(job, name) for name in SUBMISSION_FIELDS})))
        sent = Submission(
            *(job.id, job.model_dump_json(), queue, submission, own, message, *(put or ("", "")), noted),
            job.tenant,
            hook,
            jobs_of(job.image, job.mask),
        )
        keys, words = sent.call(self._ttl_s, self._named.has(queue))
        answer = self._submit(keys=keys, args=words)
        if (refused := refusal(answer)) is not None:
            raise refused
        self._named.note(queue)
        return bool(answer == State.WAITING)

    def set_aside(self, raw: bytes, reason: str, is_poison: bool = False) -> bool:
        """Fail the job that was sent as the message `raw`, which is set aside for `reason`. False: none was.

        `is_poison`: it can be read, but came back too often.
        """
        found = FoundMessage.read(raw)
        job_id = found.id[:32]
        if not re.fullmatch(r"[0-9a-f]{32}-.+", found.id):
            return False
        error: SmallcatError
        if is_poison:
            error = PoisonJobError(f"The job's message is set aside: {reason}. See the workers' logs.")
        else:
            error = InvalidJobError(
                f"No worker could read the job's message: {reason.rstrip('.')}. Submit it again."
            )
        args: list[str | int] = [*holder_of(f"{found.id}/{found.tag}"), fingerprint(raw), job_id, self._ttl_s]
        args += [type(error).__name__, str(error), found.run]
        args += [found.job.model_dump_json(), queue_of(found.job)] if found.job else ["", ""]
        return bool(self._unreadable(keys=[job_key(job_id), FAILED, attempts_key(job_id)], args=args))

    def replicated(self, job_id: str, submission: str, replicas: int, timeout_s: float) -> int:
        """How many replicas have the submission, and all that was written before it.

        Waits until they are `replicas`, at most `timeout_s` seconds, which is less than the client waits for
        an answer. 0 where the server does not have the submission.
        """
        with self._redis.pipeline(transaction=False) as pipe:
            # WAIT is about what its own connection has written: all that is older is replicated before it.
            pipe.expire(submission_key(job_id, submission), self._ttl_s)
            pipe.wait(replicas, max(1, int(1_000 * timeout_s)))
            is_there, have_it = pipe.execute()
        return int(have_it) if is_there else 0

    def get(self, job_id: str, submission: str = "") -> JobRecord:
        """The record of a job, as one of its submissions sees it: cancelled where that was given up.

        Raises `UnknownJobError` where there is none (any more), or none that can be read.
        """
        fields: dict[str, str] = self._redis.hgetall(job_key(job_id))  # type: ignore[assignment]
        if "job" not in fields:
            raise unknown(job_id)
        record = record_of(job_id, fields)
        if is_in_doubt(fields, submission):
            text: str | None = self._redis.get(submission_key(job_id, submission))  # type: ignore[assignment]
            return seen_by(text, record)
        return record

    def submission(self, job_id: str, submission: str) -> tuple[dict[str, Any], bool]:
        """A submission's own fields, empty where they have expired, and whether it was given up."""
        text = str(self._redis.get(submission_key(job_id, submission)) or "")
        return own_fields(text), text.startswith("-")

    def read(self, job_ids: Sequence[str]) -> dict[str, JobRecord]:
        """The records of many jobs by id, in the order of `job_ids`.

        Unknown ones are left out, and those that cannot be read.
        """
        found: dict[str, JobRecord] = {}
        for start in range(0, len(job_ids), READ_AT_ONCE):
            part = job_ids[start : start + READ_AT_ONCE]
            with self._redis.pipeline(transaction=False) as pipe:
                for job_id in part:
                    pipe.hgetall(job_key(job_id))
                for job_id, fields in zip(part, pipe.execute(raise_on_error=False), strict=True):
                    if (record := readable(job_id, fields)) is not None:
                        found[job_id] = record
        return found

    def latest(self, tenant: str = "") -> list[tuple[str, str, float]]:
        """The jobs that were submitted last, of a tenant or of all, the latest first; about 1,000 at most.

        Of each its id, its tenant, and Unix seconds. Jobs of runs are not among them.
        """
        found: Any = self._redis.zrevrange(latest_key(tenant), 0, -1, withscores=True)
        named = [(str(member).rpartition("/"), at) for member, at in found]
        return [(job_id, tenant or of, at) for (of, _, job_id), at in named]

    def claim(
        self,
        job: Job,
        message: str,
        *,
        worker: str,
        lease_s: float,
        max_attempts: int,
        queue: str,
        run: str = "",
        is_stored: Callable[[], bool] = lambda: True,
        has_picture: Callable[[str], bool] = lambda _: False,
    ) -> tuple[Claim, int, float | None]:
        """Claim the job for `message`, or say why not. Returns the verdict, the attempt, seconds queued.

        The seconds are None where the record's time of submission cannot be right (`waited_of`).

        `message` is the message's id, and, after "/", the tag under which this worker holds it.
        `is_stored` is asked whether the bucket has the picture where the record says that the job is done,
        `has_picture` whether it has that of another job, with which this one begins, and whose record says
        that it is not done. What this job's own record says that it waits for does not count.

        Each claim with the verdict `RENDER` counts as an attempt, also one that ends with the death of the
        process. `run` is the message's run mark: that run gets the job's outcome, whichever of its
        messages was worked on.
        """
        text, delivery = job.model_dump_json(), secrets.token_hex(8)
        keys = [job_key(job.id), attempts_key(job.id)]
        args: list[str | int | float] = [*holder_of(message), worker, lease_s, max_attempts, self._ttl_s]
        args += [text, queue, delivery, run]
        looked, parents = "", " ".join(jobs_of(job.image, job.mask))
        verdict, *claimed = self._claim(keys=keys, args=[*args, looked, parents])
        if verdict == Claim.WAITING and all(map(has_picture, map(str, claimed))):
            parents = ""
            verdict, *claimed = self._claim(keys=keys, args=[*args, looked, parents])
        if verdict == State.DONE:
            looked = "yes" if is_stored() else "no"
            verdict, *claimed = self._claim(keys=keys, args=[*args, looked, parents])
        if verdict == Claim.WAITING or not claimed:
            return Claim(verdict), 0, 0.0
        attempt, submitted_at, seconds, microseconds = claimed
        now_s = int(seconds) + int(microseconds) / 1e6
        self._clock_s = now_s - time.monotonic()
        return Claim(verdict), int(attempt), waited_of(submitted_at, now_s, self._ttl_s)

    def progress(self, steps: Mapping[str, tuple[int, int]], lease_s: float) -> list[str]:
        """Write (steps done, steps in all) and extend the claim of each job. Returns the cancelled ids."""
        ids = list(steps)
        if not ids:
            return []
        args = [lease_s, *(number for job_id in ids for number in steps[job_id])]
        keys = [key for job_id in ids for key in (job_key(job_id), attempts_key(job_id))]
        cancelled = self._progress(keys=keys, args=args)
        return [ids[index - 1] for index in cancelled]

    def done(self, record: JobRecord, tag: str = "", used: Used | None = None) -> bool:
        """Mark the job done. False: it was already, or was cancelled, and stays as it was.

        In the same step, and also then, the message that is held under `tag` is acknowledged, if `held` says
        where. `used`: what the job has used, counted in that step for its tenant: a picture counts once.
        """
        fields = fields_of(record)
        if record.job.tenant and used is not None:
            fields["usage"] = used.of(record.job.tenant)
        return self._final(record.id, State.DONE, "", fields, tag, record.job.tenant) == 1

    def was_forgotten(self, job_id: str) -> bool:
        """Whether the job was forgotten while it was under way, and not submitted since."""
        return bool(self._redis.hexists(job_key(job_id), "forgotten"))

    def failed(self, job_id: str, message: str, error: SmallcatError) -> bool:
        """Mark the job failed, or cancelled, by `error`, for the message that claimed it.

        False: it is final already, or another message holds it by now; or the error is that it was
        cancelled, and somebody wants it.
        """
        return self._ended(job_id, message, error) == 1

    def cancelled(self, job_id: str, message: str, error: SmallcatError) -> bool:
        """As `failed`, for a job that was stopped. False only where somebody wants it still."""
        return self._ended(job_id, message, error) != -1

    def give_back(
        self, job_id: str, message: str, failure: Attempt | None = None, *, died: bool = False
    ) -> None:
        """Undo the claim of `message`: the job goes to another worker, or is tried again later.

        `failure`: how the attempt failed; None: it does not count. `died`: it ended as by its worker's death.
        """
        said = failure.model_dump_json() if failure else "", "death" if died else ""
        self._give_back(keys=[job_key(job_id), attempts_key(job_id)], args=[*holder_of(message), *said])

    def attempts_and_deaths(self, job_id: str) -> tuple[int, int]:
        """Attempts at the job, and how many of them ended with the death of their worker."""
        with self._redis.pipeline(transaction=False) as pipe:
            for key in (attempts_key(job_id), job_key(job_id)):
                pipe.hmget(key, "attempts", "deaths")
            found = [
                each if isinstance(each, list) else [None, None]
                for each in pipe.execute(raise_on_error=False)
            ]
        attempts, deaths = (max(map(count, values)) for values in zip(*found, strict=True))
        return attempts, deaths

    def cancel(self, job_id: str, submission: str = "") -> State:
        """Give up one submission of a job, or the job for all that want it. Returns its state after that.

        A submission that is not the last one is cancelled at once, and the others' job goes on. With the last
        one a queued job is cancelled; a running one will be at its next step, unless it is done before.
        """
        keys = [job_key(job_id), submission_key(job_id, submission)]
        state = self._cancel(keys=keys, args=[job_id, WORKERS_CHANNEL, submission])
        if state is None:
            raise unknown(job_id)
        if state == "":
            raise unknown(job_id, submission)
        try:
            return State(state)
        except ValueError:
            raise unreadable(job_id, "its state") from None

    def watch(self) -> None:
        """Ask the workers to write their jobs' progress twice a second, for the next seconds."""
        self._redis.publish(WORKERS_CHANNEL, "watch")

    def wait(
        self,
        job_id: str,
        timeout_s: float | None,
        idle: Callable[[JobRecord], None] = lambda _: None,
        submission: str = "",
    ) -> JobRecord:
        """Sleep until the job's state is final and return its record. Woken by Redis, not by polling.

        The state is the submission's, where one is given.

        `idle` is called with the record about every 5 seconds of waiting. The client opens a lost connection
        again. Raises `TimeoutError` after `timeout_s` seconds (None: never), `UnknownJobError`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self.listen(job_key(job_id)) as receive:
            while not (record := self.get(job_id, submission)).state.is_final:
                left = RECHECK_S if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"Job {job_id} is still {record.state} after {timeout_s:g} s.")
                if not may_be_final(receive, min(left, RECHECK_S)):
                    idle(record)
        return record

    @contextmanager
    def listen(self, channel: str) -> Iterator[Callable[[float], str | None]]:
        """A function that waits up to so many seconds for the next message on `channel`; None: none came."""
        with self._redis.pubsub(ignore_subscribe_messages=True) as subscriber:  # type: ignore[no-untyped-call]
            subscriber.subscribe(channel)

            def receive(timeout_s: float) -> str | None:
                message = subscriber.get_message(timeout=timeout_s)
                return None if message is None else str(message["data"])

            yield receive

    def _ended(self, job_id: str, message: str, error: SmallcatError) -> int:
        name = type(error).__name__
        state = State.CANCELLED if name == "JobCancelledError" else State.FAILED
        return self._final(job_id, state, message, {"error_type": name, "error": str(error)})

    def _final(
        self,
        job_id: str,
        state: State,
        message: str,
        fields: Mapping[str, str],
        tag: str = "",
        tenant: str = "",
    ) -> int:
        pairs = [item for pair in fields.items() for item in pair]
        drawn = drawn_key(tenant)
        keys = [job_key(job_id), FAILED, attempts_key(job_id), drawn, *(self._held or ())]
        at = "" if self._clock_s is None else f"{self._clock_s + time.monotonic():.6f}"
        args: list[str | int] = [state, self._ttl_s, *holder_of(message), job_id]
        args += [tag if self._held else "", at, self._drawn.has(drawn)]
        ended = int(self._finish(keys=keys, args=[*args, *pairs]))
        if ended == 1 and state is State.DONE:
            self._drawn.note(drawn)
        return ended
