"""Removing what Redis has of jobs: records, submissions, attempts, messages, runs, answers.

All of it is found by looking at every key, so that what was interrupted is finished by doing it again. A job
that is forgotten leaves a mark in the place of its record (`forget.lua`), without any of its texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from worker.contract.job_parameters import MAX_PRIORITY
from worker.contract.message import payload_in
from worker.contract.queues import ARRIVALS, UNDECODABLE, arrivals_of, queue_of_list
from worker.state import scripts
from worker.state.keys import (
    FAILED,
    HTTP_FEEDING,
    HTTP_FORGOTTEN,
    HTTP_MODEL,
    HTTP_ONCE,
    HTTP_OPEN,
    HTTP_RATE,
    HTTP_SPENT,
    LATEST,
    QUEUES,
    RUNS,
    TOLD_BY_PRODUCERS,
    WEBHOOKS,
    WORKERS_CHANNEL,
    attempts_key,
    drawn_key,
    job_key,
    latest_key,
    run_key,
)

if TYPE_CHECKING:
    from redis.client import Redis

#: Keys, and messages, that are looked at in one round trip.
AT_ONCE: Final = 500
_DAY_S: Final = 86_400
_JOB: Final = re.compile(r"smallcat:job:([0-9a-f]{32})(?::(\w+))?")
_ATTEMPTS: Final = re.compile(r"smallcat:worker-only:job:([0-9a-f]{32})")
_PREVIEW: Final = re.compile(r"smallcat:preview:([0-9a-f]{32})")
_RUN: Final = re.compile(r"smallcat:run:([0-9a-z]{1,40})")


@dataclass(frozen=True)
class Scope:
    """What is to be forgotten: a tenant's jobs, one job, or all that were submitted before a time."""

    tenant: str = ""
    #: How the names of the tenant's submissions and runs over HTTP begin.
    mark: str = ""
    job: str = ""
    #: Unix seconds.
    before: float = 0.0

    @property
    def name(self) -> str:
        """What it is, in a word."""
        return (
            f"tenant:{self.tenant}"
            if self.tenant
            else f"job:{self.job}"
            if self.job
            else f"before:{self.before:.0f}"
        )

    def has(self, job_id: str, tenant: str, at: float) -> bool:
        """Whether it has a job of that id and tenant, submitted at that time; 0: unknown."""
        if self.tenant:
            return tenant == self.tenant
        return job_id == self.job if self.job else 0 < at < self.before

    def has_run(self, name: str, tenant: str, created: float) -> bool:
        """Likewise of a run. One that was begun before the time goes as a whole."""
        if self.tenant:
            return tenant == self.tenant or (bool(self.mark) and name.startswith(self.mark))
        return not self.job and 0 < created < self.before


