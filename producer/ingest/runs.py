"""The runs of one Redis, for operators: list them, show one, cancel one.

A run of a million jobs is one line: its counts are read from its own keys, never from its jobs.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from producer.ingest.run_state import feeder_of
from worker.broker.transport import UNACKED
from worker.contract.errors import UnknownJobError
from worker.contract.message import RunMark, run_mark_in
from worker.state import run_scripts
from worker.state.keys import RUNS, job_key, run_key
from worker.state.records import Records
from worker.state.shared_scripts import SharedScript

if TYPE_CHECKING:
    from redis.client import Redis


#: What is read of a run's hash.
_FIELDS: Final = ("created", "files", "fed", "ended", "total", "waiting", "rejected", "cancelled", "manifest")


@dataclass(frozen=True)
class RunInfo:
    """A run as a list shows it."""

    #: Its name: the hash of its files and options, or that of `--run`.
    run: str
    #: `feeding`; `waiting` (no process feeds it, all is sent); `stopped` (nor is all sent); `finished`;
    #: `cancelled`.
    state: str
    #: Unix seconds when it was begun.
    created: int
    #: Names of its files, the first ten.
    files: tuple[str, ...]
    #: Jobs sent, and jobs in all; None until the end of the files was read.
    sent: int
    total: int | None
    #: Jobs that are done, that failed for good, and that were cancelled.
    done: int
    failed: int
    cancelled: int
    #: Jobs sent that wait for the pictures of other jobs: no queue has them yet.
    waiting: int
    #: Lines rejected.
    rejected: int
    #: The process that feeds it, such as `Process 17 on host`; None where none does.
    feeder: str | None
    #: Its manifest; None until it is written.
    manifest: str | None

    @property
    def ended(self) -> int:
        """Jobs that are done, failed or cancelled."""
        return self.done + self.failed + self.cancelled


def list_runs(redis: Redis) -> list[RunInfo]:
    """All runs that Redis remembers, at most 1,000, the one begun or resumed last first."""
    names = [str(name) for name in redis.zrevrange(RUNS, 0, -1)]
    found = _read(redis, names)
    if gone := [name for name in names if name not in found]:
        redis.zrem(RUNS, *gone)
    return list(found.values())


def find_run(redis: Redis, run: str) -> RunInfo:
    """The run of that name. Raises `UnknownJobError`."""
    if (found := _read(redis, [run]).get(run)) is None:
        raise UnknownJobError(f"There is no run {run}: see `smallcat runs`. A run expires some days later.")
    return found


def cancel_run(redis: Redis, records: Records, run: str) -> RunInfo:
    """Cancel a run: its feeder sends no more, workers drop its queued messages, what runs is asked to stop.

    A job that somebody else wants as well goes on. A run that is over stays as it is. Returns the run as it
    was before. Raises `UnknownJobError`.
    """
    info = find_run(redis, run)
    if info.state in ("finished", "cancelled"):
        return info
    SharedScript(redis, run_scripts.CANCEL_RUN)(keys=[run_key(run), f"{run_key(run)}:room"])
    # Whatever a worker claims from now on is dropped by the script that claims it. Read after that: what was
    # claimed before is held by a worker.
    held = set()
    for text in cast("list[str]", redis.hvals(UNACKED)):
        message = json.loads(text)[0]
        mark = run_mark_in(message)
        if mark is not None and mark.run == run and (job_id := _job_id_in(message)):
            held.add(job_id)
    with redis.pipeline(transaction=False) as pipe:
        for job_id in held:
            pipe.hmget(job_key(job_id), "state", "bulk", "runs")
        for job_id, (state, bulk, marks) in zip(held, pipe.execute(), strict=True):
            if state == "running" and bulk and {RunMark.parse(each).run for each in marks.split()} == {run}:
                records.cancel(job_id)
    return info


def _job_id_in(message: object) -> str:
    from worker.contract.message import payload_in

    payload = payload_in(message)
    return str(payload.get("id", "")) if isinstance(payload, dict) else ""


def _read(redis: Redis, names: list[str]) -> dict[str, RunInfo]:
    with redis.pipeline(transaction=False) as pipe:
        for name in names:
            key = run_key(name)
            pipe.hmget(key, *_FIELDS)
            pipe.bitcount(f"{key}:done")
            pipe.bitcount(f"{key}:failed")
            pipe.bitcount(f"{key}:cancelled")
            pipe.get(f"{key}:feeder")
        answers = pipe.execute(raise_on_error=False)
    found = {}
    for number, name in enumerate(names):
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            # What is of another type, or no number, some other program wrote: it is no run.
            fields, done, failed, given_up, feeder = answers[5 * number : 5 * number + 5]
            info = _info(name, fields, (int(done), int(failed), int(given_up)), feeder)
            if info is not None:
                found[name] = info
    return found


def _info(
    name: str, fields: list[str | None], bits: tuple[int, int, int], feeder: str | None
) -> RunInfo | None:
    """A run by what Redis has of it; None where there is none. Raises `ValueError` and the like.

    `bits`: how many jobs have the bit of each bitmap: done, failed, cancelled.
    """
    done, failed, given_up = bits
    created, files, fed, ended, total, waiting, rejected, cancelled, manifest = fields
    if fed is None:
        return None
    is_over = total is not None and int(ended or 0) >= int(total)
    return RunInfo(
        run=name,
        state=_state(is_over, cancelled is not None, feeder is not None, total is not None),
        created=int(created or 0),
        files=tuple(map(str, json.loads(files))) if files else (),
        sent=int(fed),
        total=None if total is None else int(total),
        done=done,
        failed=failed - given_up,
        cancelled=given_up,
        waiting=int(waiting or 0),
        rejected=int(rejected or 0),
        feeder=None if feeder is None else feeder_of(feeder),
        manifest=manifest.rsplit(" ", 2)[0] if manifest else None,
    )


def _state(is_over: bool, is_cancelled: bool, is_fed: bool, is_sent: bool) -> str:
    if is_cancelled:
        return "cancelled"
    if is_over:
        return "finished"
    if is_fed:
        return "feeding"
    return "waiting" if is_sent else "stopped"
