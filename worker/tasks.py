"""The Celery task, and the one place where a worker is put together and taken apart.

Only this module knows the real runner and the real bucket. It makes no decisions: `JobHandler` has the way
of a job, `Engine` the loop.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from celery import Task, signals
from celery.exceptions import Reject
from celery.worker import state as worker_state
from kombu.asynchronous import get_event_loop

from worker.broker import log_lines, stop_signals, transport
from worker.broker.event_batches import EventBatches
from worker.broker.leases import acknowledge_by_record, acknowledged, held, postpone, set_aside_held
from worker.celery import app
from worker.contract.errors import (
    EngineStoppedError,
    InvalidJobError,
    MachineError,
    SmallcatError,
    first_line,
)
from worker.contract.message import TASK
from worker.contract.plain_log import ended
from worker.contract.plain_text import plain
from worker.contract.queues import URGENT, queues_of
from worker.contract.refusals import refusal_log
from worker.contract.settings import WorkerSettings, hidden, worker_settings
from worker.contract.versions import versions
from worker.device import start
from worker.engine.capacity import Slots
from worker.engine.engine import Engine
from worker.engine.pauses import Pauses
from worker.health.report import Health
from worker.jobs import metrics
from worker.jobs.announcement import VERSIONS, announcement
from worker.jobs.handler import JobHandler
from worker.jobs.heartbeat import Heartbeat
from worker.jobs.previews import PreviewMaker
from worker.jobs.rates import Rates
from worker.jobs.services import not_ready, wait_for, wait_for_both
from worker.jobs.waiting_jobs import WaitingJobs
from worker.model.beside.file_store import FileStore
from worker.state.chains import Chains
from worker.state.fleet import Fleet, WorkerInfo
from worker.state.keys import holder_of
from worker.state.known_files import KnownFiles
from worker.state.previews import Previews
from worker.state.records import Records
from worker.state.redis_client import RedisError, connect, connect_until
from worker.storage.bucket import Bucket
from worker.storage.bucket_process import BucketProcess
from worker.storage.options import BucketOptions
from worker.storage.shared_code import NO_KEY, SHARED, store_of
from worker.tracing import attempts, exporter

if TYPE_CHECKING:
    from worker.device.model_runner import ModelRunner

logger = logging.getLogger("smallcat.worker")

#: Connections to the bucket that are kept open, at most: a worker of the largest batch has so many slots.
STORAGE_CONNECTIONS = 640
#: Connections to Redis that the jobs share, at most: each uses one for a millisecond, a few times.
REDIS_CONNECTIONS = 2
#: Exit code of a worker whose engine was lost, from sysexits.h.
EX_SOFTWARE = 70
#: Seconds until a message that failed for an unknown reason is fetched again.
UNKNOWN_DELAY_S = 1.0
#: A message may come back so often, beyond SMALLCAT_MAX_ATTEMPTS, because its worker died: also those that a
#: worker has not begun come back.
MORE_RETURNS = 10
#: What makes the runner: `preload` begins what `load_runner` waits for.
preload, load_runner = start.preload, start.load


@dataclass(frozen=True)
class _Process:
    """The parts of one worker process."""

    settings: WorkerSettings
    engine: Engine[Any]
    handler: JobHandler
    heartbeat: Heartbeat
    waiting: WaitingJobs
    bucket: BucketProcess
    health: Health
    #: Set when no thread should wait for Redis any longer.
    stop_waiting: threading.Event


_process: _Process | None = None

app.steps["consumer"].add(EventBatches)
app.steps["worker"].add(stop_signals.StopSignals)


@app.task(name=TASK, bind=True)
def run_job(task: Task[Any, Any], payload: dict[str, Any]) -> None:
    """Render the job in `payload` (see `worker.contract.message`) and store its picture.

    Raises `Reject` or nothing: Celery acknowledges a message whose task raised anything else, and a
    `SystemExit` or a `MemoryError` would leak the pool's slot for good.
    """
    request = task.request
    tag, counts = request.properties["delivery_tag"], False
    message = f"{request.id}/{tag}"
    trace = request.get("traceparent"), request.get("tracestate")
    with attempts.attempt(str(payload.get("id", ""))[:32], *trace):
        try:
            handled = _here().handler.handle(
                payload, message, redelivered=bool(request.delivery_info.get("redelivered"))
            )
            delay_s = handled.delay_s
            if handled.is_done:
                acknowledged(tag)
            elif delay_s is None and handled.records:
                acknowledge_by_record(tag, handled.records, holder_of(message))
        except InvalidJobError as error:
            logger.error("Message %s is set aside: %s", ascii(request.id), plain(error))
            set_aside_held(tag, str(error))
            attempts.failed(error)
            delay_s = None
        except (MachineError, RedisError) as error:
            logger.info("Message %s goes back to its queue: %s", request.id, plain(first_line(error)))
            delay_s = error.delay_s if isinstance(error, MachineError) else UNKNOWN_DELAY_S
            attempts.note(outcome="given_back")
            attempts.failed(error)
        except BaseException as error:
            logger.critical("The message goes back to the queue: %r", error, exc_info=True)
            delay_s, counts = UNKNOWN_DELAY_S, True
            attempts.failed(error)
    if delay_s is not None:
        postpone(tag, delay_s, counts=counts)
        raise Reject("the message goes back to its queue", requeue=True)


@signals.celeryd_init.connect
def _begin_log(**_: Any) -> None:
    log_lines.before_celery()


@signals.worker_init.connect
def _start(sender: Any, **_: Any) -> None:
    """Put the worker together before it takes work, or refuse with one sentence that says what to do."""
    global _process
    default, _, host = sender.hostname.partition("@")
    if default == "celery":
        # Celery's default name is the same for all workers of a host; there may be one for each GPU.
        sender.hostname = f"smallcat-{os.getpid()}@{host}"
    # Without this Celery asks the other workers for revoked tasks at each new connection, and waits a second
    # for their answers. A job is cancelled by its record.
    sender.options["without_mingle"] = True
    # Without this each worker receives the heartbeats of all others, and uses none.
    sender.options["without_gossip"] = True
    stop_signals.until_ready()
    try:
        settings = worker_settings()
        log_lines.begin(sender, settings.log)
        _process = _assemble(settings, sender.hostname)
    except SmallcatError as error:
        raise ended(str(error)) from None
    except Exception as error:
        # Celery would log it and go on, with a worker that has no engine.
        logger.critical("The worker cannot start.", exc_info=True)
        raise SystemExit(EX_SOFTWARE) from error
    stop_signals.set_hurry(_hurry)
    records = Records(connect(_process.settings.redis_url, retry_s=1), _process.settings.record_ttl_s)
    transport.set_on_unreadable(metrics.counted(records.set_aside))
    transport.set_max_returns(_process.settings.max_attempts + MORE_RETURNS)
    transport.set_liveness(lambda: _here().engine.is_alive())
    transport.set_pause(lambda: bool(_here().handler.access.reason))
    app.amqp.queues.select(queues_of(_process.handler.served))
    if sender.concurrency == "auto":
        slots = Slots(_process.engine.sizes)
        sender.concurrency = slots.most
        transport.set_slots(slots.now, URGENT)
        _log_choice("jobs in flight", "{} and {} reserved".format(*slots.now()), slots.reason())


def _assemble(settings: WorkerSettings, name: str) -> _Process:
    """All parts, in the order in which they can be checked quickly. Raises `SmallcatError`."""
    preload(settings)
    refusal_log.where = hidden(settings.redis_url)
    stop_waiting = threading.Event()
    health = Health(settings.health_port)
    health.start()
    health.doing("The worker waits for Redis and the bucket.")
    # A job outlives a Redis that is away, for as long as it takes.
    client = connect_until(settings.redis_url, stop_waiting, REDIS_CONNECTIONS)
    bucket = _services(settings)
    files = _files(settings)
    health.doing("The worker loads the model, renders one small picture, and compiles.")
    if to := exporter.begin():
        _log_choice("traces", to, "OTEL_EXPORTER_OTLP_ENDPOINT")
    runner = _warm_runner(settings, files)
    timeout_s, rates = settings.job_timeout_s, Rates(metrics.observe_step)
    on_turn = Pauses(lambda: runner.is_compiled, metrics.observe_change).turn
    engine = Engine(
        runner, job_timeout_s=timeout_s, on_failure=_engine_failed, on_step=rates.step, on_turn=on_turn
    )
    handler = JobHandler(
        name=name,
        served=runner.served,
        engine=engine,
        records=Records(client, settings.record_ttl_s, held=transport.HELD, together=True),
        bucket=bucket,
        lease_s=settings.lease_s,
        max_attempts=settings.max_attempts,
        upload_timeout_s=settings.upload_timeout_s,
        mark_as_generated=settings.mark_as_generated,
        files=files,
        rates=rates,
    )
    chosen = {choice.what: choice.choice for choice in runner.choices}
    started_at = Fleet(client, settings.record_ttl_s).now()
    info = announcement(settings, name, runner.served, chosen, runner.most_rows, started_at)
    heartbeat = _heartbeat(settings, info, handler, engine, files, runner)
    waiting = WaitingJobs(Chains(connect(settings.redis_url, retry_s=1)), bucket.has_record)
    return _Process(settings, engine, handler, heartbeat, waiting, bucket, health, stop_waiting)


def _services(settings: WorkerSettings) -> BucketProcess:
    """Check Redis and the bucket, and wait for them a while; return the bucket. Raises `ServiceError`."""
    wait_for_both(settings)
    where, options = (settings.s3_bucket, settings.s3_prefix), BucketOptions.of(settings)
    bucket = BucketProcess(*where, connections=STORAGE_CONNECTIONS, options=options)
    bucket.start()
    _log_choice("queue", hidden(settings.redis_url), "REDIS_URL")
    _log_choice("storage", bucket.root, "S3_BUCKET, S3_PREFIX; a test object was written and read")
    return bucket


def _files(settings: WorkerSettings) -> FileStore:
    """The files beside the model, found and indexed. Raises `SettingsError`, `ServiceError`."""
    options, until_s = BucketOptions.of(settings), time.monotonic() + settings.start_timeout_s
    shared = KnownFiles(connect(settings.redis_url, retry_s=1), settings.record_ttl_s)
    files = wait_for(lambda: FileStore.of(settings, partial(Bucket, options=options), shared), until_s)
    return files.start()


def _warm_runner(settings: WorkerSettings, files: FileStore) -> ModelRunner:
    """The model, loaded and warmed up; each choice that is made for the user is logged."""
    shared = store_of(settings)
    if settings.kernel_cache:
        _log_choice("shared code", str(shared or "no"), SHARED if shared else NO_KEY)
    runner = load_runner(settings, files, shared)
    # Torch, diffusers and others have brought handlers of their own.
    log_lines.shorten(settings.log)
    for choice in runner.choices:
        _log_choice(choice.what, choice.choice, choice.reason)
    for choice in runner.warm_up():
        _log_choice(choice.what, choice.choice, choice.reason)
    metrics.observe_process(runner, held, {"model": runner.served.name, **versions(VERSIONS)})
    return runner


def _heartbeat(
    settings: WorkerSettings,
    info: WorkerInfo,
    handler: JobHandler,
    engine: Engine[Any],
    files: FileStore,
    runner: ModelRunner,
) -> Heartbeat:
    """The heartbeat of `handler`'s jobs; it ends the process when `engine` hangs."""
    # A client that does not wait: the watchdog must go on while Redis is away.
    client = connect(settings.redis_url, retry_s=1)
    return Heartbeat(
        Records(client, settings.record_ttl_s),
        Fleet(client, settings.record_ttl_s),
        info,
        lease_s=settings.lease_s,
        jobs=handler.progress,
        cancel=handler.cancel,
        watchdog=lambda: _exit_if_hung(engine),
        paused=lambda: handler.access.reason,
        files=lambda: files.index,
        lately=handler.rates.lately,
        max_rows=lambda: engine.sizes.most_rows,
        preview=PreviewMaker(engine.tickets, runner.preview, Previews(client).put).ask,
    )


