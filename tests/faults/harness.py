"""Real servers, real workers and producers for tests that break one of them.

`Ground` is where a fault happens: a stack of its own, workers of `tests.faults.app`, and the ids of all
jobs that were submitted. `tests.faults.oracle` then accounts for every one of them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from deploy.embedded.home import StackError
from deploy.embedded.process import Process
from deploy.embedded.servers import WorkerProcess
from deploy.embedded.stack import BUCKET, Stack
from producer import JobHandle, submit_job
from worker.broker.transport import OLD_UNACKED, OLD_UNACKED_INDEX, UNACKED, UNACKED_INDEX
from worker.contract.errors import QueueError, StorageError
from worker.contract.found_message import FoundMessage
from worker.contract.job import Job
from worker.contract.queues import lists_of, queues_of
from worker.engine.capacity import jobs_in_flight
from worker.state.redis_client import connect
from worker.state.tenants import lists_of_tenant

from tests.faults.pictures import Pictures  # isort: skip
from tests.faults.runner import SERVED, FaultRunner  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
#: Whose jobs are submitted in turns; the first ones are nobody's.
TENANTS = ("", "acme", "blue")
#: Seconds of a lease: short, so that what a dead worker held is seen again soon.
LEASE_S = 3.0


def wait_until(what: str, happened: Callable[[], bool], timeout_s: float = 30.0) -> float:
    """Return the seconds that it took. Fails with `what` when it takes longer than `timeout_s`."""
    began_s = time.monotonic()
    while not happened():
        if time.monotonic() - began_s > timeout_s:
            raise AssertionError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.01)
    return time.monotonic() - began_s


def slots(rows: int) -> int:
    """Jobs that a worker of so many rows has in flight at most, with the slots reserved for urgent ones."""
    return sum(jobs_in_flight(rows, FaultRunner.job_s))


def _held(pipe: Any) -> Any:
    """Count what is held, by kombu's own transport as well."""
    for unacked, index in ((UNACKED, UNACKED_INDEX), (OLD_UNACKED, OLD_UNACKED_INDEX)):
        pipe.hlen(unacked).zcard(index)
    return pipe


class FaultWorker(WorkerProcess):
    """A worker of `tests.faults.app`."""

    start_timeout_s = 60.0
    check_every_s = 0.02
    #: The Celery app that it runs.
    app = "tests.faults.app"
    #: The release whose code it runs.
    tree = ROOT

    def _argv(self) -> list[str]:
        argv = super()._argv()
        argv[argv.index("-A") + 1] = self.app
        at = argv.index("celery") + 1
        # Celery puts its working folder before all others.
        return argv if self.tree == ROOT else [*argv[:at], "--workdir", str(self.tree), *argv[at:]]


@dataclass(frozen=True)
class Event:
    """One line of the journal."""

    #: take, start, end, put, leave: the way of a job. died: its process is about to.
    what: str
    job: str
    pid: int
    #: Monotonic seconds, the same for all processes of the machine.
    at_s: float


