"""`smallcat doctor`: checks everything that a job needs. One finding a line, each with its remedy."""

from __future__ import annotations

import importlib.util
import secrets
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from producer.session import Session, session
from worker.contract.errors import PermanentStorageError, QueueError, SmallcatError, StorageError
from worker.contract.file_index import FileEntry, called
from worker.contract.job import OPEN_REVISION
from worker.contract.plain_text import counted, plain
from worker.contract.queues import queues_of
from worker.contract.settings import hidden
from worker.state.groups import WorkerInfo, groups_of, version_read
from worker.state.parked import parked
from worker.state.queue_figures import chained, fullness
from worker.state.waiting import waiting_in

if TYPE_CHECKING:
    from worker.storage.bucket import Bucket


#: Files that can be used and are listed, at most.
_FILES = 50
#: Share of Redis' memory from which somebody should act.
_NEARLY_FULL = 0.9
#: The settings of Redis by which a job's record stays one compact value and the messages that workers hold do
#: not, by the names that all versions know: bytes that a field of such a value may have, and its fields.
_LONGEST_VALUE = ("hash-max-ziplist-value", "2048")
_MOST_FIELDS = ("hash-max-ziplist-entries", "64")
#: Fields from which the other one costs a busy queue time.
_MANY_FIELDS = 128
#: Notifications that wait while a sender takes them a few times a second.
_UNTAKEN = 200


class Finding(NamedTuple):
    """The result of one check."""

    #: What was checked: redis, bucket, workers, files, queues, webhooks, device or attention.
    what: str
    #: Whether it is as it should be.
    ok: bool
    #: What was found; where `ok` is false or it is a note, also what to do.
    text: str
    #: Whether it is as it may be, and something else would be better.
    is_note: bool = False


def examine() -> Iterator[Finding]:
    """Check Redis, the bucket, the workers and this machine. Raises `SettingsError` only."""
    now = session(redis_retry_s=1)
    yield from _guarded("redis", _redis(now))
    yield from _guarded("bucket", _bucket(now))
    yield from _guarded("workers", _workers(now))
    yield from _guarded("webhooks", _webhooks(now))
    if importlib.util.find_spec("torch"):
        yield from _guarded("device", _device())


