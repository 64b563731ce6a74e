"""Each job's state, in one Redis hash with an expiry; and the news of it, on one channel a job.

    smallcat:job:<id>        hash    see `JobRecord`; expires `record_ttl_s` after its last change
    smallcat:job:<id>        channel the new state, published at every change of state
    smallcat:to-workers      channel to all workers: "cancel <id>" of a running job; "watch": somebody looks
                                     at a job's progress, so that it is worth writing
    smallcat:queues          set     the queues that jobs were sent to; expires likewise
    smallcat:failed          zset    ids of the jobs that failed for good, by time; expires likewise
                                     (`worker.state.failures`)
    smallcat:run:<run>       hash    a prompt file's run (`producer.ingest.run_state`), and with it:
      ...:done, ...:failed   bits    one a job of the run, set by the worker in the step that ends the job
      ...:news               list    what became of each job, until the run's feeder has written it down

A job is `queued`, then `running`, then `done`, `failed` or `cancelled`. Changes that two processes could
make at once are Lua scripts, and all times are Redis' own clock. The lasting record is the JSON beside
the picture in the bucket; this one is for those who wait.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING

from worker.contract.errors import SmallcatError, UnknownJobError
from worker.contract.job import Job
from worker.contract.record import Attempt, JobRecord, State
from worker.state import scripts as scripts

if TYPE_CHECKING:
    from redis.client import Redis

#: Channel on which all workers hear what they should know at once.
WORKERS_CHANNEL = "smallcat:to-workers"
#: The set of queues that jobs were sent to.
QUEUES = "smallcat:queues"
#: The sorted set of jobs that failed for good, scored by when.
FAILED = "smallcat:failed"
#: Seconds between two looks at a record by one who waits, in case a message was lost with a connection.
RECHECK_S = 5.0
#: Records that are read in one round trip.
READ_AT_ONCE = 500


class Claim(StrEnum):
    """What a worker that holds a job's message should do with it."""

    #: Render it.
    RENDER = "render"
    #: Nothing: another message for the same job is on board somewhere.
    TAKEN = "taken"
    #: Nothing: the job is done, was cancelled, or has failed for good.
    FINAL = "final"
    #: Set it aside: it was tried too often.
    POISON = "poison"


def key(job_id: str) -> str:
    """The record's key, and the channel of its news."""
    return f"smallcat:job:{job_id}"


def run_key(run: str) -> str:
    """The key of a run of prompt files; those of its bits and its news begin with it."""
    return f"smallcat:run:{run}"