class Journal:
    """What every job did, in a file, so that no fault of Redis hides it. Reads on from where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self._file = path.open()
        self._lock = threading.Lock()
        self._rest = ""
        self._events: list[Event] = []
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._totals: Counter[str] = Counter()

    def events(self) -> list[Event]:
        """All events so far."""
        with self._lock:
            text = self._rest + self._file.read()
            complete, _, self._rest = text.rpartition("\n")
            for line in complete.splitlines():
                what, job, pid, at_s = line.split()
                self._events.append(Event(what, job, int(pid), float(at_s)))
                self._counts[what][job] += 1
                self._totals[what] += 1
            return self._events

    def count(self, what: str) -> Counter[str]:
        """How often each job did that."""
        self.events()
        return self._counts[what]

    def total(self, what: str) -> int:
        """How often that happened, to any job."""
        self.events()
        return self._totals[what]

    def wait_for(self, what: str, jobs: Iterable[str], timeout_s: float = 30.0) -> float:
        """Wait until each of `jobs` has done that."""
        wanted = set(jobs)
        return wait_until(
            f"{len(wanted)} jobs with {what!r}", lambda: wanted <= self.count(what).keys(), timeout_s
        )


class Ground:
    """A stack, its workers, its journal and its jobs."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack = stack
        self.folder = folder
        self.journal = Journal(folder / "journal")
        self.ids: list[str] = []
        self.workers: list[FaultWorker] = []
        self._names = itertools.count()
        self._pictures = Pictures()

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the producer in this process submit here."""
        for name, value in self.stack.variables.items():
            monkeypatch.setenv(name, value)

    @property
    def redis(self) -> redis.Redis:
        """A client of the stack's Redis that tries again while it is away."""
        return connect(self.stack.valkey.url, retry_s=10)

    @property
    def images(self) -> Path:
        """The bucket's pictures, as the S3 server keeps them."""
        return self.stack.s3.folder / BUCKET / "images"

    # Workers.

    def worker(
        self,
        *,
        ready: bool = True,
        rows: int = 4,
        settings: Mapping[str, str] | None = None,
        tree: Path = ROOT,
        **faults: object,
    ) -> FaultWorker:
        """One more worker. `faults` become `FAULTS_*` of `tests.faults.app`; `tree` is another release."""
        environment = {
            **self.stack.environment,
            "PYTHONPATH": str(tree),
            "SMALLCAT_LEASE_S": str(LEASE_S),
            "SMALLCAT_DRAIN_S": "2",
            "SMALLCAT_MAX_ATTEMPTS": "3",
            "FAULTS_JOURNAL": str(self.journal.path),
            "FAULTS_ROWS": str(rows),
            "FAULTS_FOLDER": str(self.images.parent),
            **{f"FAULTS_{name.upper()}": str(value) for name, value in faults.items()},
            **({} if tree == ROOT else {"PYTHONSAFEPATH": "1"}),
            **(settings or {}),
        }
        worker = FaultWorker(self.stack.home, f"worker{len(self.workers) + 1}", environment)
        worker.tree = tree
        self.workers.append(worker)
        self.stack.workers.append(worker)
        if ready:
            worker.start()
        else:
            worker.launch()
        return worker

    # Jobs.

    def job(self, verbs: str = "", *, kind: str = "text", own: bool = False, **fields: object) -> Job:
        """A job that no other test has, of one of the kinds of `tests.faults.pictures`.

        `own`: what it begins with is no other job's, either.
        """
        number = next(self._names)
        fields |= self._pictures.fields(kind, str(fields.get("tenant", "")), number + 1 if own else 0)
        prompt = f"job-{os.getpid()}-{id(self):x}-{number} {verbs}".strip()
        return Job.parse({"prompt": prompt, "seed": number, **fields}).resolved(SERVED)

    def submit(self, count: int = 1, verbs: str = "", **fields: object) -> list[str]:
        """Submit so many jobs by `submit_job`; their ids."""
        ids = [submit_job(self.job(verbs, **fields)).id for _ in range(count)]
        self.ids += ids
        return ids

    def feeding(
        self,
        rate: float,
        verbs: Callable[[int], str] = lambda number: "",
        submit: Callable[[Job], str] = lambda job: submit_job(job).id,
        tenants: Sequence[str] = TENANTS,
        kinds: Sequence[str] = ("text",),
    ) -> Feeder:
        """Submit `rate` jobs a second while the with block lasts, of these tenants and kinds in turns."""
        return Feeder(self, rate, verbs, submit, tenants, kinds)

    @contextlib.contextmanager
    def holding(self) -> Iterable[str]:  # type: ignore[misc]
        """The verb of jobs that wait until the with block ends."""
        gate = self.folder / f"gate{next(self._names)}"
        try:
            yield f"hold:{gate}"
        finally:
            gate.touch()

    def folder_of(self, job_id: str) -> Path:
        """Where the job's objects are, or would be where it has no tenant."""
        own = self.images / job_id[:2]
        folders = [own, *self.images.glob(f"tenants/*/{job_id[:2]}")]
        return next((each for each in folders if list(each.glob(f"{job_id}*"))), own)

    def queued(self) -> int:
        """Messages that wait in the queues of the fake's model."""
        with self.redis as client:
            return sum(int(client.llen(each)) for each in _lists())

    def waiting(self) -> Counter[str]:
        """How many messages of each job wait there, whoever sent them."""
        with self.redis as client, client.pipeline(transaction=False) as pipe:
            for each in _lists():
                pipe.lrange(each, 0, -1)
            return Counter(FoundMessage.read(raw).id[:32] for found in pipe.execute() for raw in found)

    def unsettled(self) -> int:
        """Messages that Redis takes for held."""
        with self.redis as client:
            return sum(_held(client.pipeline()).execute())

    def messages(self) -> int:
        """Messages that wait or are held, counted in one step: none is missed on its way between the two."""
        with self.redis as client, client.pipeline() as pipe:
            for each in _lists():
                pipe.llen(each)
            return sum(_held(pipe).execute())

    def states(self, ids: Iterable[str]) -> Counter[str | None]:
        """How many jobs are in each state."""
        with self.redis as client, client.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hget(f"smallcat:job:{job_id}", "state")
            return Counter(pipe.execute())

    def attempts(self, ids: Iterable[str]) -> Counter[str | None]:
        """How many jobs took so many attempts."""
        with self.redis as client, client.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hget(f"smallcat:job:{job_id}", "attempts")
            return Counter(pipe.execute())

    def error_types(self, ids: Iterable[str]) -> Counter[str | None]:
        """How many jobs ended with each error."""
        with self.redis as client, client.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hget(f"smallcat:job:{job_id}", "error_type")
            return Counter(pipe.execute())

    def supervise(self, *workers: FaultWorker) -> None:
        """Start each of `workers` again whenever it dies, as what supervises a worker does."""

        def again(part: Process) -> None:
            with contextlib.suppress(StackError):
                part.launch()

        for worker in workers:
            worker.on_loss = again

    def two_that_may_die(self) -> None:
        """Two workers that are started again whenever they die, and give up no job for that."""
        workers = [self.worker(ready=False, settings={"SMALLCAT_MAX_ATTEMPTS": "20"}) for _ in range(2)]
        self.supervise(*workers)
        for worker in workers:
            worker.wait_ready()

    def cut_connections(self) -> None:
        """Close all connections to Redis but its own."""
        with self.redis as client:
            client.client_kill_filter(_type="normal", skipme=True)
            client.client_kill_filter(_type="pubsub", skipme=True)