@signals.worker_ready.connect
def _ready(**_: Any) -> None:
    """Start: from here on the worker is announced and takes jobs."""
    process = _here()
    if process.settings.metrics_port:
        metrics.serve(process.settings.metrics_port)
    process.engine.start()
    process.heartbeat.start()
    process.waiting.start()
    process.health.started(
        stuck_s=lambda: process.engine.movement.stuck_s,
        stuck_as="Jobs are in flight and have not moved for much longer than a step takes.",
        is_patient=process.engine.movement.is_compiling,
        not_ready=lambda: not_ready(
            process.settings.redis_url, process.bucket, lambda: process.handler.access.reason
        ),
    )
    served = process.handler.served
    logger.info("ready: takes jobs for %s at revision %s", served.name, served.revision)


@signals.worker_shutting_down.connect
def _drain(**_: Any) -> None:
    """Finish the jobs in flight within the drain time, give back the rest. Celery waits for the pool."""
    if _process is None:
        return
    process = _process
    process.health.stopping()

    def drain() -> None:
        # Not in the signal's handler, which may have stopped a line in its middle.
        jobs, drain_s = len(process.handler.progress()), process.settings.drain_s
        logger.info("stopping: %d jobs in flight have %g s to finish, or go back to the queue", jobs, drain_s)
        _wake_loop()
        # Jobs in flight keep their claims, and can be cancelled, until they are done or given back.
        process.heartbeat.leave()
        process.engine.drain(drain_s)
        _stop_waiting(process)

    threading.Thread(target=drain, name="drain", daemon=True).start()


