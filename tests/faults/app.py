"""The worker that the faults befall: `celery -A tests.faults.app worker`.

It is `worker`'s own app, task, engine, records, transport and storage, with three things added: a runner
without torch, a journal, and the points at which a process can be made to die. The environment sets them:

    FAULTS_JOURNAL      file that every event of a job goes to, one line each
    FAULTS_ROWS         rows in a step; twice as many jobs are in flight
    FAULTS_STEP_S       seconds a step takes
    FAULTS_REVISION     the revision of the fake's model, in the place of `tests.faults.runner.SERVED`'s
    FAULTS_JOURNAL_STEPS    1: the journal also has when each step began and ended
    FAULTS_TRANSPORT    "stock": kombu's own Redis transport, the negative control
    FAULTS_STORAGE      "folder": pictures go straight into FAULTS_FOLDER, where the S3 server has its bucket
    FAULTS_MARKS        0: done marks are not counted, which costs Redis a command a job
    FAULTS_CLOCK_S      seconds that this process' clock is ahead
"""

from __future__ import annotations

import os
import time

if ahead_s := float(os.environ.get("FAULTS_CLOCK_S", "0")):
    _real = time.time
    # Before anything else can import it.
    time.time = lambda: _real() + ahead_s

import json
import re
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import worker.jobs.handler as handler
import worker.model.beside.file_store as file_store
import worker.state.scripts as scripts
import worker.tasks as tasks
from tests.faults.app_names import DIED, MARKS
from tests.faults.runner import FaultRunner, FaultState, verbs_of
from tests.folder_storage import InFolder
from worker.celery import app as app
from worker.contract.choices import ImageFormat
from worker.contract.errors import SmallcatError
from worker.contract.job import Job
from worker.contract.record import JobRecord
from worker.contract.settings import WorkerSettings, worker_settings
from worker.engine.runner import Picture
from worker.jobs.handler import Handled, JobHandler
from worker.jobs.put_back import put_back
from worker.model.beside.bucket_files import BucketFiles
from worker.model.beside.file_store import FileStore
from worker.state.records import Records
from worker.storage.bucket import Bucket
from worker.storage.bucket_process import BucketProcess
from worker.storage.input_pixels import InputPixels

# A mark is counted in the step that makes it: so that two of them, by whatever way, are seen.

assert scripts.FINISH.endswith("return 1\n")
if os.environ.get("FAULTS_MARKS") != "0":
    scripts.FINISH = (
        scripts.FINISH.removesuffix("return 1\n")
        + f"if ARGV[1] == 'done' then redis.call('HINCRBY', '{MARKS}', id, 1) end\nreturn 1\n"
    )

if os.environ.get("FAULTS_TRANSPORT") == "stock":
    app.conf.broker_url = worker_settings().redis_url