class Records:
    """The jobs' records in one Redis. Thread-safe. Each call but `read` is one round trip."""

    def __init__(self, client: Redis, ttl_s: int) -> None:
        self._redis = client
        self._ttl_s = ttl_s
        self._submit = client.register_script(scripts.SUBMIT)
        self._claim = client.register_script(scripts.CLAIM)
        self._finish = client.register_script(scripts.FINISH)
        self._give_back = client.register_script(scripts.GIVE_BACK)
        self._cancel = client.register_script(scripts.CANCEL)
        self._progress = client.register_script(scripts.PROGRESS)

    def submitted(self, job: Job, queue: str) -> None:
        """Note that `job` goes to `queue`. In flight already: its record stays as it is."""
        self._submit(
            keys=[key(job.id), QUEUES, FAILED], args=[job.model_dump_json(), queue, self._ttl_s, job.id]
        )

    def get(self, job_id: str) -> JobRecord:
        """The record of a job. Raises `UnknownJobError` where there is none (any more)."""
        fields: dict[str, str] = self._redis.hgetall(key(job_id))  # type: ignore[assignment]
        if "job" not in fields:
            raise UnknownJobError(f"There is no record of a job {job_id}: its id is wrong or it expired.")
        return _record(job_id, fields)

    def read(self, job_ids: Sequence[str]) -> dict[str, JobRecord]:
        """The records of many jobs by id, in the order of `job_ids`; unknown ones are left out."""
        found: dict[str, JobRecord] = {}
        for start in range(0, len(job_ids), READ_AT_ONCE):
            part = job_ids[start : start + READ_AT_ONCE]
            with self._redis.pipeline(transaction=False) as pipe:
                for job_id in part:
                    pipe.hgetall(key(job_id))
                for job_id, fields in zip(part, pipe.execute(), strict=True):
                    if "job" in fields:
                        found[job_id] = _record(job_id, fields)
        return found

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
    ) -> tuple[Claim, int, float]:
        """Take the job for `message`, or learn why not. Returns the verdict, the attempt, seconds queued.

        Each claim that renders counts as an attempt, also one that ends with the death of the process.
        `run` is the message's `run_mark`: that run hears of the job's end, whichever message brings it.
        """
        text, delivery = job.model_dump_json(), secrets.token_hex(8)
        verdict, attempt, queued = self._claim(
            keys=[key(job.id)],
            args=[message, worker, lease_s, max_attempts, self._ttl_s, text, queue, delivery, run],
        )
        return Claim(verdict), int(attempt), max(0.0, float(queued))

    def progress(self, steps: Mapping[str, tuple[int, int]], lease_s: float) -> list[str]:
        """Write each job's (step, steps) and extend its claim. Returns the ids that were cancelled."""
        ids = list(steps)
        if not ids:
            return []
        args = [lease_s, *(number for job_id in ids for number in steps[job_id])]
        cancelled = self._progress(keys=[key(job_id) for job_id in ids], args=args)
        return [ids[index - 1] for index in cancelled]

    def done(self, record: JobRecord) -> bool:
        """Mark the job done. False: it was already, and stays as it was."""
        return self._final(record.id, State.DONE, "", _fields(record))

    def failed(self, job_id: str, message: str, error: SmallcatError) -> bool:
        """Mark the job failed, or cancelled, by `error`, for the message that claimed it.

        False: it is final already, or another message holds it by now.
        """
        name = type(error).__name__
        state = State.CANCELLED if name == "JobCancelledError" else State.FAILED
        return self._final(job_id, state, message, {"error_type": name, "error": str(error)})

    def give_back(self, job_id: str, message: str) -> None:
        """Undo the claim of `message`, and its attempt: the job goes to another worker."""
        self._give_back(keys=[key(job_id)], args=[message, ""])

    def retried(self, job_id: str, message: str, attempt: Attempt) -> None:
        """Undo the claim of `message`, whose attempt failed: the job is tried again later."""
        self._give_back(keys=[key(job_id)], args=[message, attempt.model_dump_json()])

    def is_suspect(self, job_id: str, max_attempts: int) -> bool:
        """Whether one attempt is left and an earlier one ended without a word: its worker was killed."""
        attempts, deaths = self._redis.hmget(key(job_id), "attempts", "deaths")
        return int(attempts or 0) == max_attempts - 1 and int(deaths or 0) > 0

    def cancel(self, job_id: str) -> State:
        """Ask that the job stops. Returns its state now: a running job becomes cancelled at its next step."""
        state = self._cancel(keys=[key(job_id)], args=[job_id, WORKERS_CHANNEL])
        if state is None:
            raise UnknownJobError(f"There is no record of a job {job_id}: its id is wrong or it expired.")
        return State(state)

    def watch(self) -> None:
        """Ask the workers to write their jobs' progress twice a second, for the next seconds."""
        self._redis.publish(WORKERS_CHANNEL, "watch")

    def wait(
        self, job_id: str, timeout_s: float | None, idle: Callable[[JobRecord], None] = lambda _: None
    ) -> JobRecord:
        """Sleep until the job's state is final and return its record. Woken by Redis, not by polling.

        `idle` is called with the record about every 5 seconds of waiting. A lost connection is made again
        by the client. Raises `TimeoutError` after `timeout_s` seconds (None: never), `UnknownJobError`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self.listen(key(job_id)) as news:
            while not (record := self.get(job_id)).state.is_final:
                left = RECHECK_S if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"Job {job_id} is still {record.state} after {timeout_s:g} s.")
                if not _worth_a_look(news, min(left, RECHECK_S)):
                    idle(record)
        return record

    @contextmanager
    def listen(self, channel: str) -> Iterator[Callable[[float], str | None]]:
        """A function that waits up to so many seconds for the next message on `channel`."""
        with self._redis.pubsub(ignore_subscribe_messages=True) as news:  # type: ignore[no-untyped-call]
            news.subscribe(channel)

            def receive(timeout_s: float) -> str | None:
                message = news.get_message(timeout=timeout_s)
                return None if message is None else str(message["data"])

            yield receive

    def _final(self, job_id: str, state: State, message: str, fields: Mapping[str, str]) -> bool:
        pairs = [item for pair in fields.items() for item in pair]
        args: list[str | int] = [state, self._ttl_s, message, job_id, *pairs]
        return bool(self._finish(keys=[key(job_id), FAILED], args=args))


def _worth_a_look(news: Callable[[float], str | None], timeout_s: float) -> bool:
    """Whether the job's state may be final: within `timeout_s` the news said so, or some was missed."""
    until = time.monotonic() + timeout_s
    while (left := until - time.monotonic()) > 0:
        state = news(left)
        if state is None:
            # Back before its time: the subscription was made just now, at first or after a lost connection,
            # and what was said before went unheard.
            return until - time.monotonic() > 0.05
        if State(state).is_final:
            return True
    return False


def _fields(record: JobRecord) -> dict[str, str]:
    """What a finished job's record adds to its hash."""
    values = record.model_dump(
        mode="json", exclude={"id", "state", "queue", "submitted_at", "attempts", "tries", "runs"}
    )
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
        if value is not None
    }


#: Fields of the hash that are text as they stand; all others are JSON.
_TEXT = {"state", "uri", "worker", "error_type", "error", "queue"}


def _record(job_id: str, fields: Iterable[tuple[str, str]] | Mapping[str, str]) -> JobRecord:
    values = {
        name: value if name in _TEXT else json.loads(value)
        for name, value in dict(fields).items()
        if name in JobRecord.model_fields and name != "runs"
    }
    tries = [json.loads(value) for name, value in dict(fields).items() if name.startswith("try:")]
    values["runs"] = dict(fields).get("runs", "").split()
    values["tries"] = sorted(tries, key=lambda each: int(each["attempt"]))
    return JobRecord.model_validate({"id": job_id, **values})
