"""Feeding a run, against a real Redis; `Drain` is the worker. Whole processes: tests/integration."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from deploy.embedded.servers import ValkeyProcess
from producer.cli.ingest_display import QuietDisplay
from producer.ingest.check import refuse_bad_lines
from producer.ingest.feeder import Ingest
from producer.ingest.journal import Journal
from producer.ingest.run_state import Run
from producer.ingest.runs import find_run
from producer.ingest.submit_file import make_ingest, make_plan, make_variants
from producer.ingest.types import Options, Outcome
from tests.drain import Drain
from tests.fast_worker import SERVED, announce
from worker.contract.errors import PromptFileError, QueueError
from worker.contract.found_message import digest_of, fingerprint
from worker.contract.message import payload_in
from worker.contract.queues import PARKED, lists_of, parked_list_of, queues_of
from worker.contract.record import State

QUEUE = queues_of(SERVED)[0]


@pytest.fixture(autouse=True)
def quick(valkey: ValkeyProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", valkey.url)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("producer.ingest.feeder.POLL_EVERY_S", 0.005)
    monkeypatch.setattr("producer.ingest.feeder.QUIET_S", 0.05)
    announce(valkey.url)


@pytest.fixture
def drain(valkey: ValkeyProcess) -> Iterator[Drain]:
    drain = Drain(valkey.url, QUEUE)
    yield drain
    drain.client.close()


def ingest(text: str | None = None, *, name: str = "p.txt", **options: Any) -> Ingest:
    if text is not None:
        Path(name).write_text(text)
    how = {key: options.pop(key, default) for key, default in (("images", 1), ("sample", None))}
    variants = make_variants(
        options.pop("fields", {}), how["images"], None, options.pop("grid", {}), how["sample"], None,
        literal=False,
    )  # fmt: skip
    return make_ingest(
        make_plan([name], file_format=None, variants=variants), Options(**options), QuietDisplay()
    )


def drained(run: Ingest, drain: Drain) -> Outcome:
    """Feed `run` until it ends, while `drain` works."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.002):
            drain.all()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        return run()
    finally:
        over.set()
        worker.join()


def waiting(drain: Drain) -> int:
    return sum(drain.client.llen(name) for name in lists_of(QUEUE))  # type: ignore[misc]


