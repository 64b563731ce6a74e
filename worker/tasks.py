"""The Celery task, and the one place where a worker is put together and taken apart.

Only this module knows the real runner and the real storage. It holds no decisions of its own: `JobHandler`
has the way of a job, `Engine` the loop.
"""

from __future__ import annotations

import gc
import logging
import os
import platform
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery import Task, signals
from celery.exceptions import Reject
from celery.worker import state as worker_state
from kombu.asynchronous import get_event_loop

from worker.broker import transport
from worker.broker.event_batches import EventGroups
from worker.broker.lease import postpone
from worker.celery import app
from worker.contract.errors import EngineStoppedError, MachineError, NewerMessageError, SmallcatError
from worker.contract.job import DEFAULT_PRIORITY
from worker.contract.message import TASK, URGENT
from worker.contract.queues import queues_of
from worker.contract.settings import WorkerSettings, hidden, worker_settings
from worker.contract.versions import versions
from worker.engine.capacity import JOBS_PER_ROW, jobs_in_flight, uploading_jobs
from worker.engine.engine import Engine
from worker.jobs import metrics
from worker.jobs.handler import JobHandler
from worker.jobs.heartbeat import Heartbeat
from worker.state.fleet import Fleet, WorkerInfo
from worker.state.records import Records
from worker.state.redis_client import connect, connect_until, queue_errors
from worker.storage.bucket import Bucket
from worker.storage.bucket_process import BucketProcess

if TYPE_CHECKING:
    from worker.device.model_runner import ModelRunner

logger = logging.getLogger("smallcat.worker")

#: Connections to the bucket that are kept open, at most: as many as the largest batch's worker has places.
STORAGE_CONNECTIONS = 640
#: Exit code of a worker whose engine was lost, from sysexits.h.
EX_SOFTWARE = 70
#: Seconds until a message that this worker cannot read, or does not know why it failed, is fetched again.
NEWER_DELAY_S, UNKNOWN_DELAY_S = 5.0, 1.0
#: Packages whose versions a worker announces.
VERSIONS = ("smallcat", "torch", "diffusers", "transformers", "xformers", "celery", "kombu")


@dataclass(frozen=True)
class _Process:
    """What one worker process is made of."""

    settings: WorkerSettings
    engine: Engine[Any]
    service: JobHandler
    heartbeat: Heartbeat
    #: Set when nobody should wait for Redis any more.
    hurry: threading.Event


_process: _Process | None = None

app.steps["consumer"].add(EventGroups)


@app.task(name=TASK, bind=True)
def run_job(task: Task[Any, Any], payload: dict[str, Any]) -> None:
    """Render the job in `payload` (see `worker.contract.message`) and store its picture.

    Whatever is raised inside becomes a `Reject` or nothing: Celery acknowledges a message whose task raised
    anything else, and a `SystemExit` or `MemoryError` would leak the pool's slot for good.
    """
    request = task.request
    try:
        delay_s = _here().service.handle(
            payload, request.id, redelivered=bool(request.delivery_info.get("redelivered"))
        )
        reason = "the job is tried again"
    except NewerMessageError as error:
        logger.error("%s", error)
        delay_s, reason = NEWER_DELAY_S, str(error)
    except MachineError as error:
        delay_s, reason = 0.0, str(error)
    except BaseException as error:
        logger.critical("The message goes back to the queue: %r", error, exc_info=True)
        delay_s, reason = UNKNOWN_DELAY_S, repr(error)
    if delay_s is not None:
        postpone(request.properties["delivery_tag"], delay_s)
        raise Reject(reason, requeue=True)


@signals.worker_init.connect
def _start(sender: Any, **_: Any) -> None:
    """Put the worker together before it takes work, or refuse with one sentence that says what to do."""
    global _process
    default, _, host = sender.hostname.partition("@")
    if default == "celery":
        # Celery's default name is one a host, but there may be a worker a GPU.
        sender.hostname = f"smallcat-{os.getpid()}@{host}"
    # Celery would ask the other workers for revoked tasks, and wait a second for their answers, at each new
    # connection. A job is cancelled by its record.
    sender.options["without_mingle"] = True
    sender.setup_logging()
    # One line for each choice is for everyone, whatever the level of Celery's own log.
    logging.getLogger("smallcat").setLevel(min(logging.INFO, sender.loglevel))
    try:
        _process = _assemble(sender.hostname)
    except SmallcatError as error:
        raise SystemExit(f"smallcat: {error}") from None
    except Exception as error:
        # Celery would log it and go on, as a worker without an engine.
        logger.critical("The worker cannot start.", exc_info=True)
        raise SystemExit(EX_SOFTWARE) from error
    transport.set_liveness(lambda: _here().engine.is_alive())
    served, max_rows = _process.service.served, _process.engine.max_rows
    app.amqp.queues.select(queues_of(served))
    if sender.concurrency == "auto":
        job_s = _process.engine.job_s
        open_to_all, reserved = jobs_in_flight(max_rows, job_s)
        sender.concurrency = open_to_all + reserved
        transport.set_reserve(open_to_all, URGENT)
        _say(
            "jobs in flight",
            f"{open_to_all} and {reserved} reserved",
            f"{JOBS_PER_ROW} for each row of a step and {uploading_jobs(max_rows, job_s)} being uploaded; "
            f"{reserved} more slots are reserved for priority {DEFAULT_PRIORITY} and above",
        )


