"""Checks the jobs after a test: an object and a done mark each, none held, no slot lost, no key left over."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from PIL import Image

from tests.faults import pictures
from tests.faults.app_names import MARKS
from tests.faults.harness import FaultWorker, Ground, slots, wait_until
from tests.faults.runner import pixel_of
from worker.contract.queues import version_of_parked
from worker.contract.record import JobRecord

#: Keys without an expiry, and whose they are.
OWNED = {
    "_kombu.binding": "kombu: the bindings of its queues",
    "faults:": "these tests",
    "smallcat:parked": "workers of a newer version",
}


@dataclass
class Account:
    """What became of the jobs."""

    #: Ids that were asked for.
    ids: set[str]
    #: Those without a done mark or without a picture.
    lost: set[str] = field(default_factory=set)
    #: Done marks beyond the first.
    marks_over: int = 0
    #: Renderings beyond the first, of jobs whose process did not die.
    renders_over: int = 0


def settle(ground: Ground, ids: Iterable[str] | None = None, timeout_s: float = 60.0) -> Account:
    """Wait until every job is done and nothing is queued or held; then account for `ids` (all of them)."""
    wanted = list(ground.ids if ids is None else ids)
    wait_until(
        f"{len(wanted)} jobs done",
        lambda: ground.states(wanted).keys() <= {"done"},
        timeout_s,
    )
    settled(ground)
    found = account(ground, wanted)
    assert not found.lost
    assert found.marks_over == 0
    keys_have_owners(ground)
    return found


def settled(ground: Ground, timeout_s: float = 30.0) -> None:
    """Wait until no message is queued or held, at one and the same moment."""
    wait_until("queues and unacked empty", lambda: ground.messages() == 0, timeout_s)


def account(ground: Ground, ids: Iterable[str]) -> Account:
    """Check every id. Raises where an object is not the one that its job makes."""
    found = Account(set(ids))
    with ground.redis as client:
        marks = {job: int(count) for job, count in client.hgetall(MARKS).items()}
    starts = ground.journal.count("start")
    for job_id in found.ids:
        folder = ground.folder_of(job_id)
        objects = sorted(path.name for path in folder.glob(f"{job_id}*"))
        if objects != [f"{job_id}.json", f"{job_id}.png"] or not marks.get(job_id):
            found.lost.add(job_id)
            continue
        is_its_own(ground, job_id)
        found.marks_over += marks[job_id] - 1
        found.renders_over += max(0, starts[job_id] - 1)
    return found


def is_its_own(ground: Ground, job_id: str) -> None:
    """The record beside the picture is the job's, and the picture is the one that its seed gives."""
    stem = ground.folder_of(job_id) / job_id
    record = JobRecord.model_validate(json.loads(stem.with_suffix(".json").read_bytes()))
    assert record.job.id == job_id
    with Image.open(stem.with_suffix(".png")) as picture:
        pictures.check(picture, record.job, pixel_of(record.job))


def keys_have_owners(ground: Ground) -> None:
    """Every key of Redis expires, or belongs to somebody."""
    with ground.redis as client:
        keys = list(client.scan_iter(count=1000))
        with client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.ttl(key)
            lasting = [key for key, ttl in zip(keys, pipe.execute(), strict=True) if ttl == -1]
    # Messages of newer versions wait for as long as it takes.
    owned = {key for key in lasting if key.startswith(tuple(OWNED)) or version_of_parked(key)}
    assert [key for key in lasting if key not in owned] == []


def no_slot_is_lost(ground: Ground, *workers: FaultWorker, rows: int = 4) -> None:
    """Each worker still takes as many jobs at once as before: no failed job keeps its slot."""
    with ground.holding() as hold:
        ids = set(ground.submit(slots(rows) * len(workers), hold))

        def taken() -> bool:
            pids = [
                event.pid for event in ground.journal.events() if event.what == "start" and event.job in ids
            ]
            return all(pids.count(worker.pid) == slots(rows) for worker in workers)

        wait_until("every slot filled", taken)
    settle(ground, ids)