def manifest(name: str = "p.txt.manifest.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def test_a_file_becomes_a_manifest_in_input_order(drain: Drain) -> None:
    outcome = drained(ingest("a cat\n# no\n\nfail it\na {red|green} dog\n", images=2), drain)
    assert (outcome.state, outcome.total, outcome.done, outcome.failed) == ("finished", 8, 6, 2)
    assert not outcome.is_clean
    lines = manifest()
    assert [line["line"] for line in lines] == [1, 1, 4, 4, 5, 5, 5, 5]
    assert [line["prompt"] for line in lines[4:]] == ["a red dog"] * 2 + ["a green dog"] * 2
    assert [line["state"] for line in lines] == ["done"] * 2 + ["failed"] * 2 + ["done"] * 4
    assert lines[2]["error"] == "It was asked to fail."
    assert lines[0]["uri"] == f"s3://nowhere/{lines[0]['id']}.png"
    assert len({line["id"] for line in lines}) == 8
    assert not Path("p.txt.manifest.jsonl.part").exists()


def test_a_finished_file_renders_nothing_again(drain: Drain, capsys: pytest.CaptureFixture[str]) -> None:
    first = drained(ingest("a cat\na dog\n"), drain)
    before = Path("p.txt.manifest.jsonl").read_bytes()
    seen = len(drain.seen)
    again = drained(ingest(), drain)
    assert (again.state, again.done, again.run) == ("finished", 2, first.run)
    assert len(drain.seen) == seen
    told = "This run is over already: its 2 jobs have ended before, and nothing is sent."
    assert capsys.readouterr().err.splitlines().count(told) == 1
    Path("p.txt.manifest.jsonl").unlink()
    drained(ingest(), drain)
    assert len(drain.seen) == seen
    assert [line["state"] for line in manifest()] == ["done", "done"]
    assert {line["id"] for line in manifest()} == {json.loads(line)["id"] for line in before.splitlines()}


def test_the_queue_stays_bounded_and_stopping_waits_for_what_was_sent(drain: Drain) -> None:
    run = ingest("".join(f"cat {n}\n" for n in range(600)), max_queued=100)
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(run()))
    thread.start()
    longest = 0
    while len(drain.seen) < 150:
        longest = max(longest, waiting(drain))
        if waiting(drain) > 50:
            found = drain.take()
            assert found is not None
            drain.end(*found)
    run.stop()
    while thread.is_alive():
        drain.all()
    [outcome] = outcomes
    assert 80 <= longest <= 100
    assert outcome.state == "stopped"
    assert outcome.done == outcome.sent < 600
    assert drained(ingest(max_queued=100), drain).done == 600
    assert sorted(number for number, _ in drain.seen) == list(range(600))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["feed", "acknowledge", "outcomes", "status"])
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_call_and_run_again_is_each_line_once(
    drain: Drain, monkeypatch: pytest.MonkeyPatch, method: str, after: bool
) -> None:
    monkeypatch.setattr("producer.ingest.feeder.WINDOW", 7)
    text = "".join(f"cat {n}\n" if n % 5 else "bad \0\n" for n in range(60))
    real: Callable[..., Any] = getattr(Run, method)
    calls = 0

    def fatal(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 4 == 0 and not after:
            raise Killed
        answer = real(*args, **named)
        if calls % 4 == 0:
            raise Killed
        return answer

    monkeypatch.setattr(Run, method, fatal)
    outcome = None
    for _ in range(200):
        run = ingest(text, max_queued=20)
        try:
            outcome = drained(run, drain)
            break
        except Killed:
            continue
        finally:
            text = None  # type: ignore[assignment] -- written once: a file that changes is another run
    assert outcome is not None
    assert calls > 4
    assert (outcome.done, outcome.rejected) == (48, 12)
    assert sorted(number for number, _ in drain.seen) == list(range(48))
    assert [line["line"] for line in manifest()] == [n + 1 for n in range(60) if n % 5]
    rejected = [json.loads(line) for line in Path("p.txt.rejected.jsonl").read_text().splitlines()]
    assert [each["line"] for each in rejected] == [n + 1 for n in range(60) if not n % 5]
    assert rejected[0]["field"] == "prompt"
    assert "U+0000" in rejected[0]["reason"]


@pytest.mark.parametrize("lost", [1, 2, 4])
def test_what_redis_forgets_of_a_run_is_sent_again(
    drain: Drain, valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """As a replica that becomes the primary: messages and cursor are those of some moments ago."""
    fed = Run.feed
    kept: dict[bytes, Any] = {}
    calls: list[int] = []

    def feed(run: Run, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            kept.update({key: raw.dump(key) for key in raw.scan_iter()})
        fed(run, *args)
        if len(calls) == 2 + lost:
            raw.flushdb()
            for key, text in kept.items():
                raw.restore(key, 600_000, text)
        elif len(calls) > 2 + lost or len(calls) < 3:
            drain.all()

    raw = redis.Redis.from_url(valkey.url)
    monkeypatch.setattr(Run, "feed", feed)
    lines = "".join(f"cat {n}\n" if n % 7 else "cat --width 3\n" for n in range(100))
    outcome = ingest(lines, max_queued=200)
    monkeypatch.setattr("producer.ingest.feeder.WINDOW", 10)
    ended = outcome()
    assert (ended.state, ended.done, ended.rejected) == ("finished", 85, 15)
    assert sorted({number for number, _ in drain.seen}) == list(range(85))
    assert [line["prompt"] for line in manifest()] == [f"cat {n}" for n in range(100) if n % 7]
    assert len(Path("p.txt.rejected.jsonl").read_text().splitlines()) == 15


def test_messages_that_are_gone_are_sent_again(drain: Drain) -> None:
    run = ingest("a cat\na dog\n", max_queued=10)
    thread = threading.Thread(target=run)
    thread.start()
    while waiting(drain) < 2:
        pass
    drain.client.delete(*lists_of(QUEUE))
    while thread.is_alive():
        drain.all()
    assert [line["state"] for line in manifest()] == ["done", "done"]


def test_jobs_that_vanish_again_and_again_are_given_up(drain: Drain) -> None:
    run = ingest("a cat\n")
    over = threading.Event()

    def purge() -> None:
        while not over.wait(0.002):
            drain.client.delete(*lists_of(QUEUE))

    thread = threading.Thread(target=purge)
    thread.start()
    try:
        with pytest.raises(QueueError, match="gone from the queue"):
            run()
    finally:
        over.set()
        thread.join()


def test_messages_that_wait_for_a_newer_worker_are_neither_lost_nor_room_for_more(
    drain: Drain, capsys: pytest.CaptureFixture[str]
) -> None:
    """As older workers park those of the next version; one of another job is gone, and is sent again."""
    run = ingest("".join(f"cat {n}\n" for n in range(30)), max_queued=10)
    thread = threading.Thread(target=run)
    thread.start()
    while waiting(drain) < 10:
        pass
    [name] = [name for name in lists_of(QUEUE) if drain.client.llen(name)]
    where = parked_list_of(QUEUE, 6, 2)
    drain.client.sadd(PARKED, where, parked_list_of("smallcat.another", 6, 2), "no such list")
    drain.client.lpush(parked_list_of("smallcat.another", 6, 2), "another's")
    for _ in range(9):
        drain.client.lmove(name, where)
    [gone] = drain.client.lrange(name, 0, -1)  # type: ignore[misc]
    drain.client.delete(name)
    while waiting(drain) < 1:
        pass
    [again] = drain.client.lrange(name, 0, -1)  # type: ignore[misc]
    assert payload_in(json.loads(again))["job"] == payload_in(json.loads(gone))["job"]
    thread.join(timeout=0.5)  # Many times the quiet time.
    assert (waiting(drain), drain.client.llen(where)) == (1, 9)
    while drain.client.lmove(where, name):
        pass
    while thread.is_alive():
        drain.all()
    assert len({line["id"] for line in manifest() if line["state"] == "done"}) == 30
    told = capsys.readouterr().err
    assert told.count("wait for a newer worker") == 1
    assert "9 messages wait for a newer worker, which alone reads them: upgrade one." in told
    assert "1 job is gone from the queue, and sent again." in told


def test_a_user_who_may_not_read_what_is_parked_feeds_all_the_same(
    drain: Drain, valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ACL of an earlier version does not name that key."""
    drain.client.acl_setuser(
        "earlier", enabled=True, passwords="+pw", keys=["*"], channels=["*"], categories=["+@all"], reset=True
    )
    drain.client.execute_command("ACL", "SETUSER", "earlier", "-smembers", "(~smallcat:work* +smembers)")
    drain.client.sadd(PARKED, parked_list_of(QUEUE, 6, 2))
    monkeypatch.setenv("REDIS_URL", f"redis://earlier:pw@127.0.0.1:{valkey.port}/0")
    try:
        assert drained(ingest("a cat\n"), drain).done == 1
    finally:
        drain.client.acl_deluser("earlier")


def test_equal_lines_are_one_picture_and_two_lines_of_the_manifest(drain: Drain) -> None:
    """The second message comes while the first one's job is in flight, and is dropped as taken."""
    run = ingest("a cat\na cat\n", fields={"seed": 5})
    thread = threading.Thread(target=run)
    thread.start()
    while waiting(drain) < 2:
        pass
    first, second = drain.take(), drain.take()
    assert first is not None
    assert second is not None
    assert first[0].id == second[0].id
    drain.end(*first)
    thread.join(timeout=20)
    assert [line["state"] for line in manifest()] == ["done", "done"]
    assert len(drain.seen) == 2


def test_a_job_that_is_in_flight_is_not_sent_again(drain: Drain) -> None:
    run = ingest("a cat\na cat\n", fields={"seed": 5})
    thread = threading.Thread(target=run)
    thread.start()
    while waiting(drain) < 2:
        pass
    first, _ = drain.take(), drain.take()
    thread.join(timeout=0.5)  # Many times the quiet time: the record says that it runs.
    assert waiting(drain) == 0
    assert first is not None
    drain.end(*first)
    thread.join(timeout=20)
    assert len(manifest()) == 2


def test_what_failed_and_is_done_later_is_done_in_the_manifest(drain: Drain) -> None:
    drained(ingest("fail\n"), drain)
    [failed] = manifest()
    record = drain.records.get(failed["id"])
    drain.records.submitted(record.job, QUEUE)
    drain.records.done(record.model_copy(update={"state": State.DONE, "uri": "s3://nowhere/x.png"}))
    outcome = drained(ingest(), drain)
    assert (outcome.done, outcome.failed) == (1, 0)
    assert manifest()[0]["state"] == "done"


@pytest.mark.parametrize("detach", [False, True])
def test_a_job_whose_message_is_set_aside_has_failed(drain: Drain, detach: bool) -> None:
    """The feeder, whoever asks for the run, and the manifest hear of it; of a forged message they do not."""
    run = ingest("a cat\na dog\na bird\n", detach=detach)
    thread = threading.Thread(target=run)
    thread.start()
    while waiting(drain) < 3:
        pass
    [name] = [each for each in lists_of(QUEUE) if drain.client.llen(each)]
    raw = str(drain.client.rpop(name))
    forged = json.loads(raw)
    forged["headers"]["id"] = forged["headers"]["id"].replace("-0", "-1")
    assert not drain.records.set_aside(json.dumps(forged).encode(), "it is forged")
    assert drain.records.set_aside(raw.encode(), "it is odd")
    drain.all()
    thread.join(timeout=20)
    info = find_run(drain.client, run.run.id)
    assert (info.state, info.done, info.failed) == ("finished", 2, 1)
    if detach:
        ingest()()
    first, *others = manifest()
    assert (first["state"], first["error_type"]) == ("failed", "InvalidJobError")
    assert "it is odd" in first["error"]
    assert [line["state"] for line in others] == ["done", "done"]


def test_the_fingerprint_of_a_message_of_a_run_is_that_of_its_text(drain: Drain) -> None:
    """So that a feeder need not read what it has just written."""
    ingest('a cat\na \U0001f408 \u00e9 "dog"\n', detach=True)()
    for name in lists_of(QUEUE):
        for text in drain.client.lrange(name, 0, -1):
            assert fingerprint(str(text)) == digest_of(str(text))


def test_a_cancelled_job_ends(drain: Drain) -> None:
    run = ingest("a cat\n")
    thread = threading.Thread(target=run)
    thread.start()
    while (found := drain.take()) is None:
        pass
    drain.records.give_back(found[0].id, found[1])
    drain.records.cancel(found[0].id)
    drain.claim(*found)
    thread.join(timeout=20)
    assert [line["state"] for line in manifest()] == ["cancelled"]


def test_all_keys_expire(drain: Drain) -> None:
    run = ingest("a cat\nfail\n")
    thread = threading.Thread(target=run)
    thread.start()
    while waiting(drain) < 2:
        pass
    mine = list(drain.client.scan_iter("smallcat:*"))
    assert f"smallcat:run:{run.run.id}" in mine
    assert all(int(drain.client.ttl(name)) > 0 for name in mine)
    while thread.is_alive():
        drain.all()
    assert all(int(drain.client.ttl(name)) > 0 for name in drain.client.scan_iter("smallcat:*"))


def test_a_done_job_of_a_run_soon_leaves_redis_unless_somebody_submitted_it(drain: Drain) -> None:
    drained(ingest("a cat\nfail\n"), drain)
    done, failed = manifest()
    assert 0 < int(drain.client.ttl(f"smallcat:job:{done['id']}")) <= 60
    assert int(drain.client.ttl(f"smallcat:job:{failed['id']}")) > 60


def test_detached_jobs_are_all_queued_and_a_later_call_has_the_manifest(drain: Drain) -> None:
    outcome = ingest("".join(f"cat {n}\n" for n in range(50)), max_queued=10, detach=True)()
    assert (outcome.state, outcome.sent, outcome.done) == ("detached", 50, 0)
    assert waiting(drain) == 50
    drain.all()
    outcome = ingest()()
    assert (outcome.state, outcome.done) == ("finished", 50)
    assert len(manifest()) == 50


def test_a_model_that_changes_meanwhile_changes_nothing_for_the_run(
    drain: Drain, valkey: ValkeyProcess
) -> None:
    run = ingest("a cat\na dog\n", max_queued=1)
    run.stop()
    run()
    first = ingest(max_queued=1)
    thread = threading.Thread(target=first)
    thread.start()
    while waiting(drain) < 1:
        pass
    changed = SERVED.model_copy(update={"revision": "0" * 40})
    info = json.loads(str(drain.client.get("smallcat:worker:fast@test")))
    info["served"] = changed.model_dump()
    drain.client.set("smallcat:worker:fast@test", json.dumps(info))
    while thread.is_alive():
        drain.all()
    assert {line["revision"] for line in manifest()} == {SERVED.revision}


def test_without_any_worker_the_jobs_wait_for_one_and_keep_their_ids(drain: Drain) -> None:
    drain.client.flushall()
    first = ingest("a cat\na dog\n", detach=True)()
    assert drain.client.llen("smallcat.default\x06\x166") == 2
    assert ingest(detach=True)().run == first.run
    assert drain.client.llen("smallcat.default\x06\x166") == 2


def test_one_run_has_one_feeder(drain: Drain) -> None:
    first, second = ingest("a cat\n"), ingest()
    first.run.take()
    with pytest.raises(PromptFileError, match=f"Process {os.getpid()}"):
        second.run.take(timeout_s=0.3)
    first.run.release()
    second.run.take(timeout_s=0.3)
    with pytest.raises(PromptFileError, match="taken"):
        first.run.status()


def test_the_run_of_a_dead_process_is_taken_over_at_once(drain: Drain) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    run = ingest("a cat\n")
    name = f"smallcat:run:{run.run.id}:feeder"
    drain.client.set(name, f"{socket.gethostname()}:{dead.stdout.strip()}:abc:def", ex=60)
    run.run.take(timeout_s=1)
    drain.client.set(name, f"{socket.gethostname()}:{os.getpid()}:before:us", ex=60)
    run.run.take(timeout_s=1)
    drain.client.set(name, "elsewhere:1:abc:def", ex=60)
    with pytest.raises(PromptFileError, match="on elsewhere"):
        run.run.take(timeout_s=0.2)


def test_a_name_stands_for_one_set_of_files(drain: Drain) -> None:
    drained(ingest("a cat\n", run="mine"), drain)
    with pytest.raises(PromptFileError, match="other files"):
        ingest("a dog\n", run="mine")()
    with pytest.raises(PromptFileError, match="lower-case"):
        ingest("a dog\n", run="No Name!")


def test_priority_does_not_make_another_run_and_chooses_the_list(drain: Drain) -> None:
    low = ingest("a cat\n", fields={"priority": 0})
    high = ingest("a cat\n", fields={"priority": 9}, detach=True)
    assert low.run.id == high.run.id
    high()
    assert drain.client.llen(lists_of(QUEUE)[0]) == 1


def test_strict_stops_before_the_first_is_sent(drain: Drain) -> None:
    Path("p.txt").write_text("a cat\nbad \0\n")
    plan = make_plan(
        ["p.txt"], file_format=None, variants=make_variants({}, 1, None, {}, None, None, literal=False)
    )
    with pytest.raises(PromptFileError, match=r"p\.txt, line 2: prompt holds"):
        refuse_bad_lines(plan, lambda _: None)


def test_a_manifest_can_be_csv(drain: Drain) -> None:
    drained(ingest("a cat\n", manifest=Path("m.csv"), grid={"steps": [3, 4]}), drain)
    with Path("m.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["steps"] for row in rows] == ["3", "4"]
    assert json.loads(rows[0]["grid"]) == {"steps": 3}
    assert rows[0]["state"] == "done"


def test_a_journal_of_a_killed_process_loses_its_last_word_only(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with Journal(path, "run") as journal:
        part = journal.path
    values = {"number": 1, "file": 0, "line": 5, "id": "x", "state": "done", "uri": "u", "cached": True}
    with part.open("ab") as file:
        file.write(json.dumps(values).encode() + b'\n{"number": 2, "sta')
    with Journal(path, "run") as journal:
        assert journal.result(1) == values
        assert journal.result(2) is None
        assert journal.cached == 1
    with Journal(path, "another") as journal:
        assert journal.result(1) is None
    with Journal(path, "run") as journal:
        assert journal.result(1) == values


def test_two_runs_of_one_file_at_once_have_a_journal_and_a_manifest_each(drain: Drain) -> None:
    text = "".join(f"cat {n}\n" for n in range(40))
    runs = [ingest(text, max_queued=5), ingest(max_queued=5, fields={"steps": 3})]
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=lambda run=run: outcomes.append(run())) for run in runs]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        drain.all()
    assert {each.state for each in outcomes} == {"finished"}
    found = {each.run: manifest(str(each.manifest)) for each in outcomes}
    for run in runs:
        assert [line["prompt"] for line in found[run.run.id]] == text.splitlines()
        assert [line["uri"] for line in found[run.run.id]] == [
            f"s3://nowhere/{line['id']}.png" for line in found[run.run.id]
        ]
    assert {line["steps"] for line in found[runs[1].run.id]} == {3}
    assert sorted(path.name for path in Path().glob("p.txt.*")) == [
        "p.txt.manifest-2.jsonl",
        "p.txt.manifest.jsonl",
    ]


def test_a_finished_manifest_is_not_replaced_by_another_run(drain: Drain) -> None:
    drained(ingest("a cat\n"), drain)
    before = Path("p.txt.manifest.jsonl").read_bytes()
    for again in (False, True):
        outcome = drained(ingest(None if again else "a dog\n"), drain)
        assert outcome.manifest == Path("p.txt.manifest-2.jsonl")
    assert Path("p.txt.manifest.jsonl").read_bytes() == before
    # A name that the user gave stands for one run.
    named = ingest("a bird\n", manifest=Path("p.txt.manifest.jsonl"))
    with pytest.raises(PromptFileError, match="no manifest of this run: name another file with --manifest"):
        named()
    assert waiting(drain) == 0
    assert named.run.noted("fed") is None
