"""What goes on, read from Redis once for all who look: the latest jobs, the queues and the workers.

Redis is read about once a second while anybody watches, and never else. Each tenant has lists of its own; a
record is read once for all. A job that has ended is read again only when it was submitted again. Records that
Redis has no longer are read from the bucket.

A watcher has what was read last, and no list of what it has not seen yet, so a slow one takes no memory.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from producer.http.models import may_use
from producer.http.problems import sentence_of
from worker.contract.errors import StorageError, UnknownJobError
from worker.contract.file_index import FileIndex, Kind
from worker.contract.queues import queues_of
from worker.contract.record import State
from worker.state.hashes import readable
from worker.state.keys import FAILED, drawn_key, job_key, latest_key

if TYPE_CHECKING:
    from producer.session import Session
    from worker.contract.record import JobRecord
    from worker.state.fleet import WorkerInfo

#: Seconds between two readings, at least, and how many times longer than a reading a pause is, at least.
EVERY_S, PAUSE = 1.0, 10.0
#: Watchers that are told within a second: with more of them, they are told less often.
WATCHERS_A_SECOND: Final = 200
#: Jobs that are shown: of those submitted last, drawn last, and failed last.
LATEST_JOBS, LATEST_PICTURES, LATEST_FAILURES = 100, 120, 30
#: Workers that are shown.
MAX_WORKERS: Final = 100
#: Seconds between two requests to the workers to write their jobs' steps often.
ASK_EVERY_S: Final = 2.0
#: Records that are read from the bucket at once.
_AT_ONCE: Final = 8


class Audience(NamedTuple):
    """Who sees the same lists of jobs."""

    #: The tenant whose submissions are looked at; empty: those of no tenant; None: all.
    tenant: str | None
    #: The tenant that their jobs say.
    owner: str
    #: The models whose workers are shown; empty: all.
    models: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class SeenJob:
    """A job as it was read. A change makes another one."""

    record: JobRecord
    #: The ids of its submissions that were not given up.
    submissions: tuple[str, ...]
    #: Unix seconds of what happened to it last: its submission, its picture, or its failure.
    at: float


@dataclass(frozen=True, eq=False)
class Activity:
    """What was read at one time."""

    #: Another one for each.
    number: int = 0
    #: The jobs by id.
    jobs: Mapping[str, SeenJob] = field(default_factory=dict)
    #: Queues, workers and counts, as JSON has them.
    fleet: Mapping[str, Any] = field(default_factory=dict)
    #: What could not be read, in a sentence; empty: nothing is wrong.
    trouble: str = ""
    #: What is sent of it to those who have the same and see the same: most watchers go in step.
    events: dict[object, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Watcher:
    """One who watches."""

    audience: Audience
    #: What was read last; None: nothing yet.
    seen: Activity | None = None
    #: Set when something was read.
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Watching:
    """Reads for the watchers of one event loop."""

    def __init__(self, session: Session, run: Callable[..., Awaitable[Any]]) -> None:
        """`run` calls a function that blocks in a thread."""
        self._run_in_thread = run
        self._reader = Reader(session)
        self._watchers: set[Watcher] = set()
        self._last: Mapping[Audience, Activity] = {}
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def watch(self, audience: Audience) -> Iterator[Watcher]:
        """A watcher, from within the event loop."""
        watcher = Watcher(audience)
        self._watchers.add(watcher)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="smallcat activity")
        elif (last := self._last.get(audience)) is not None:
            watcher.seen = last
            watcher.changed.set()
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    async def close(self) -> None:
        """Stop reading."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._watchers:
            began_s = loop.time()
            audiences = {watcher.audience for watcher in self._watchers}
            try:
                self._last = await self._run_in_thread(self._reader.read, audiences)
            except Exception as error:  # noqa: BLE001 - each watcher is told
                trouble = Activity(self._reader.next_number(), trouble=sentence_of(error))
                self._last = dict.fromkeys(audiences, trouble)
            for watcher in self._watchers:
                if (seen := self._last.get(watcher.audience)) is not None:  # Not one that came meanwhile.
                    watcher.seen = seen
                    watcher.changed.set()
            many_s = len(self._watchers) / WATCHERS_A_SECOND
            await asyncio.sleep(max(EVERY_S, PAUSE * (loop.time() - began_s), many_s))
        self._last = {}


@dataclass
class _Place:
    """Where a job stands in the lists: the Unix seconds of its submission, its picture and its failure."""

    #: The tenant that the job says, by the lists.
    owner: str
    at: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])