def _guarded(what: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """The findings of a check; an error that it raises is one of them."""
    try:
        yield from findings
    except (SmallcatError, OSError) as error:
        yield Finding(what, False, str(error))


def _redis(now: Session) -> Iterator[Finding]:
    from worker.state.redis_client import check

    with now.queue_errors():
        check(now.settings.redis_url)
        info = now.redis.info()
    where = hidden(now.settings.redis_url)
    yield Finding(
        "redis", True, f"{where} answers, version {info.get('valkey_version', info['redis_version'])}"
    )
    yield from _replication(info, now.settings.wait_replicas)
    policy = info.get("maxmemory_policy", "noeviction")
    yield Finding(
        "redis",
        policy == "noeviction",
        "keeps what it holds when it is full (noeviction)"
        if policy == "noeviction"
        else f"evicts jobs when it is full ({policy}): CONFIG SET maxmemory-policy noeviction",
    )
    yield _fullness(info)
    durable = info.get("aof_enabled") in (1, "1")
    yield Finding(
        "redis",
        True,
        "keeps an append-only file: jobs survive its death"
        if durable
        else "keeps no append-only file: jobs are lost if it dies. For production: CONFIG SET appendonly yes",
        is_note=not durable,
    )
    yield from _record_size(now)


def _record_size(now: Session) -> Iterator[Finding]:
    """Whether Redis keeps records in little memory and finds held messages at once.

    Nothing where this user may not ask.
    """
    try:
        with now.queue_errors():
            longest, most = (
                str(now.redis.config_get(name).get(name, "")) for name, _ in (_LONGEST_VALUE, _MOST_FIELDS)
            )
    except QueueError:
        return
    if not (longest.isdigit() and most.isdigit()):
        return
    if int(longest) < int(_LONGEST_VALUE[1]):
        words = " ".join((*_LONGEST_VALUE, *_MOST_FIELDS))
        text = f"records of jobs take twice the memory that they need: CONFIG SET {words}"
        yield Finding("redis", True, text, is_note=True)
    elif int(most) > _MANY_FIELDS:
        text = f"looks through the messages that workers hold one by one: CONFIG SET {' '.join(_MOST_FIELDS)}"
        yield Finding("redis", True, text, is_note=True)


def _fullness(info: Mapping[str, object]) -> Finding:
    """How much of its memory is in use."""
    if (share := fullness(info)) is None:
        text = "has no maxmemory: CONFIG SET maxmemory to less than the machine has, or its kernel may end it"
        return Finding("redis", True, text, is_note=True)
    text = f"uses {share:.0%} of its maxmemory"
    if share >= _NEARLY_FULL:
        text += ": it refuses jobs when it is full. Start workers, which make room, or raise maxmemory"
    return Finding("redis", share < _NEARLY_FULL, text)


def _replication(info: Mapping[str, object], wanted: int) -> Iterator[Finding]:
    """Whether it takes writes, and has the replicas that submissions wait for."""
    if info.get("role") == "slave":
        yield Finding("redis", False, "is a replica, which takes no jobs: use the primary's address")
    elif wanted:
        replicas = int(str(info.get("connected_slaves", 0)))
        text = f"{replicas} replicas follow it, submissions wait for {wanted} (SMALLCAT_WAIT_REPLICAS)"
        if replicas < wanted:
            text += ": start more, or lower the setting"
        elif replicas > wanted:
            text += f". A failover may choose one that lacks a job: {replicas} would exclude that"
        yield Finding("redis", replicas >= wanted, text)


def _webhooks(now: Session) -> Iterator[Finding]:
    """Whether somebody sends what webhooks are to be told. Nothing where that cannot be seen."""
    from worker.state.notifications import Notifications

    book = Notifications(now.redis)
    try:
        with now.queue_errors():
            untaken, failed = book.untaken(), len(book.failed())
    except QueueError:
        return
    if untaken > _UNTAKEN:
        waits = counted(untaken, "notification waits", "notifications wait")
        text = f"{waits} for a sender: start one with `smallcat webhooks run`"
        yield Finding("webhooks", False, text)
    if failed:
        text = f"{counted(failed, 'notification')} could not be delivered: `smallcat webhooks list` says why"
        yield Finding("webhooks", False, text)


def _bucket(now: Session) -> Iterator[Finding]:
    if not now.settings.s3_bucket and not importlib.util.find_spec("torch"):
        needs = "workers need it, and here --download and jobs whose record expired"
        yield Finding("bucket", True, f"S3_BUCKET is not set, which is enough to submit and fetch: {needs}")
        return
    bucket = now.bucket_named(now.settings.s3_bucket)
    links: list[Finding] = []
    try:
        lacks = bucket.check(lambda uri: links.append(_link(bucket.url(uri, expires_s=60))))
    except PermanentStorageError as error:
        # A machine with torch may be meant for a worker. Who only submits and fetches does not write.
        if importlib.util.find_spec("torch") or not _can_read(bucket):
            raise
        yield Finding("bucket", True, f"{bucket.root} can be read, not written, which workers need: {error}")
        return
    yield Finding("bucket", True, f"{bucket.root} can be written and read")
    yield from (Finding("bucket", True, each) for each in lacks)
    yield from links


def _can_read(bucket: Bucket) -> bool:
    try:
        # S3 says that an object is missing only to those who may list or read; others get a refusal.
        bucket.record(f"doctor-{secrets.token_hex(8)}")
    except StorageError:
        return False
    return True


def _link(link: str) -> Finding:
    """Whether a presigned link to a test object opens."""
    try:
        with urllib.request.urlopen(link, timeout=10) as answer:  # noqa: S310 - our own presigned http(s) link
            ok = answer.read() == b"smallcat"
    except OSError as error:
        host = urllib.parse.urlsplit(link).netloc
        remedy = "check that this host is reached from here, and AWS_REGION and SMALLCAT_S3_ADDRESSING"
        return Finding("bucket", False, f"a presigned link to {host} does not open ({error}): {remedy}")
    if not ok:
        return Finding("bucket", False, "a presigned link gives other bytes: check for a proxy")
    return Finding("bucket", True, "presigned links open")


def _parked(found: Mapping[tuple[str, int], int], live: Sequence[WorkerInfo]) -> Iterator[Finding]:
    """Whether a live worker reads the messages that older ones have put aside."""
    for (queue, version), count in found.items():
        waits = counted(count, f"message of version {version} waits", f"messages of version {version} wait")
        text = f"{waits} for {queue}"
        if (reads := version_read(groups_of(live), queue)) >= version:
            yield Finding("queues", True, f"{text}; a live worker reads them")
        else:
            of = f"the live workers read up to version {reads}" if reads else "no live worker serves it"
            yield Finding("queues", False, f"{text}, and {of}: upgrade one, which then takes them")


def _workers(now: Session) -> Iterator[Finding]:
    with now.queue_errors():
        live, waiting, waiting_for_newer = now.fleet.workers(), now.fleet.waiting(), parked(now.redis)
        for_others = chained(now.redis)
    served = {queue for worker in live for queue in queues_of(worker.served)}
    if not live:
        yield Finding("workers", False, "none is alive: start one with `celery -A worker worker`")
    for worker in live:
        kind = ", made for inpainting" if worker.served.inpainting else ""
        what = (
            f"{worker.served.name} at {worker.served.revision}{kind}, {worker.device}, attention "
            f"{worker.attention}"
        )
        retires = "; it retires: new jobs mean other workers" if worker.retiring else ""
        yield Finding("workers", True, f"{worker.name} serves {what}, up to {worker.max_rows} rows{retires}")
        if worker.paused:
            yield Finding("workers", False, f"{worker.name} takes no jobs at present: {worker.paused}")
    yield from _files(now, live)
    versions: dict[tuple[str, str], list[str]] = defaultdict(list)
    for worker in live:
        for package, version in worker.versions.items():
            versions[package, version].append(worker.name)
    for package in sorted({package for package, _ in versions}):
        found = {version: names for (name, version), names in versions.items() if name == package}
        if len(found) > 1:
            shown = "; ".join(f"{version} on {', '.join(names)}" for version, names in found.items())
            yield Finding("workers", False, f"run different versions of {package}: {shown}")
    if for_others:
        waits = counted(for_others, "job waits", "jobs wait")
        yield Finding("queues", True, f"{waits} for the pictures of other jobs")
    yield from _parked(waiting_for_newer, live)
    for queue, count in waiting.items():
        if count and queue not in served:
            yield _unserved(now, queue, count)
        elif count:
            yield Finding("queues", True, f"{counted(count, 'job waits', 'jobs wait')} in {queue}")


def _files(now: Session, live: Sequence[WorkerInfo]) -> Iterator[Finding]:
    """What the workers offer beside their models, and what is wrong with any file."""
    with now.queue_errors():
        indexes = {worker.files: now.fleet.indexes.get(worker.files) for worker in live if worker.files}
    for index in indexes.values():
        good: dict[str, list[FileEntry]] = defaultdict(list)
        for entry in index.files:
            if not entry.problem:
                good[entry.kind].append(entry)
        for kind, entries in good.items():
            for entry in entries[:_FILES]:
                fits = entry.architecture or "what it fits is not known"
                text = f"{entry.name}: {fits}, {entry.size:,} bytes, AutoV2 {entry.auto_v2}"
                yield Finding("files", True, f"{called(kind)} {text}")
            if len(entries) > _FILES:
                more = f"and {len(entries) - _FILES:,} more {called(kind)} files that can be used"
                yield Finding("files", True, more)
        for entry in index.files:
            if entry.problem:
                yield Finding(
                    "files", False, f"{called(entry.kind)} {entry.name} cannot be used: {entry.problem}"
                )
    by_model: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for worker in live:
        by_model[worker.served.name][worker.files].append(worker.name)
    for model, found in by_model.items():
        if len(found) > 1:
            shown = "; ".join(", ".join(names) for names in found.values())
            text = f"the workers of {model} offer different files ({shown}): give them the same ones"
            yield Finding("files", False, text)


def _unserved(now: Session, queue: str, count: int) -> Finding:
    """Whether anybody wants what waits in a queue that no live worker serves."""
    with now.queue_errors():
        waiting = waiting_in(now.redis, queue)
    at = "" if waiting.revision.startswith(OPEN_REVISION) else f" at {plain(waiting.revision)}"
    of = f"the model {plain(waiting.model)}{at}" if waiting.model else queue
    if not waiting.wanted and waiting.messages >= count:
        waits = counted(count, "message of a job that is over waits", "messages of jobs that are over wait")
        text = f"{waits} for {of}: its next worker drops them"
        return Finding("queues", True, text)
    left = count - (waiting.messages - waiting.wanted)
    waits = counted(left, "job waits", "jobs wait")
    return Finding("queues", False, f"{waits} for {of}, which no live worker serves: start one that does")


def _device() -> Iterator[Finding]:
    """What a worker would run on here, by the worker's own choice."""
    from worker.device.attention import probe
    from worker.model.placement import choose_device

    device, reason = choose_device("auto")
    yield Finding("device", True, f"{device} ({reason})")
    for backend, problem in probe(device).items():
        yield Finding("attention", True, f"{backend}: {problem or 'works'}")
