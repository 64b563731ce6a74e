"""What docs/upgrades.md has an operator change while jobs are in flight: the model, and keys.

Upgrades of smallcat itself are in tests/faults/test_upgrade.py.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from producer import submit_job
from tests.faults import oracle, pages
from tests.faults.harness import ROOT, Ground, wait_until
from worker.contract.job import Job

#: Real processes, and servers that are started again.
pytestmark = [pytest.mark.services, pytest.mark.timeout(240)]

PAGE = "upgrades.md"
OLD, NEW = "f" * 40, "e" * 40
#: Jobs a second of the producer, and lines of a prompt file that is fed meanwhile.
RATE, LINES = 20.0, 300


def of_any_revision(submitted: dict[str, str], job: Job) -> str:
    """Submit the job as somebody does who names neither model nor revision; note what it meant."""
    handle = submit_job(job.prompt, seed=job.seed)
    submitted[handle.id] = handle.record().job.revision
    return handle.id


def figure(ground: Ground, name: str, revision: str) -> float:
    """A figure of `smallcat metrics`."""
    shown = pages.run("smallcat metrics", ground.stack.environment, ground.folder)
    (line,) = [
        each
        for each in shown.splitlines()
        if each.startswith(f'{name}{{model="fake",revision="{revision[:16]}"}}')
    ]
    return float(line.split()[-1])


def test_another_revision_takes_over_while_jobs_are_in_flight(ground: Ground) -> None:
    """The old one's workers render what is queued for it, a prompt file's run included, and then end."""
    old = ground.worker(rows=4, step_s=0.02, revision=OLD)
    pids, meant = {OLD: {old.pid}, NEW: set[int]()}, dict[str, str]()
    file = ground.folder / "cats.csv"
    file.write_text("prompt,seed\n" + "".join(f"run-{line} sleep:0.2,{line}\n" for line in range(LINES)))

    def progress(jobs: int = 30) -> None:
        left = ground.journal.total("leave")
        wait_until("progress", lambda: ground.journal.total("leave") >= left + jobs, 60)

    with (
        ThreadPoolExecutor() as pool,
        ground.feeding(RATE, submit=lambda job: of_any_revision(meant, job), tenants=("",)) as feeder,
    ):
        environment = {**ground.stack.environment, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "producer", "ingest", str(file), "--max-queued", "20"]
        run = pool.submit(subprocess.run, command, env=environment, capture_output=True, text=True)
        progress()
        new = ground.worker(rows=4, step_s=0.02, revision=NEW)
        pids[NEW].add(new.pid)
        progress()
        before = len(feeder.ids)
        old.stop()
        retiring = ground.worker(rows=4, step_s=0.02, revision=OLD, settings={"SMALLCAT_RETIRING": "1"})
        pids[OLD].add(retiring.pid)
        wait_until("more jobs", lambda: len(feeder.ids) >= before + 40)
        # Although it was started last.
        assert {meant[job] for job in feeder.ids[before:]} == {NEW}
        assert "; it retires" in pages.run("smallcat doctor", environment, ground.folder)
        fed = run.result()
        assert fed.returncode == 0, fed.stderr
        wait_until(
            "the old revision's queue is empty",
            lambda: figure(ground, "smallcat_queue_jobs_waiting", OLD) == 0,
            60,
        )
        wait_until(
            "and nothing of it in flight",
            lambda: figure(ground, "smallcat_queue_jobs_in_flight", OLD) == 0,
            60,
        )
        retiring.stop()
        progress()
    wait_until("all done", lambda: ground.states(feeder.ids) == {"done": len(feeder.ids)}, 60)
    rows = [json.loads(line) for line in Path(f"{file}.manifest.jsonl").read_text().splitlines()]
    assert [(row["revision"], row["state"]) for row in rows] == LINES * [(OLD, "done")]
    meant |= {row["id"]: OLD for row in rows}
    by = {event.job: event.pid for event in ground.journal.events() if event.what == "put"}
    assert all(by[job] in pids[revision] for job, revision in meant.items())
    assert max(ground.journal.count("put").values()) == 1
    of_old = sum(revision == OLD for revision in meant.values())
    print(f"{len(feeder.ids)} jobs and {LINES} lines, {of_old} of the old revision: 0 lost")


def user_of(ground: Ground, name: str, password: str) -> str:
    """The address of the stack's Redis with that user."""
    return f"redis://{name}:{password}@127.0.0.1:{ground.stack.valkey.port}/0"