_journal = os.open(os.environ["FAULTS_JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_records: list[Records] = []


def note(event: str, job_id: str) -> None:
    """Append one line to the journal; lines of several processes do not mix."""
    os.write(_journal, f"{event} {job_id} {os.getpid()} {time.monotonic():.6f}\n".encode())


def may_die(job_id: str, times: int) -> bool:
    """Whether the process may die for this job once more: `times` in all."""
    count = _records[0]._redis.hincrby(DIED, job_id, 1)
    if int(count) <= times:
        note("died", job_id)
        return True
    return False


def die(point: str, prompt: str, job_id: str) -> None:
    """Die here, once, if the prompt asks for it."""
    if verbs_of(prompt).get("die") == point and may_die(job_id, 1):
        os.kill(os.getpid(), signal.SIGKILL)


class TellingRunner(FaultRunner):
    """Journals its steps."""

    def step(self, states: Sequence[FaultState]) -> list[SmallcatError | None]:
        note("step", "-")
        try:
            return super().step(states)
        finally:
            note("stepped", "-")


def _note_of_runner(event: str, job: Job) -> None:
    note(event, job.id)
    if event == "start":  # While its text and its image are encoded.
        die("encode", job.prompt, job.id)


def load_runner(settings: WorkerSettings, files: object, shared: object) -> FaultRunner:
    runner = TellingRunner if os.environ.get("FAULTS_JOURNAL_STEPS") else FaultRunner
    made = runner(
        int(os.environ.get("FAULTS_ROWS", "4")),
        float(os.environ.get("FAULTS_STEP_S", "0")),
        _note_of_runner,
        may_die,
    )
    made.served = made.served.model_copy(update={"revision": os.environ.get("FAULTS_REVISION", "f" * 40)})
    return made


tasks.preload = lambda settings: None
tasks.load_runner = load_runner  # type: ignore[assignment]


class JournalingHandler(JobHandler):
    """Journals when a job takes and leaves its slot; dies before the acknowledgement."""

    def handle(self, payload: object, message_id: str, *, redelivered: bool = False) -> Handled:
        # An id that somebody made up may be any text: a line of the journal has four words.
        known = re.match(r"[0-9a-f]{32}(?=-)", message_id)
        job_id = known.group() if known else "unknown"
        _records[:] = [self._records]
        note("take", job_id)
        try:
            answer = super().handle(payload, message_id, redelivered=redelivered)
        finally:
            note("leave", job_id)
        match payload:
            case {"job": {"prompt": str(prompt)}}:
                die("before_ack", prompt, job_id)
        return answer


def dying_put_back(job: Job, inputs: InputPixels | None, picture: Picture) -> Picture:
    """Dies where what was drawn is put into the job's image."""
    die("paste", job.prompt, job.id)
    return put_back(job, inputs, picture)


handler.put_back = dying_put_back  # type: ignore[attr-defined]


class Dying(Bucket):
    """Dies around the reading of a job's pictures, between the two objects of a job, and after both."""

    def pixels_of(self, job: Job) -> InputPixels:
        die("before_inputs", job.prompt, job.id)
        pixels = super().pixels_of(job)
        die("after_inputs", job.prompt, job.id)
        return pixels

    def put(
        self,
        job_id: str,
        image_format: ImageFormat,
        picture: bytes,
        record: bytes,
        mime: str,
        tenant: str = "",
    ) -> None:
        prompt = json.loads(record)["job"]["prompt"]
        if verbs_of(prompt).get("die") == "between_puts":
            self._put(self._key(job_id, image_format, tenant), picture, mime)
            die("between_puts", prompt, job_id)
        super().put(job_id, image_format, picture, record, mime, tenant)
        note("put", job_id)
        die("after_put", prompt, job_id)


#: The job whose files this thread fetches.
_fetching = threading.local()


class DyingCopies(BucketFiles):
    """Dies before and after a fetched file has its place on the disk."""

    def _keep(self, path: Path, sha256: str) -> Path:
        die("copied", _fetching.job.prompt, _fetching.job.id)
        kept = super()._keep(path, sha256)
        die("fetched", _fetching.job.prompt, _fetching.job.id)
        return kept


class DyingFiles(FileStore):
    """Knows whose files it fetches."""

    def provide(self, job: Job) -> Job:
        _fetching.job = job
        return super().provide(job)


class DyingRecords(Records):
    """Dies after the done mark."""

    def done(self, record: JobRecord, *more: Any) -> bool:
        marked = super().done(record, *more)
        die("after_done", record.job.prompt, record.id)
        return marked


class DyingStorage(Dying, BucketProcess):
    """As a worker has it."""


class FolderStorage(InFolder, Dying):
    """For storms faster than the S3 server and the cores that it shares are."""

    VARIABLE = "FAULTS_FOLDER"


tasks.JobHandler = JournalingHandler  # type: ignore[misc]
IS_FOLDER = os.environ.get("FAULTS_STORAGE") == "folder"
tasks.BucketProcess = FolderStorage if IS_FOLDER else DyingStorage  # type: ignore[assignment, misc]
tasks.Records = DyingRecords  # type: ignore[misc]
tasks.FileStore = DyingFiles  # type: ignore[misc]
file_store.BucketFiles = DyingCopies  # type: ignore[misc]
