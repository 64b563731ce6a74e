"""What docs/recovery.md has an operator do when something broke, with the page's own commands.

A failover of Redis is in tests/faults/test_sentinel.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from deploy.embedded.servers import S3Process, valkey_server
from deploy.embedded.stack import BUCKET, Stack
from producer import JobHandle, submit_job
from producer.cli.failed import parked
from tests.faults import oracle, pages
from tests.faults.harness import ROOT, Ground, slots, wait_until
from tests.faults.test_security import arguments, envelope, push
from worker.contract.errors import QueueError
from worker.contract.job import FORMAT_VERSION
from worker.contract.message import payload_of

#: Real processes, and servers that lose what they had.
pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]

PAGE = "recovery.md"
#: Lines of the prompt file that is fed while the backup is made.
LINES = 600
#: What those get who submit jobs to a full Redis.
FULL = r"is full .*: wait for workers to drain it, or raise its maxmemory"


@pytest.fixture(autouse=True)
def redis_cli() -> None:
    if shutil.which("redis-cli") is None:
        pytest.skip("needs redis-cli, as Debian's redis-tools has it")


def environment_of(ground: Ground) -> dict[str, str]:
    """That of an operator: `ADMIN` is Redis' address with all rights, as redis-cli reads it."""
    url = f"redis://default:{ground.stack.valkey.password}@127.0.0.1:{ground.stack.valkey.port}/0"
    return {**ground.stack.environment, "ADMIN": url, "SMALLCAT_SUBMIT_TIMEOUT_S": "1"}


def prompt_file(path: Path, lines: int, verbs: str = "sleep:0.1") -> Path:
    """A prompt file whose jobs no other file has."""
    rows = [f"{path.stem}-{line} {verbs},{line}" for line in range(lines)]
    path.write_text("\n".join(["prompt,seed", *rows, ""]))
    return path


def ingest(ground: Ground, file: str, *words: str) -> subprocess.Popen[str]:
    """Feed a prompt file that lies in the ground's folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "producer", "ingest", file, *words],
        cwd=ground.folder,
        env={**ground.stack.environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def manifest_of(path: Path) -> list[dict[str, object]]:
    """The lines of a manifest, which are all done."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["state"] for row in rows} == {"done"}
    return rows


def progress(ground: Ground, jobs: int) -> None:
    left = ground.journal.total("leave")
    wait_until("progress", lambda: ground.journal.total("leave") >= left + jobs, 60)


def restore(ground: Ground, commands: str) -> None:
    """What the page says, in the place of Debian's folders and server."""
    valkey = ground.stack.valkey
    shutil.rmtree(valkey.folder / "appendonlydir")
    places = {
        "/var/lib/redis/dump.rdb": str(valkey.folder / "dump.rdb"),
        "redis-server": str(valkey_server()),
        "/etc/redis/redis.conf": str(valkey.folder / "valkey.conf"),
    }
    pages.run(commands, environment_of(ground), ground.folder, places)
    valkey.start()


def all_are_there(ground: Ground, ids: Iterable[str]) -> None:
    """Each job has its own two objects in the bucket, which were put once."""
    for job_id in ids:
        folder = ground.folder_of(job_id)
        assert sorted(path.name for path in folder.glob(f"{job_id}*")) == [f"{job_id}.json", f"{job_id}.png"]
        oracle.is_its_own(ground, job_id)
    puts = ground.journal.count("put")
    assert {puts[job_id] for job_id in ids} == {1}