def test_the_passwords_of_redis_are_rotated_while_jobs_are_in_flight(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are valid for a while; when the old one is dropped, and all connections are cut, jobs go on."""
    with ground.redis as client:
        for name in ("worker", "producer"):
            rule = (ROOT / f"deploy/redis-{name}.acl").read_text().replace(">PASSWORD", ">old")
            client.execute_command("ACL", "SETUSER", *rule.split()[1:])
        administrator = user_of(ground, "default", ground.stack.valkey.password)
        environment = {**ground.stack.environment, "ADMIN": administrator}
        before = {"REDIS_URL": user_of(ground, "worker", "old")}
        workers = [ground.worker(settings=before) for _ in range(2)]
        monkeypatch.setenv("REDIS_URL", user_of(ground, "producer", "old"))
        with ground.holding() as hold, ground.feeding(RATE) as feeder:
            held = ground.submit(2, hold)
            ground.journal.wait_for("start", held)
            pages.run(
                pages.block(PAGE, 'redis-cli -u "$ADMIN" ACL SETUSER worker \'>'), environment, ground.folder
            )
            monkeypatch.setenv("REDIS_URL", user_of(ground, "producer", "NEW"))
            for number, worker in enumerate(workers):
                worker.stop()
                settings = {"REDIS_URL": user_of(ground, "worker", "NEW")}
                workers[number] = ground.worker(settings=settings)
            pages.run(
                pages.block(PAGE, 'redis-cli -u "$ADMIN" ACL SETUSER worker \'<'),
                environment,
                ground.folder,
                {"OLD": "old"},
            )
            ground.cut_connections()
            done = ground.journal.total("leave")
            wait_until("progress", lambda: ground.journal.total("leave") > done + 40, 60)
        oracle.settle(ground)
        assert ground.attempts(ground.ids) == {"1": len(ground.ids)}
        assert feeder.refused == 0
        for name in ("worker", "producer"):
            with pytest.raises(redis.AuthenticationError):
                redis.Redis.from_url(user_of(ground, name, "old")).ping()


def test_the_jobs_of_a_worker_that_still_has_the_old_password_go_on_with_another(ground: Ground) -> None:
    """Its connections were cut: it says why it cannot come back, and its leases run out."""

    def change(*rules: str) -> None:
        with ground.redis as client:
            client.execute_command("ACL", "SETUSER", "worker", *rules)

    change("on", ">old", "~*", "&*", "+@all")
    forgotten = ground.worker(settings={"REDIS_URL": user_of(ground, "worker", "old")})
    with ground.holding() as hold:
        ids = ground.submit(2, hold)
        ground.journal.wait_for("start", ids)
        change(">new", "<old")
        ground.worker(settings={"REDIS_URL": user_of(ground, "worker", "new")})
        ground.cut_connections()
        wait_until("both begun again", lambda: min(ground.journal.count("start").values()) == 2, 60)
    oracle.settle(ground)
    assert [line for line in forgotten.output().splitlines() if "refuses the password" in line]


def test_the_keys_of_the_bucket_are_rotated_while_jobs_are_in_flight(ground: Ground) -> None:
    """In a file, without a restart: nobody is refused, and no job goes back."""
    server, file = ground.stack.s3, ground.folder / "credentials"
    old = (server.access_key, server.secret_key)
    new = (secrets.token_hex(10), secrets.token_hex(20))

    def write(keys: tuple[str, str]) -> None:
        beside = file.with_suffix(".new")
        beside.write_text(f"[default]\naws_access_key_id = {keys[0]}\naws_secret_access_key = {keys[1]}\n")
        beside.replace(file)

    def accept(*pairs: tuple[str, str]) -> None:
        server.stop()
        both = ",".join(f'"{access},{secret}"' for access, secret in pairs)
        known = server._environment() | {"RCLONE_AUTH_KEY": both}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server, "_environment", lambda: known)
            server.start()

    write(old)
    no_keys = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SHARED_CREDENTIALS_FILE": str(file)}
    workers = [ground.worker(settings={**no_keys, "SMALLCAT_MAX_ATTEMPTS": "1"}) for _ in range(2)]
    with ground.feeding(RATE):
        for keys in ((old, new), (new,)):
            accept(*keys)
            write(new)
            done = ground.journal.total("leave")
            wait_until("progress", lambda done=done: ground.journal.total("leave") > done + 60, 60)
    found = oracle.settle(ground)
    assert found.renders_over == 0
    assert ground.attempts(ground.ids) == {"1": len(ground.ids)}
    assert not any("no others are taken" in worker.output() for worker in workers)
    print(f"{len(ground.ids)} jobs: 0 lost, none rendered again")


def test_keys_of_the_http_api_and_secrets_of_webhooks_are_rotated_as_the_page_says(ground: Ground) -> None:
    environment = {**ground.stack.environment, "SMALLCAT_WEBHOOK_SECRETS_DIR": str(ground.folder / "secrets")}
    pages.run("smallcat keys add website", environment, ground.folder)
    shown = pages.run(pages.block(PAGE, "smallcat keys rotate"), environment, ground.folder)
    assert shown.count("\nwebsite ") == 2
    assert shown.endswith("the older key website is revoked\n")
    pages.run("smallcat webhooks secret --tenant acme", environment, ground.folder)
    shown = pages.run(pages.block(PAGE, "smallcat webhooks secret"), environment, ground.folder)
    assert len(shown.splitlines()) == 2, shown
    assert shown.endswith("the older secret of the tenant acme is dropped\n")
