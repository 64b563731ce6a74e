"""Which workers live, what a job's model means, and which queue it goes to."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu import Connection
from redis import Redis

from deploy.embedded.servers import ValkeyProcess
from tests.full_redis import full
from worker.celery import app, connection
from worker.contract.choices import PromptSyntax
from worker.contract.errors import InvalidJobError
from worker.contract.file_index import FileEntry, FileIndex
from worker.contract.job import FORMAT_VERSION, Job
from worker.contract.message import task_call_of
from worker.contract.queues import lists_of, queue_of, queues_of
from worker.contract.served_model import Defaults, ServedModel
from worker.state.fleet import ANNOUNCE_TTL_S, Fleet, WorkerInfo
from worker.state.groups import groups_of, version_read
from worker.state.keys import DIGEST, worker_key
from worker.state.records import Records
from worker.state.redis_client import RedisError, connect

TTL_S = 1_000


@pytest.fixture
def client(valkey: ValkeyProcess) -> Iterator[Redis]:
    with connect(valkey.url, retry_s=2) as client:
        yield client


@pytest.fixture
def fleet(client: Redis) -> Fleet:
    return Fleet(client, TTL_S)


def served(model: str, revision: str = "r1", **defaults: Any) -> ServedModel:
    said = {"width": 512, "height": 512, "steps": 30, "guidance_scale": 7.5} | defaults
    return ServedModel(name=model, revision=revision, defaults=Defaults(**said))


def worker(name: str, model: str, revision: str = "r1", started_at: float = 1.0) -> WorkerInfo:
    return WorkerInfo(
        name=name,
        served=served(model, revision),
        started_at=started_at,
        device="CPU",
        attention="sdpa",
        max_rows=8,
        versions={"torch": "2"},
    )


def retires(name: str, model: str, revision: str = "r1", started_at: float = 1.0) -> WorkerInfo:
    return worker(name, model, revision, started_at).model_copy(update={"retiring": True})


def job(**fields: Any) -> Job:
    return Job.parse({"prompt": "a small cat", "seed": 1} | fields)


def test_a_model_made_for_inpainting_is_announced_as_one(fleet: Fleet, client: Redis) -> None:
    """Others are announced as by earlier versions: their workers are one group."""
    plain = worker("a", "m")
    fleet.announce(plain)
    assert "inpainting" not in str(client.get(DIGEST))
    paints = plain.served.model_copy(update={"name": "paints", "inpainting": True})
    fleet.announce(plain.model_copy(update={"name": "b", "served": paints}))
    assert {group.served for group in fleet.groups()} == {plain.served, paints}


def test_a_worker_is_known_as_it_announced_itself_longest_up_first(fleet: Fleet) -> None:
    young, old = worker("a", "m", started_at=5.5), worker("b", "m", started_at=2.5)
    fleet.announce(young)
    fleet.announce(old)
    assert fleet.workers() == [old, young]


def test_a_worker_that_leaves_or_stops_announcing_itself_is_gone(fleet: Fleet, client: Redis) -> None:
    for name in ("leaves", "stops announcing", "stays"):
        fleet.announce(worker(name, "m"))
    assert 0 < client.ttl("smallcat:worker:stops announcing") <= ANNOUNCE_TTL_S
    fleet.withdraw("leaves")
    client.delete("smallcat:worker:stops announcing")  # As its expiry does.
    assert [each.name for each in fleet.workers()] == ["stays"]
    assert client.smembers("smallcat:workers") == {"stays"}


def test_a_pause_is_announced_and_left_out_while_there_is_none(fleet: Fleet, client: Redis) -> None:
    """Announcements of earlier versions have no such field, and are read."""
    fleet.announce(worker("a", "m"))
    assert "paused" not in (client.get("smallcat:worker:a") or "") + (client.get("smallcat:served") or "")
    paused = worker("a", "m").model_copy(update={"paused": "the bucket refuses"})
    fleet.announce(paused)
    assert fleet.workers() == [paused]


def test_every_key_expires(fleet: Fleet, client: Redis) -> None:
    fleet.announce(worker("a", "m"))
    keys = list(client.scan_iter())
    assert {"smallcat:worker:a", "smallcat:workers", "smallcat:served", "smallcat:worker::served"} <= set(
        keys
    )
    assert all(0 < client.ttl(key) <= TTL_S for key in keys)


# --- what a job's model means -----------------------------------------------------------------------------


def test_the_default_is_the_model_of_the_worker_that_is_up_longest(fleet: Fleet) -> None:
    fleet.announce(worker("a", "newcomer", started_at=9.0))
    fleet.announce(worker("b", "veteran", started_at=3.0))
    resolved = fleet.resolve(job())
    assert (resolved.model, resolved.revision, resolved.steps) == ("veteran", "r1", 30)


def test_the_newest_revision_of_a_model_is_meant(fleet: Fleet) -> None:
    fleet.announce(worker("a", "m", "old", started_at=1.0))
    fleet.announce(worker("b", "m", "new", started_at=2.0))
    assert fleet.resolve(job()).revision == "new"
    assert fleet.resolve(job(model="m")).revision == "new"
    assert fleet.resolve(job(model="m", revision="old")).revision == "old"


def test_what_was_last_seen_is_meant_while_no_worker_is_up(fleet: Fleet) -> None:
    fleet.announce(worker("a", "m", started_at=1.0))
    fleet.announce(worker("b", "n", started_at=2.0))
    before = fleet.resolve(job()), fleet.resolve(job(model="n"))
    fleet.withdraw("a")
    fleet.withdraw("b")
    assert (fleet.resolve(job()), fleet.resolve(job(model="n"))) == before


def test_a_model_is_remembered_while_its_workers_are_away_and_others_are_up(fleet: Fleet) -> None:
    fleet.announce(worker("a", "m", started_at=1.0))
    before = fleet.resolve(job(model="m"))
    fleet.withdraw("a")
    fleet.announce(worker("b", "n", started_at=2.0))
    fleet.announce(worker("b", "n", started_at=2.0))
    assert fleet.resolve(job(model="m")) == before
    # But the default is what is up.
    assert fleet.resolve(job()).model == "n"
    fleet.withdraw("b")
    assert fleet.resolve(job()).model == "n"


def test_new_jobs_mean_a_worker_that_retires_only_where_no_other_serves_their_model(fleet: Fleet) -> None:
    """It has been up longest, and was started again last: neither makes it the one that is meant."""
    fleet.announce(retires("old", "m", "r1", started_at=1.0))
    assert fleet.resolve(job()).revision == "r1"
    fleet.announce(worker("new", "m", "r2", started_at=2.0))
    fleet.announce(retires("old again", "m", "r1", started_at=3.0))
    for meant in (fleet, fleet.snapshot()):
        assert [meant.resolve(job(**named)).revision for named in ({}, {"model": "m"})] == ["r2", "r2"]
        assert meant.resolve(job(model="m", revision="r1")).revision == "r1"


def test_the_default_model_is_none_that_retires(fleet: Fleet) -> None:
    fleet.announce(retires("old", "m1", started_at=1.0))
    fleet.announce(worker("new", "m2", started_at=2.0))
    assert fleet.resolve(job()).model == "m2"
    assert fleet.resolve(job(model="m1")).revision == "r1"


def test_a_full_redis_takes_the_announcements_of_workers(fleet: Fleet, client: Redis) -> None:
    """Or nobody would serve the queue that fills it, as far as doctor and autoscalers can see."""
    fleet.announce(worker("before", "m"))
    with full(client):
        fleet.announce(worker("before", "m"))
        # What was last seen is noted when there is room.
        with contextlib.suppress(RedisError):
            fleet.announce(worker("new", "m"))
        assert [each.name for each in fleet.workers()] == ["before", "new"]


def test_what_was_last_seen_is_meant_while_only_workers_that_retire_are_up(fleet: Fleet) -> None:
    """The new revision's workers may be scaled to zero while the old one's drain."""
    fleet.announce(retires("old", "m", "r1", started_at=1.0))
    fleet.announce(worker("new", "m", "r2", started_at=2.0))
    fleet.withdraw("new")
    for number in range(3):
        fleet.announce(retires(f"old {number}", "m", "r1", started_at=3.0 + number))
        for meant in (fleet, fleet.snapshot()):
            assert meant.resolve(job()).revision == "r2"
    assert len(fleet.snapshot().last_seen) <= 3


def test_a_job_is_open_where_nobody_ever_announced_its_model(fleet: Fleet) -> None:
    assert fleet.resolve(job()).is_open
    fleet.announce(worker("a", "m"))
    assert not fleet.resolve(job()).is_open
    assert fleet.resolve(job(model="another")).is_open


def test_what_was_read_of_the_workers_counts_for_as_long_as_the_caller_says(fleet: Fleet) -> None:
    fleet.announce(worker("a", "m", "old", started_at=1.0))
    assert fleet.resolve(job(), age_s=60).revision == "old"
    fleet.announce(worker("b", "m", "new", started_at=2.0))
    assert fleet.resolve(job(), age_s=60).revision == "old"
    assert fleet.resolve(job()).revision == "new"
    fleet.announce(worker("c", "n", "first"))
    # A model that none of those served is looked for.
    assert fleet.resolve(job(model="n"), age_s=60).revision == "first"


def test_a_named_revision_that_nobody_serves_is_waited_for(fleet: Fleet) -> None:
    fleet.announce(worker("a", "m"))
    wanted = job(model="m", revision="future")
    assert fleet.resolve(wanted) == wanted


def test_one_job_has_one_id_whoever_announces_in_between(fleet: Fleet) -> None:
    fleet.announce(worker("a", "m"))
    first = fleet.resolve(job())
    fleet.announce(worker("b", "m", started_at=2.0))
    assert fleet.resolve(job()).id == first.id


# --- queues -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{}, {"model": "a/model"}, {"model": "a/model", "revision": "r1"}])
def test_a_worker_listens_where_jobs_for_it_are_sent(fleet: Fleet, asked: dict[str, str]) -> None:
    fleet.announce(worker("a", "a/model"))
    queue = queue_of(fleet.resolve(job(**asked)))
    assert queue in queues_of(served("a/model"))
    assert fleet.serving(queue) == 1


def test_a_worker_listens_where_open_jobs_for_it_were_sent_before(fleet: Fleet) -> None:
    queues = [queue_of(fleet.resolve(job(**asked))) for asked in ({}, {"model": "m"})]
    assert set(queues) <= set(queues_of(served("m")))


def test_a_worker_does_not_listen_for_other_models_or_revisions(fleet: Fleet) -> None:
    queues = queues_of(served("m", "r1"))
    assert queue_of(job().resolved(served("m", "r2"))) not in queues
    assert queue_of(job().resolved(served("n", "r1"))) not in queues
    assert queue_of(job(model="n").opened()) not in queues


#: Names that are easily mistaken for each other.
MODELS = [
    "a/b",
    "a-b",
    "a b",
    "A/b",
    "a//b",
    "a@b",
    "a.b",
    "x" * 60,
    "x" * 61,
    "x" * 62,
    "ä",
    "ö",
    "a\u2028b",
]
REVISIONS = ["r" * 40, "r" * 39 + "x", "0" * 40, "1" * 40, "main", "a@b", "a-b", "open", ""]


def test_no_two_models_or_revisions_share_a_queue() -> None:
    names = [queue_of(job(model=model).opened()) for model in MODELS]
    names += [
        queue_of(job(model=model, revision=revision))
        for model, revision in itertools.product(MODELS, REVISIONS)
    ]
    lists = [each for name in names for each in lists_of(name)]
    assert len(set(lists)) == len(lists)


@settings(deadline=None, max_examples=200)
@given(
    st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=80),
    st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=60),
)
def test_a_queue_has_a_short_plain_name(model: str, revision: str) -> None:
    name = queue_of(job(model=model, revision=revision))
    assert len(name) < 100
    assert name.isascii()
    assert name.isprintable()
    assert " " not in name


def test_what_is_no_queue_disturbs_nobody_who_counts(fleet: Fleet, client: Redis) -> None:
    client.lpush("smallcat.one", "x")
    client.set("smallcat.text", "x")
    client.sadd("smallcat:queues", "smallcat.one", "smallcat.text", "", "smallcat:queues")
    assert fleet.waiting() == {"": 0, "smallcat.one": 1, "smallcat.text": 0, "smallcat:queues": 0}


def test_lists_are_named_as_kombu_names_them_and_messages_in_them_are_counted(
    fleet: Fleet, client: Redis, valkey: ValkeyProcess
) -> None:
    jobs = [job(priority=priority).resolved(served("m")) for priority in range(10)]
    queue = queue_of(jobs[0])
    to_valkey: Connection = connection(valkey.url)
    with to_valkey as link, app.amqp.Producer(link) as producer:
        for each in jobs:
            app.send_task(**task_call_of(each), producer=producer)
    assert fleet.length(queue) == 10
    assert [client.llen(name) for name in lists_of(queue)] == [1] * 10
    # The most urgent one lies in the list that is fetched from first.
    body = json.loads(client.lindex(lists_of(queue)[0], 0) or "{}")
    assert body["properties"]["priority"] == 0
    Records(client, TTL_S).submitted(jobs[9], queue)
    assert fleet.waiting() == {queue: 10}


def test_an_announcement_says_which_messages_the_worker_reads_and_may_say_more_than_this_version_knows(
    fleet: Fleet, client: Redis
) -> None:
    older = worker("a", "m", started_at=1.0)
    newer = worker("b", "m", started_at=2.0).model_copy(update={"reads": 3})
    queue = queues_of(older.served)[0]
    assert version_read([], queue) == 0
    fleet.announce(older)
    # As before there was a second version.
    assert "reads" not in json.loads(str(client.get(worker_key("a"))))
    assert fleet.version_read(queue) == 1
    fleet.announce(newer)
    assert fleet.version_read(queue) == 3
    said = json.loads(str(client.get(worker_key("b"))))
    said |= {"to_come": 1, "served": said["served"] | {"to_come": 2}}
    said["served"]["defaults"]["to_come"] = 3
    client.set(worker_key("b"), json.dumps(said))
    assert fleet.workers() == [older, newer]
    # The digest has the same.
    assert fleet.serving(queue) == 2
    assert [fleet.serving(queue, version=version) for version in (1, 3, 4)] == [2, 1, 0]
    assert [group.reads for group in fleet.groups()] == [1, 3]
    assert sorted(groups_of(fleet.workers()), key=lambda group: group.reads) == list(fleet.groups())
    fleet.withdraw("b")
    assert fleet.version_read(queue) == 1


# The fleet's default syntax.


def test_a_silent_job_takes_the_syntax_that_the_workers_announce(fleet: Fleet, client: Redis) -> None:
    fleet.announce(worker("a", "m").model_copy(update={"prompt_syntax": PromptSyntax.A1111}))
    for known in (fleet.resolve, fleet.snapshot().resolve):
        assert known(job()).prompt_syntax == "a1111"
        assert known(job(prompt_syntax="plain")).prompt_syntax == "plain"
        assert known(job()).id == known(job(prompt_syntax="a1111")).id != known(job(prompt_syntax="plain")).id
    with pytest.raises(InvalidJobError, match="asks for <hypernet:x:1>"):
        fleet.resolve(job(prompt="a cat <hypernet:x:1>"))
    with pytest.raises(InvalidJobError, match='loras has "x", which no worker offers'):
        fleet.resolve(job(prompt="a cat <lora:x:1>"))
    # What was announced last counts while no worker lives.
    fleet.withdraw("a")
    assert fleet.resolve(job()).prompt_syntax == "a1111"


def test_a_plain_fleet_announces_no_syntax_and_changes_no_job(fleet: Fleet, client: Redis) -> None:
    fleet.announce(worker("a", "m"))
    said = "".join(client.get(key) or "" for key in ("smallcat:worker:a", "smallcat:served"))
    assert "syntax" not in said
    assert "prompt_syntax" not in fleet.resolve(job()).model_dump()
    assert fleet.resolve(job(model="unknown")).prompt_syntax == "plain"


# --- files beside the model ---------------------------------------------------------------------------------


def offering(name: str, *files: FileEntry, started_at: float = 1.0) -> tuple[WorkerInfo, FileIndex]:
    index = FileIndex.of(files)
    more = {"files": index.digest, "reads": FORMAT_VERSION}
    return worker(name, "m", started_at=started_at).model_copy(update=more), index


def entry(name: str, digits: str) -> FileEntry:
    return FileEntry(kind="embedding", name=name, sha256=digits * 32)


def announce(fleet: Fleet, info: WorkerInfo, index: FileIndex) -> None:
    fleet.indexes.put(index)
    fleet.announce(info)


def test_an_index_lies_in_redis_once_for_all_workers_that_have_the_same_files(
    fleet: Fleet, client: Redis
) -> None:
    for name in ("a", "b", "c"):
        announce(fleet, *offering(name, entry("cat", "aa")))
    [key] = client.keys("smallcat:worker::files:*")
    assert 0 < client.ttl(key) <= TTL_S
    assert [group.workers for group in fleet.groups()] == [3]
    assert len(fleet.workers()) == 3
    announce(fleet, *offering("d", entry("cat", "bb")))
    assert len(client.keys("smallcat:worker::files:*")) == 2
    # A worker without files announces nothing that older producers do not know.
    fleet.announce(worker("e", "m"))
    assert "files" not in (client.get("smallcat:worker:e") or "")


def test_an_index_of_an_earlier_version_is_replaced_by_one_that_says_more(
    fleet: Fleet, client: Redis
) -> None:
    info, index = offering(
        "a", entry("cat", "aa").model_copy(update={"kind": "lora", "auto_v3": "7c6bad76eb54"})
    )
    key = f"smallcat:worker::files:{index.digest}"
    # As a worker that does not know AutoV3 keeps it.
    earlier = json.loads(index.text)
    del earlier["files"][0]["auto_v3"]
    client.set(key, json.dumps(earlier, separators=(",", ":")))
    announce(fleet, info, index)
    assert client.get(key) == index.text
    assert 0 < client.ttl(key) <= TTL_S
    assert fleet.indexes.get(index.digest) == index
    # One of a later version stays.
    later = index.text.replace('"auto_v3"', '"later":"more","auto_v3"')
    client.set(key, later)
    announce(fleet, info, index)
    assert client.get(key) == later


def test_a_job_has_the_files_of_the_newest_worker_by_content(fleet: Fleet) -> None:
    announce(fleet, *offering("a", entry("cat", "aa"), started_at=1.0))
    first = fleet.resolve(job(prompt="a <cat>"))
    assert first.file_hashes == {"embedding:cat": "aa" * 32}
    assert fleet.snapshot().resolve(job(prompt="a <cat>")) == first
    announce(fleet, *offering("b", entry("cat", "bb"), started_at=2.0))
    second = fleet.resolve(job(prompt="a <cat>"))
    assert second.id != first.id
    assert fleet.resolve(job(prompt="a cat")).file_hashes == {}
    # A job that is sent again is the same one.
    assert fleet.resolve(first) == first


def test_what_was_offered_last_is_meant_while_no_worker_is_up(fleet: Fleet, client: Redis) -> None:
    announce(fleet, *offering("a", entry("cat", "aa")))
    before = fleet.resolve(job(prompt="a <cat>"))
    fleet.withdraw("a")
    assert Fleet(client, TTL_S).resolve(job(prompt="a <cat>")) == before


def test_who_lacks_a_file_does_not_take_its_jobs(fleet: Fleet) -> None:
    announce(fleet, *offering("a", entry("cat", "aa"), started_at=2.0))
    announce(fleet, *offering("b", started_at=1.0))
    resolved = fleet.resolve(job(prompt="a <cat>"))
    found = fleet.takers(queue_of(resolved), resolved)
    assert (found.workers, found.lacking) == (1, 1)
    fleet.withdraw("a")
    found = fleet.takers(queue_of(resolved), resolved)
    assert (found.workers, found.lacking) == (0, 1)
    plain = fleet.resolve(job())
    assert fleet.takers(queue_of(plain), plain).workers == 1


def test_an_index_that_is_gone_or_forged_is_none(fleet: Fleet, client: Redis) -> None:
    info, index = offering("a", entry("cat", "aa"))
    announce(fleet, info, index)
    client.set(f"smallcat:worker::files:{index.digest}", FileIndex.of([entry("cat", "bb")]).model_dump_json())
    assert Fleet(client, TTL_S).resolve(job(prompt="a <cat>")).file_hashes == {}
    client.delete(f"smallcat:worker::files:{index.digest}")
    assert Fleet(client, TTL_S).resolve(job(prompt="a <cat>")).file_hashes == {}