class Forgetting:
    """Forgets what is in one Redis. Raises redis-py's errors.

    `count` is told of what was removed, as it is: a word, and how many. With `is_dry` nothing is removed.
    """

    def __init__(
        self, client: Redis, ttl_s: int, scope: Scope, count: Callable[[str, int], None], *, is_dry: bool
    ) -> None:
        self._redis, self._ttl_s, self._scope = client, ttl_s, scope
        self._count, self._is_dry = count, is_dry
        self._forget = client.register_script(scripts.FORGET)
        #: The ids of jobs that are forgotten, with their tenants.
        self.jobs: dict[str, str] = {}
        #: Until when a worker may be working on some of them, in Unix seconds.
        self.held: dict[str, float] = {}

    def tell_servers(self) -> None:
        """Let the HTTP servers delete the files of runs that are forgotten."""
        scope = self._scope
        if self._is_dry or scope.job:
            return
        name = f"tenant:{scope.tenant}" if scope.tenant else "before"
        self._redis.hset(HTTP_FORGOTTEN, name, self.now() if scope.tenant else scope.before)
        self._redis.expire(HTTP_FORGOTTEN, 2 * self._ttl_s)

    def now(self) -> float:
        """Unix seconds by Redis' clock."""
        seconds, micros = cast("Any", self._redis.time())
        return float(seconds) + float(micros) / 1e6

    def runs(self) -> None:
        """Cancel and forget runs. A mark stays that ends their messages."""
        for names in self._keys("smallcat:run:*"):
            runs = [match[1] for name in names if (match := _RUN.fullmatch(name))]
            with self._redis.pipeline(transaction=False) as pipe:
                for run in runs:
                    pipe.hmget(run_key(run), "tenant", "created", "forgotten")
                found = pipe.execute(raise_on_error=False)
            for run, fields in zip(runs, found, strict=True):
                if isinstance(fields, list) and not fields[2]:
                    tenant, created, _ = fields
                    if self._scope.has_run(run, tenant or "", _number(created)):
                        self._forget_run(run)

    def records(self) -> None:
        """Forget the jobs that have records; those that somebody works on are in `held` then."""
        for names in self._keys(job_key(self._scope.job or "*")):
            ids = [match[1] for name in names if (match := _JOB.fullmatch(name)) and match[2] is None]
            with self._redis.pipeline(transaction=False) as pipe:
                for job_id in ids:
                    pipe.hmget(job_key(job_id), "job", "submitted_at", "forgotten", "of")
                found = pipe.execute(raise_on_error=False)
            matching, begun = dict[str, str](), dict[str, str]()
            for job_id, fields in zip(ids, found, strict=True):
                if not isinstance(fields, list):
                    continue
                job, at, forgotten, of = fields
                if forgotten == self._scope.name:
                    begun[job_id] = of or ""
                elif not forgotten and self._scope.has(job_id, tenant := _tenant_in(job), _number(at)):
                    matching[job_id] = tenant
            self.forget(matching, "records")
            self.forget(begun)

    def forget(self, jobs: dict[str, str], what: str = "") -> None:
        """Forget these jobs, ids with their tenants, whether they have records or not."""
        self.jobs |= jobs
        if what:
            self._count(what, len(jobs))
        if self._is_dry:
            return
        ids = list(jobs)
        for start in range(0, len(ids), AT_ONCE):
            part = ids[start : start + AT_ONCE]
            with self._redis.pipeline(transaction=False) as pipe:
                for job_id in part:
                    of_tenant = latest_key(jobs[job_id]), drawn_key(jobs[job_id])
                    keys = [job_key(job_id), attempts_key(job_id), FAILED, LATEST, *of_tenant]
                    args: list[str | int] = [
                        job_id,
                        jobs[job_id],
                        self._ttl_s,
                        WORKERS_CHANNEL,
                        self._scope.name,
                    ]
                    self._forget(keys=keys, args=args, client=pipe)
                for job_id, until in zip(part, pipe.execute(), strict=True):
                    if float(until):
                        self.held[job_id] = float(until)

    def messages(self) -> None:
        """Take messages out of the queues, whatever their lists are called, and forget their jobs."""
        for name in self._lists():
            start = 0
            while texts := cast("list[str]", self._redis.lrange(name, start, start + AT_ONCE - 1)):
                found = {text: job for text in texts if (job := self._job_in(text)) is not None}
                self.forget(dict(found.values()))
                self._count("messages", len(found))
                removed = 0
                if not self._is_dry and found:
                    with self._redis.pipeline(transaction=False) as pipe:
                        for text in found:
                            pipe.lrem(name, 1, text)
                        removed = sum(pipe.execute())
                start += len(texts) - removed

    def set_aside(self) -> None:
        """Take messages out of the list of those that no worker could read."""
        entries: Any = self._redis.execute_command("LRANGE", UNDECODABLE, 0, -1, NEVER_DECODE=True)  # type: ignore[no-untyped-call]
        for entry in entries:
            raw = entry.partition(b"\n")[2].decode(errors="replace")
            if self._job_in(raw) is not None:
                self._count("set_aside", 1)
                if not self._is_dry:
                    self._redis.lrem(UNDECODABLE, 1, entry)

    def notifications(self) -> None:
        """Take out what webhooks are to be told, and what they could not be told: it has metadata."""
        for name in (f"{WEBHOOKS}:new", TOLD_BY_PRODUCERS):
            told = cast("list[str]", self._redis.lrange(name, 0, -1))
            for entry in filter(lambda each: self._is_told(each.partition(" ")[2]), told):
                self._count("notifications", 1)
                if not self._is_dry:
                    self._redis.lrem(name, 1, entry)
        start = f"{WEBHOOKS}:of:"
        for names in self._keys(f"{start}*"):
            with self._redis.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.hmget(name, "entry", "host")
                found = pipe.execute(raise_on_error=False)
            for name, fields in zip(names, found, strict=True):
                if not isinstance(fields, list) or not self._is_told(fields[0]):
                    continue
                self._count("notifications", 1)
                if not self._is_dry:
                    with self._redis.pipeline() as pipe:
                        pipe.unlink(name)
                        for book in ("failed", f"due:{fields[1]}"):
                            pipe.zrem(f"{WEBHOOKS}:{book}", name.removeprefix(start))
                        pipe.execute()

    def _is_told(self, text: str | None) -> bool:
        """Whether a notification is of a job or a run that is forgotten."""
        try:
            what = json.loads(text or "{}")
            hook = json.loads(what.get("hook") or "{}")
            job_id, at = str(what.get("job", "")), _number(what.get("at"))
            tenant = str(hook.get("tenant", ""))
        except (ValueError, TypeError, AttributeError, RecursionError):
            return False
        return job_id in self.jobs or self._scope.has(job_id, tenant, at)

    def rest(self) -> None:
        """Forget what is left of the jobs: submissions, attempts, previews, and answers of the HTTP API."""
        match = "smallcat:*" if not self._scope.job else f"smallcat:*{self._scope.job}*"
        for names in self._keys(match):
            self._remove([name for name in names if self._is_left(name)])
        if self._scope.job:
            for names in self._keys(f"{HTTP_ONCE}*"):
                texts = cast("list[str | None]", self._redis.mget(names)) if names else []
                self._remove(
                    [n for n, text in zip(names, texts, strict=True) if self._scope.job in (text or "")]
                )
        if tenant := self._scope.tenant:
            starts = (HTTP_RATE, HTTP_OPEN, HTTP_FEEDING)
            own = [f"{start}{tenant}" for start in starts]
            names = [*own, f"{HTTP_OPEN}{tenant}:waiting", latest_key(tenant), drawn_key(tenant)]
            self._remove(names, is_counted=False)
            if not self._is_dry:
                # The day's allowance is not given back: it lasts until the day ends, and says no more.
                self._redis.expireat(f"{HTTP_SPENT}{tenant}", (int(self.now()) // _DAY_S + 1) * _DAY_S)
                self._forget_queues()

    def wait(self) -> list[str]:
        """The jobs that a worker may still be working on."""
        now = self.now()
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in self.held:
                pipe.hget(attempts_key(job_id), "claim_until")
            found = pipe.execute(raise_on_error=False)
        self.held = {
            job_id: _number(until)
            for job_id, until in zip(self.held, found, strict=True)
            if _number(until) > now
        }
        return list(self.held)

    def _is_left(self, name: str) -> bool:
        for form in (_JOB, _ATTEMPTS, _PREVIEW):
            if found := form.fullmatch(name):
                if form is _JOB:
                    mark = self._scope.mark
                    is_ours = found[1] in self.jobs or (bool(mark) and (found[2] or "").startswith(mark))
                    return found[2] is not None and is_ours
                return found[1] in self.jobs and found[1] not in self.held
        mark = self._scope.mark
        return bool(mark) and name.startswith((f"{HTTP_ONCE}{mark}", f"{HTTP_MODEL}{mark}"))

    def _remove(self, names: Sequence[str], *, is_counted: bool = True) -> None:
        if not names:
            return
        if is_counted:
            for start, what in ((job_key(""), "submissions"), (HTTP_ONCE, "answers")):
                self._count(what, sum(name.startswith(start) for name in names))
        if not self._is_dry:
            self._redis.unlink(*names)

    def _forget_queues(self) -> None:
        """Forget the names of queues that have no messages, with the lists of whose messages had arrived."""
        names = sorted(str(name) for name in cast("Any", self._redis.smembers(QUEUES)))
        for start in range(0, len(names), AT_ONCE):
            arrivals = {
                name: [arrivals_of(name, 0), arrivals_of(name, MAX_PRIORITY)]
                for name in names[start : start + AT_ONCE]
            }
            with self._redis.pipeline() as pipe:
                watched = [each for lists in arrivals.values() for each in lists]
                pipe.watch(*watched)  # type: ignore[no-untyped-call]
                full = {queue_of_list(each) for each in self._lists() if ARRIVALS not in each}
                pipe.multi()
                for name in arrivals.keys() - full:
                    pipe.srem(QUEUES, name)
                    pipe.unlink(*arrivals[name])
                try:
                    pipe.execute()
                except Exception as error:
                    # Where a message has come meanwhile, all stay: a later call removes them.
                    if type(error).__name__ != "WatchError":
                        raise

    def _forget_run(self, run: str) -> None:
        self._count("runs", 1)
        if self._is_dry:
            return
        key = run_key(run)
        with self._redis.pipeline() as pipe:
            parts = ("done", "failed", "cancelled", "news", "prints", "feeder")
            pipe.unlink(key, *(f"{key}:{part}" for part in parts))
            pipe.hset(key, mapping={"cancelled": 1, "forgotten": 1})
            pipe.expire(key, self._ttl_s)
            pipe.zrem(RUNS, run)
            pipe.execute()

    def _job_in(self, text: str) -> tuple[str, str] | None:
        """The id and the tenant of a message's job, where it is to be forgotten."""
        try:
            payload = payload_in(json.loads(text))
        except (ValueError, RecursionError):
            return None
        job = payload.get("job") if isinstance(payload, dict) else None
        if not isinstance(job, dict) or not re.fullmatch("[0-9a-f]{32}", str(payload.get("id"))):
            return None
        job_id, tenant = str(payload["id"]), str(job.get("tenant", ""))
        at = _number(str(payload.get("run", "")).rpartition(":")[2])
        if job_id in self.jobs or self._scope.has(job_id, tenant, at):
            return job_id, tenant
        return None

    def _lists(self) -> Iterator[str]:
        """The Redis lists of all queues. None of our other keys begins so."""
        for name in self._redis.scan_iter("smallcat.*", count=AT_ONCE, _type="LIST"):
            yield str(name)

    def _keys(self, match: str) -> Iterator[list[str]]:
        cursor: Any = 0
        while True:
            cursor, names = cast("Any", self._redis.scan(cursor, match=match, count=AT_ONCE))
            yield list(map(str, names))
            if not int(cursor):
                return


def _number(text: Any) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def _tenant_in(text: str | None) -> str:
    """The tenant of a job as JSON; empty where it has none, or cannot be read."""
    try:
        job = json.loads(text or "{}")
        return str(job.get("tenant", "")) if isinstance(job, dict) else ""
    except (ValueError, RecursionError):
        return ""