def _hurry() -> None:
    """Give all jobs in flight back to the queue at once, during a drain or instead of one."""
    if _process is not None:
        logger.info("stopping at once: %d jobs go back to the queue", len(_process.handler.progress()))
        _process.engine.stop()
        _stop_waiting(_process)


@signals.worker_shutdown.connect
def _withdraw(**_: Any) -> None:
    """Withdraw the announcement before the process ends: no job may be sent to a revision that is gone."""
    if _process is not None:
        _process.waiting.stop()
        _process.heartbeat.stop()
        # Its last step must have ended: torch aborts a process that ends in the middle of one.
        _process.engine.stop()


def _here() -> _Process:
    """The parts of this process. `_start` has put them together before Celery starts the pool."""
    if _process is None:
        raise EngineStoppedError("This process has no engine: it was not started as a worker.")
    return _process


def _engine_failed(_: BaseException) -> None:
    """End the process: all jobs are back in the queue, and its supervisor starts a new worker."""
    if _process is not None:
        _stop_waiting(_process)
    worker_state.should_stop = EX_SOFTWARE
    _wake_loop()


def _stop_waiting(process: _Process) -> None:
    """Let the pool's threads, for which Celery waits, give back jobs that wait for Redis or the bucket."""
    process.handler.stop()
    process.stop_waiting.set()


def _wake_loop() -> None:
    """Let Celery notice at once that it should stop: neither a signal nor a flag ends its wait for Redis.

    Called from any thread but the loop's own.
    """
    if (loop := get_event_loop()) is not None:
        loop.call_soon(lambda: None)  # type: ignore[no-untyped-call]


def _exit_if_hung(engine: Engine[Any]) -> None:
    """End the process of a device that hangs: the leases run out, and other workers take the jobs."""
    if engine.is_hung():
        logger.critical("One step has taken longer than SMALLCAT_JOB_TIMEOUT_S: the device hangs. Exiting.")
        os._exit(EX_SOFTWARE)


def _log_choice(what: str, choice: str, reason: str) -> None:
    logger.info("%s: %s (%s)", what, choice, reason)