def test_an_old_backup_of_redis_is_restored_under_running_workers(ground: Ground) -> None:
    """No picture that is in the bucket is rendered again, and what Redis has lost is given again."""
    workers = [ground.worker(rows=8, step_s=0.02) for _ in range(2)]
    with ground.redis as client:
        client.config_set("repl-diskless-sync-delay", 0)  # Else the backup waits for 5 s.
    prompt_file(ground.folder / "prompts.csv", LINES)
    prompt_file(ground.folder / "orders.csv", 30)
    before = ground.submit(6)
    feeder = ingest(ground, "prompts.csv", "--max-queued", "20")
    with ground.holding() as held:
        begun = ground.submit(3, held)
        ground.journal.wait_for("start", begun)
        progress(ground, 20)
        pages.run(pages.block(PAGE, 'redis-cli -u "$ADMIN" --rdb'), environment_of(ground), ground.folder)
        progress(ground, 20)
    since = ground.submit(5)
    assert ingest(ground, "orders.csv").wait(60) == 0
    ground.journal.wait_for("leave", since)
    # Redis dies with jobs that workers have, and others that wait, all of them submitted since.
    with ground.holding() as held:
        running = ground.submit(3, held)
        ground.journal.wait_for("start", running)
        waiting = [ground.job(held) for _ in range(3 * slots(8))]
        ground.ids += [submit_job(job).id for job in waiting]
        feeder.kill()
        feeder.wait()
        ground.stack.valkey.kill()
    restore(ground, pages.block(PAGE, "cp smallcat.rdb"))
    # The backup's jobs are done, and those that workers had. The bucket knows the others that were.
    wait_until("done", lambda: ground.states([*before, *begun, *running]).keys() == {"done"}, 60)
    oracle.settled(ground)
    assert [JobHandle(each).record().state for each in since] == 5 * ["done"]
    lost = [job for job in waiting if not ground.journal.count("start")[job.id]]
    assert lost
    assert [submit_job(job).id for job in waiting] == [job.id for job in waiting]
    (ground.folder / "orders.csv").unlink()
    (ground.folder / "orders.csv.manifest.jsonl").rename(ground.folder / "orders.manifest.jsonl")
    again = pages.block(PAGE, "smallcat doctor\nsmallcat ingest prompts.csv ")
    pages.run(again, environment_of(ground), ground.folder)
    wait_until("done", lambda: ground.states(job.id for job in waiting).keys() == {"done"}, 60)
    rows = manifest_of(ground.folder / "prompts.csv.manifest.jsonl")
    orders = manifest_of(ground.folder / "orders.manifest.jsonl")
    repeated = manifest_of(ground.folder / "orders.manifest.jsonl.manifest.jsonl")
    assert [row["id"] for row in repeated] == [row["id"] for row in orders]
    assert (len(rows), len(orders)) == (LINES, 30)
    all_are_there(ground, [*ground.ids, *(str(row["id"]) for row in (*rows, *orders))])
    assert all(worker.running for worker in workers)
    count = len(ground.ids) + len(rows) + len(orders)
    print(f"{count} jobs, {len(lost)} of them lost with Redis and given again: 0 lost, none rendered twice")