class Reader:
    """Reads what goes on; remembers jobs that have ended. Called from one thread at a time."""

    def __init__(self, session: Session) -> None:
        self._session = session
        #: What is known of each job: where it stands in the lists, the text of its record, and the job.
        self._known: dict[str, tuple[tuple[float, ...], Mapping[str, str], SeenJob | None]] = {}
        self._asked_s = -math.inf
        self._numbers = itertools.count(1)

    def next_number(self) -> int:
        """A number that no earlier activity has."""
        return next(self._numbers)

    def read(self, audiences: Iterable[Audience]) -> dict[Audience, Activity]:
        """Read once, for each audience. Raises redis-py's errors."""
        listed = {audience: self._places(audience) for audience in audiences}
        places = {name: place for found in listed.values() for name, place in found.items()}
        trouble, workers = self._read_jobs(places), self._session.fleet.workers()
        self._watch(places)
        return {
            audience: Activity(
                self.next_number(),
                {name: job for name in found if (job := self._of(name))},
                self._fleet(workers, audience),
                trouble,
            )
            for audience, found in listed.items()
        }

    def _watch(self, places: Iterable[str]) -> None:
        """Ask the workers to write the steps of their jobs often, while any of them is shown."""
        shown = (self._of(name) for name in places)
        is_running = any(job is not None and job.record.state is State.RUNNING for job in shown)
        if is_running and time.monotonic() - self._asked_s >= ASK_EVERY_S:
            self._asked_s = time.monotonic()
            self._session.records.watch()

    def _of(self, name: str) -> SeenJob | None:
        known = self._known.get(name)
        return known[2] if known else None

    def _places(self, audience: Audience) -> dict[str, _Place]:
        """The jobs that are to be shown, and where each stands in the lists."""
        # The lists of all name those of tenants, too, which are left out where they are not to be seen.
        most = LATEST_JOBS if audience.tenant != "" else 10 * LATEST_JOBS
        of = audience.owner if audience.tenant is not None else ""
        counts = (
            (latest_key(audience.tenant or ""), most, LATEST_JOBS),
            (drawn_key(of), max(most, LATEST_PICTURES), LATEST_PICTURES),
            (FAILED, LATEST_FAILURES, LATEST_FAILURES),
        )
        with self._session.redis.pipeline(transaction=False) as pipe:
            for name, count, _ in counts:
                pipe.zrevrange(name, 0, count - 1, withscores=True)
            lists = cast("list[Sequence[tuple[str, float]]]", pipe.execute())
        found: dict[str, _Place] = {}
        for number, (entries, (_, _, count)) in enumerate(zip(lists, counts, strict=True)):
            named = [(*str(member).rpartition("/")[::2], at) for member, at in entries]
            if audience.tenant == "":
                named = [each for each in named if not each[0]]
            for tenant, job_id, at in named[:count]:
                place = found.setdefault(job_id, _Place(audience.owner or tenant))
                place.at[number] = at
        return found

    def _read_jobs(self, places: Mapping[str, _Place]) -> str:
        """Bring `_known` up to date. Returns what could not be read, in a sentence."""
        self._known = {name: known for name, known in self._known.items() if name in places}
        todo = [name for name, place in places.items() if not self._is_settled(name, place)]
        if not todo:
            return ""
        with self._session.redis.pipeline(transaction=False) as pipe:
            for name in todo:
                pipe.hgetall(job_key(name))
            answers = pipe.execute(raise_on_error=False)
        missing = []
        for name, fields in zip(todo, answers, strict=True):
            before, at = self._known.get(name), tuple(places[name].at)
            if before and before[1] == fields and before[0] == at:
                continue
            record = readable(name, fields)
            if record is None:
                missing.append(name)
                continue
            submissions = tuple(sorted(each[4:] for each in fields if each.startswith("sub:") and each[4:]))
            self._known[name] = at, fields, SeenJob(record, submissions, max(at))
        return self._read_lasting(missing, places)

    def _is_settled(self, name: str, place: _Place) -> bool:
        """Whether what is known of a job holds still: it has ended, and nobody submitted it since."""
        known = self._known.get(name)
        if known is None or known[0] != tuple(place.at):
            return False
        return known[2] is None or known[2].record.state.is_final

    def _read_lasting(self, names: Sequence[str], places: Mapping[str, _Place]) -> str:
        """Read the records that Redis has no longer from the bucket."""

        def lasting(name: str) -> JobRecord | None:
            with suppress(UnknownJobError):
                return self._session.lasting(name, places[name].owner)
            return None

        if not names or self._session.bucket is None:
            return ""
        try:
            with ThreadPoolExecutor(_AT_ONCE) as threads:
                for name, record in zip(names, threads.map(lasting, names), strict=True):
                    at = tuple(places[name].at)
                    self._known[name] = at, {}, SeenJob(record, (), max(at)) if record else None
        except StorageError as error:
            return str(error)
        return ""

    def _fleet(self, workers: Sequence[WorkerInfo], audience: Audience) -> dict[str, Any]:
        """The workers of models that the audience may use, and those of its messages that wait."""
        workers = [each for each in workers if may_use(audience.models, each.served.name)]
        served = [set(queues_of(each.served)) for each in workers if not each.paused]
        found = self._session.fleet.waiting(None if audience.tenant is None else audience.owner)
        waiting = {queue: count for queue, count in found.items() if count}
        return {
            "workers": [
                _shown(each, self._session.fleet.indexes.get(each.files)) for each in workers[:MAX_WORKERS]
            ],
            "more_workers": max(0, len(workers) - MAX_WORKERS),
            "running": sum(each.running for each in workers),
            "waiting": sum(waiting.values()),
            "queues": [
                {"queue": queue, "waiting": count, "workers": sum(queue in each for each in served)}
                for queue, count in waiting.items()
            ],
        }


def _shown(worker: WorkerInfo, index: FileIndex) -> dict[str, Any]:
    names = ("name", "device", "attention", "max_rows", "paused", "started_at")
    lately = ("running", "images_s", "step_rows")
    values = {name: getattr(worker, name) for name in (*names, *lately)}
    served = worker.served
    defaults = served.defaults.model_dump(mode="json")
    return {**values, "model": served.name, "revision": served.revision, "defaults": defaults} | {
        "inpainting": served.inpainting,
        "prompt_syntax": str(worker.prompt_syntax),
        "files": worker.files,
        "vaes": [each.name for each in index.files if each.kind == Kind.VAE and not each.problem],
    }