def chaining(every: int) -> Callable[[Job], str]:
    """Submits jobs of which each `every`-th without an image begins with the picture of its tenant's last."""
    last: dict[str, str] = {}
    numbers = itertools.count(1)

    def submit(job: Job) -> str:
        parent = last.get(job.tenant) if next(numbers) % every == 0 and not job.image else None
        made = submit_job(job, image=JobHandle(parent)) if parent else submit_job(job)
        last[job.tenant] = made.id
        return made.id

    return submit


def _lists() -> list[str]:
    """The lists of the fake's queues, those of `TENANTS` included."""
    queues = queues_of(SERVED)
    of_tenants = [
        name for queue in queues for each in TENANTS if each for name in lists_of_tenant(queue, each)
    ]
    return [*(name for queue in queues for name in lists_of(queue)), *of_tenants]


class Feeder:
    """A producer: a thread that submits jobs at a rate, also while Redis is away. A context manager.

    It pauses while `BACKLOG` jobs are under way, so that a storm does not end in an hour of draining.
    """

    BACKLOG = 300

    def __init__(
        self,
        ground: Ground,
        rate: float,
        verbs: Callable[[int], str],
        submit: Callable[[Job], str],
        tenants: Sequence[str],
        kinds: Sequence[str],
    ) -> None:
        self._ground = ground
        self._rate = rate
        self._verbs = verbs
        self._submit = submit
        self._tenants, self._kinds = tenants, kinds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)
        #: Ids that were accepted.
        self.ids: list[str] = []
        #: Times that `submit_job` raised; that job is submitted again.
        self.refused = 0
        self.failure: BaseException | None = None

    def _run(self) -> None:
        due_s = time.monotonic()
        try:
            for number in itertools.count():
                tenant = self._tenants[number % len(self._tenants)]
                kind = self._kinds[number % len(self._kinds)]
                job = self._ground.job(self._verbs(number), kind=kind, tenant=tenant)
                while True:
                    try:
                        self.ids.append(self._submit(job))
                        break
                    except (QueueError, StorageError):
                        self.refused += 1
                        if self._stop.is_set():
                            return
                if self._stop.wait(max(0.0, due_s - time.monotonic())):
                    return
                # Where it fell behind, it does not hurry to make up for it.
                due_s = max(due_s, time.monotonic() - 1) + 1 / self._rate
                while len(self.ids) - len(self._ground.journal.count("leave")) > self.BACKLOG:
                    if self._stop.wait(0.05):
                        return
        except BaseException as error:
            self.failure = error
            raise

    def __enter__(self) -> Feeder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._ground.ids += self.ids
        if self.failure is not None:
            raise self.failure