def test_the_bucket_is_moved_with_jobs_in_flight(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """To another server and another name. Pictures of before answer, and jobs that waited are put there."""
    old = ground.stack.s3
    new = S3Process(ground.stack.home, "s3-new")
    new.create_bucket("pictures")
    new.start()
    try:
        worker = ground.worker()
        ids = ground.submit(10)
        oracle.settle(ground, ids)
        remotes = {
            f"RCLONE_CONFIG_{name}_{key}": value
            for name, server in (("OLD", old), ("NEW", new))
            for key, value in {
                "TYPE": "s3",
                "PROVIDER": "Other",
                "ENDPOINT": server.endpoint,
                "ACCESS_KEY_ID": server.access_key,
                "SECRET_ACCESS_KEY": server.secret_key,
            }.items()
        }
        environment = environment_of(ground) | remotes | {"RCLONE_CONFIG": ""}
        names = {"OLD": BUCKET, "NEW": "pictures"}
        copy = pages.block(PAGE, "rclone copy old:OLD new:NEW     #")
        pages.run(copy, environment, ground.folder, names)
        more = ground.submit(5)
        oracle.settle(ground, more)
        with ground.holding() as held:
            waiting = ground.submit(slots(4) + 5, held)
            ground.journal.wait_for("start", waiting[:4])
            worker.stop()
        pages.run(pages.block(PAGE, "rclone copy old:OLD new:NEW\n"), environment, ground.folder, names)
        old.stop()
        for name, value in new.environment("pictures").items():
            monkeypatch.setenv(name, value)
        ground.worker(settings=new.environment("pictures"))
        wait_until("done", lambda: ground.states(waiting) == {"done": len(waiting)}, 60)
        for job_id in (*ids, *more, *waiting):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                link = JobHandle(job_id).result().url()
            assert link.startswith(f"{new.endpoint}/pictures/images/")
            with urllib.request.urlopen(link, timeout=10) as answer:  # noqa: S310 - our own server
                assert answer.read(4) == b"\x89PNG"
        with ground.redis as client:
            client.delete(*(f"smallcat:job:{job_id}" for job_id in ids))
        with pytest.warns(UserWarning, match=r"says s3://smallcat/.*; s3://pictures/.* is used"):
            assert JobHandle(ids[0]).result().image().size == (64, 64)
        record = JobHandle(ids[1]).record()
        assert submit_job(record.job).result(30).cached
        assert max(ground.journal.count("put").values()) == 1
    finally:
        new.kill()


def test_a_region_is_lost_and_its_prompt_file_is_given_again_in_another_one(
    ground: Ground, new_stack: Callable[..., Stack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis there is empty, and the last objects were not replicated: of one job, its picture alone."""
    ground.worker(rows=8)
    prompt_file(ground.folder / "prompts.csv", 100)
    assert ingest(ground, "prompts.csv").wait(60) == 0
    rows = manifest_of(ground.folder / "prompts.csv.manifest.jsonl")
    (tmp_path / "there").mkdir()
    there = Ground(new_stack(workers=0), tmp_path / "there")
    shutil.copytree(ground.images, there.images)
    missing = [str(row["id"]) for row in rows[-10:]]
    for job_id in missing:
        for path in there.folder_of(job_id).glob(f"{job_id}*"):
            if (job_id, path.suffix) != (missing[0], ".json"):
                path.unlink()
    ground.stack.kill_now()
    there.use(monkeypatch)
    shutil.copy(ground.folder / "prompts.csv.manifest.jsonl", there.folder)
    there.worker(rows=8)
    again = pages.block(PAGE, "smallcat doctor\nsmallcat ingest prompts.csv.manifest.jsonl\n")
    pages.run(again, environment_of(there), there.folder)
    found = manifest_of(there.folder / "prompts.csv.manifest.jsonl.manifest.jsonl")
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert sorted(there.journal.count("start")) == sorted(missing)
    assert [row["cached"] for row in found] == 90 * [True] + 10 * [False]
    for row in found:
        oracle.is_its_own(there, str(row["id"]))


def test_a_poisoned_queue_is_seen_and_cleaned_by_the_page_s_commands(ground: Ground) -> None:
    worker = ground.worker(settings={"SMALLCAT_MAX_ATTEMPTS": "2"})
    ground.supervise(worker)
    good = ground.submit(5)
    [killer] = ground.submit(1, "kill:")
    ground.ids.remove(killer)
    job = ground.job()
    newer = arguments({**payload_of(job), "version": FORMAT_VERSION + 1})
    push(ground, b"{damaged", envelope(newer, id=f"{job.id}-newer"))
    wait_until("it has failed", lambda: ground.states([killer]) == {"failed": 1}, 90)
    wait_until("both are set aside", lambda: ground.messages() == 0, 60)
    oracle.settle(ground, good)

    listed, ended = (
        pages.block(PAGE, beginning) for beginning in ("smallcat failed list  ", "smallcat failed show ID")
    )

    def run(commands: str) -> str:
        return pages.run(commands, environment_of(ground), ground.folder)

    found = run(listed)
    assert found.count(killer) == 2
    assert found.count("PoisonJobError") == 2
    assert "{damaged" in found
    assert f"version {FORMAT_VERSION + 1}" in found
    show, retry, drop, drop_parked = (line.replace("ID", killer) for line in ended.splitlines())
    assert "its worker died" in run(show)
    run(retry)
    wait_until("it has failed again", lambda: ground.states([killer]) == {"failed": 1}, 90)
    run(drop)
    assert ground.states([killer]) == {None: 1}
    assert parked()
    run(drop_parked)
    assert not parked()


def submit_for_ever(ground: Ground) -> None:
    while True:
        ground.submit(1)


def test_a_redis_that_is_full_of_jobs_is_drained_by_workers_that_start_and_end_meanwhile(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own messages fill a small maxmemory. Nobody loses a job or an attempt, and no picture is lost."""
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "1")
    once = {"SMALLCAT_MAX_ATTEMPTS": "1"}
    first = ground.worker(settings=once)
    prompt_file(ground.folder / "prompts.csv", 300, "sleep:0")
    with ground.redis as client, ground.holding() as held:
        ids = ground.submit(slots(4), held)
        ground.journal.wait_for("start", ids)
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 400_000)
        with pytest.raises(QueueError, match=FULL):
            submit_for_ever(ground)
        # What its connections take goes up and down: none of it is to make room.
        client.config_set("maxmemory", client.info("memory")["used_memory"] - 200_000)
        waiting = ground.queued()
        assert waiting > 100
        operator = environment_of(ground)
        for command in ("smallcat submit 'a cat'", "smallcat ingest prompts.csv"):
            said = pages.run(command, operator, ground.folder, code=3)
            assert re.search(FULL, said)
            assert "Traceback" not in said
        assert ground.queued() == waiting
        doctor, *more = pages.block(PAGE, "smallcat doctor  ").splitlines()
        assert re.search(
            r"uses (9\d|1\d\d)% of its maxmemory", pages.run(doctor, operator, ground.folder, code=3)
        )
        # One that starts takes jobs, also where not a byte is left; one that ends gives its jobs back.
        client.config_set("maxmemory", 1)
        second = ground.worker(settings=once)
        first.stop()
    with ground.redis as client:
        oracle.settle(ground, timeout_s=120)
        assert ground.attempts(ground.ids) == {"1": len(ground.ids)}
        assert second.running
        pages.run("\n".join(more), operator, ground.folder)
        assert client.config_get("maxmemory") == {"maxmemory": str(2 * 2**30)}
    assert ingest(ground, "prompts.csv").wait(60) == 0
    assert len(manifest_of(ground.folder / "prompts.csv.manifest.jsonl")) == 300