def load_runner(settings: WorkerSettings) -> ModelRunner:
    """The model, on its device. Raises `SettingsError`."""
    # Half a million objects that live as long as the process: with a search for garbage again and again they
    # take a second more to import, and each later one would stop every thread.
    gc.disable()
    # Torch takes seconds to load: what fails before need not wait for it.
    from worker.device.model_runner import ModelRunner

    gc.freeze()
    gc.enable()
    return ModelRunner(settings)


def _assemble(name: str) -> _Process:
    """Everything, checked in the order of what is quick to check. Raises `SmallcatError`."""
    settings = worker_settings()
    # A job outlives a Redis that is away, for as long as it takes.
    hurry = threading.Event()
    client = connect_until(settings.redis_url, hurry)
    with queue_errors(settings.redis_url):
        # Asked on a client that does not wait: at start Redis is there or it is not.
        connect(settings.redis_url, retry_s=1).ping()
    # Asked by one that does not wait, as above.
    Bucket(settings.s3_bucket, settings.s3_prefix, attempts=2).check()
    storage = BucketProcess(settings.s3_bucket, settings.s3_prefix, connections=STORAGE_CONNECTIONS)
    storage.start()
    _say("queue", hidden(settings.redis_url), "REDIS_URL")
    _say("storage", storage.root, "S3_BUCKET, S3_PREFIX; a test object was written, read and deleted")

    runner = load_runner(settings)
    for choice in runner.choices:
        _say(choice.what, choice.choice, choice.reason)
    for choice in runner.warm_up():
        _say(choice.what, choice.choice, choice.reason)
    metrics.MemoryCollector(runner.memory)
    engine = Engine(
        runner, job_timeout_s=settings.job_timeout_s, on_failure=_engine_failed, on_step=metrics.observe_step
    )
    records = Records(client, settings.record_ttl_s)
    fleet = Fleet(client, settings.record_ttl_s)
    service = JobHandler(
        name=name,
        served=runner.served,
        engine=engine,
        records=records,
        bucket=storage,
        lease_s=settings.lease_s,
        max_attempts=settings.max_attempts,
        upload_timeout_s=settings.upload_timeout_s,
    )
    chosen = {choice.what: choice.choice for choice in runner.choices}
    info = WorkerInfo(
        name=name,
        served=runner.served,
        started_at=fleet.now(),
        device=chosen["device"],
        attention=chosen["attention"],
        max_rows=runner.max_rows,
        versions={"python": platform.python_version(), **versions(VERSIONS)},
    )
    # One that does not wait: the watchdog must go on while Redis is away.
    beating = connect(settings.redis_url, retry_s=1)
    heartbeat = Heartbeat(
        Records(beating, settings.record_ttl_s),
        Fleet(beating, settings.record_ttl_s),
        info,
        lease_s=settings.lease_s,
        jobs=service.progress,
        cancel=service.cancel,
        watchdog=lambda: _leave_if_hung(engine),
    )
    return _Process(settings, engine, service, heartbeat, hurry)


@signals.worker_ready.connect
def _ready(**_: Any) -> None:
    """Begin: from here on the worker is announced and takes jobs."""
    process = _here()
    if process.settings.metrics_port:
        metrics.serve(process.settings.metrics_port)
    process.engine.start()
    process.heartbeat.start()
    served = process.service.served
    logger.info("ready: takes jobs for %s at revision %s", served.name, served.revision)


@signals.worker_shutting_down.connect
def _drain(**_: Any) -> None:
    """Finish the jobs on board within the drain time, give back the rest. Celery waits for the pool."""
    if _process is None:
        return
    process = _process

    def drain() -> None:
        _wake_loop()
        # Jobs on board keep their claims, and can be cancelled, until they are done or given back.
        process.heartbeat.leave()
        process.engine.drain(process.settings.drain_s)
        _wait_no_more(process)

    on_board = len(process.service.progress())
    logger.info("stopping: %d jobs on board, at most %g s", on_board, process.settings.drain_s)
    threading.Thread(target=drain, name="drain", daemon=True).start()


@signals.worker_shutdown.connect
def _withdraw(**_: Any) -> None:
    """Be gone from the fleet before the process is: nobody may be sent to a revision that left with it."""
    if _process is not None:
        _process.heartbeat.stop()


def _here() -> _Process:
    """This process' parts, which `_start` has put together before Celery starts the pool."""
    if _process is None:
        raise EngineStoppedError("This process has no engine: it was not started as a worker.")
    return _process


def _engine_failed(_: BaseException) -> None:
    """All jobs are back in the queue: leave, so that what supervises the worker starts a new one."""
    if _process is not None:
        _wait_no_more(_process)
    worker_state.should_stop = EX_SOFTWARE
    _wake_loop()


def _wait_no_more(process: _Process) -> None:
    """Let the pool's threads give back what waits for the bucket or for Redis: Celery waits for them."""
    process.service.stop()
    process.hurry.set()


def _wake_loop() -> None:
    """Let Celery see at once that it should stop. Neither a signal nor a flag ends its wait for Redis.

    To be called from any thread but the loop's own.
    """
    if (loop := get_event_loop()) is not None:
        loop.call_soon(lambda: None)  # type: ignore[no-untyped-call]


def _leave_if_hung(engine: Engine[Any]) -> None:
    """A device that hangs cannot be stopped politely. The leases end, and other workers take the jobs."""
    if engine.is_hung():
        logger.critical("The engine has been in one step for longer than SMALLCAT_JOB_TIMEOUT_S: leaving.")
        os._exit(EX_SOFTWARE)


def _say(what: str, choice: str, reason: str) -> None:
    logger.info("%s: %s (%s)", what, choice, reason)
