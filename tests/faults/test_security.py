"""Hostile messages and texts: no code runs, no secret gets out, no job is changed."""

from __future__ import annotations

import base64
import bz2
import json
import pickle
import unicodedata
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from producer import submit_job
from tests.faults import oracle
from tests.faults.harness import ROOT, Ground, wait_until
from tests.faults.runner import SERVED
from worker.contract.errors import InvalidJobError
from worker.contract.found_message import fingerprint
from worker.contract.job import FORMAT_VERSION, Job
from worker.contract.message import TASK, payload_of
from worker.contract.queues import PARKED, parked_list_of, queue_of, queues_of
from worker.state.failures import Failures
from worker.state.records import Records

#: Seconds, with room for the start of several workers on a busy machine.
pytestmark = pytest.mark.timeout(150)

QUEUE = queues_of(SERVED)[0]


def envelope(body: bytes, kind: str = "application/json", **headers: Any) -> str:
    """A Celery message around `body`, as it stands in a list."""
    tag = str(uuid.uuid4())
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "binary" if "python" in kind else "utf-8",
            "content-type": kind,
            "headers": {"lang": "py", "task": TASK, "id": tag, "root_id": tag, **headers},
            "properties": {
                "correlation_id": tag,
                "delivery_tag": tag,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": QUEUE},
                "priority": 0,
                "body_encoding": "base64",
            },
        }
    )


def arguments(*args: object) -> bytes:
    """The body of a message with these arguments."""
    return json.dumps(
        [args, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    ).encode()


def push(ground: Ground, *messages: str | bytes) -> None:
    """Put messages into the queue as they are."""
    with ground.redis as client, client.pipeline(transaction=False) as pipe:
        for message in messages:
            pipe.lpush(QUEUE, message)
        pipe.execute()


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["application/x-python-serialize", "application/json"])
def test_a_pickle_is_never_opened(calm: Ground, tmp_path: Path, kind: str) -> None:
    exploded = tmp_path / "exploded"
    push(calm, envelope(pickle.dumps(((Bomb(exploded),), {}, {})), kind))
    calm.submit(10)
    oracle.settle(calm)
    assert not exploded.exists()


def test_a_task_that_is_none_of_ours_is_not_run(calm: Ground) -> None:
    push(calm, envelope(arguments(), task="celery.backend_cleanup"), envelope(arguments(), task="os.system"))
    calm.submit(3)
    oracle.settle(calm)


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)
_JSON = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def _near_jobs(draw: st.DrawFn) -> Any:
    """A message of ours with one field replaced, added or left out."""
    message: dict[str, Any] = json.loads(json.dumps(payload_of(Job(prompt="a", seed=1).resolved(SERVED))))
    where = draw(st.sampled_from([message, message["job"]]))
    field = draw(st.sampled_from(sorted(where)) | st.text(max_size=12))
    if draw(st.booleans()):
        where.pop(field, None)
    else:
        where[field] = draw(_JSON)
    if isinstance(message.get("version"), int | float):
        message["version"] = min(message["version"], FORMAT_VERSION)  # A newer one would wait for its worker.
    return message


#: What can stand in a list: bytes of any kind, JSON of any kind, and messages that are almost right.
MALFORMED = st.one_of(
    st.binary(max_size=60),
    _JSON.map(json.dumps),
    _JSON.map(lambda value: envelope(json.dumps(value).encode())),
    _JSON.map(lambda value: envelope(arguments(value))),
    st.lists(_JSON, max_size=3).map(lambda values: envelope(arguments(*values))),
    _near_jobs().map(lambda message: envelope(arguments(message))),
    st.dictionaries(
        st.sampled_from(["id", "task", "eta", "expires", "retries", "timelimit", "argsrepr", "group"]),
        _JSON,
        max_size=3,
    ).map(lambda headers: envelope(arguments({}), **headers)),
)


def _examples(count: int) -> settings:
    """So many, the same at every run."""
    return settings(
        max_examples=count,
        database=None,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def fuzz(ground: Ground, count: int) -> None:
    """`count` malformed messages among good jobs: all good ones are done, nothing else is, and it is calm."""
    made: list[str | bytes] = []

    @_examples(count)
    @given(MALFORMED)
    def make(message: str | bytes) -> None:
        made.append(message)

    make()
    images = {path.stem for path in ground.images.rglob("*.png")} if ground.images.exists() else set()
    for start in range(0, len(made), 100):
        push(ground, *made[start : start + 100])
        ground.submit(1)
        if start % 1000 == 0:
            wait_until("the worker keeps pace", lambda: ground.queued() < 2000, 120)
    oracle.settle(ground, timeout_s=120)
    # A fuzzed message that is a valid job after all is one of "a"; none of ours was touched.
    for stem in {path.stem for path in ground.images.rglob("*.png")} - images - set(ground.ids):
        assert json.loads((ground.images / stem[:2] / f"{stem}.json").read_bytes())["job"]["prompt"] == "a"
    print(f"{len(made)} malformed messages: the worker is up, {len(ground.ids)} jobs between them are done")
    oracle.no_slot_is_lost(ground, *ground.workers)


def test_malformed_messages_hurt_nobody(calm: Ground) -> None:
    fuzz(calm, 200)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_10_000_malformed_messages_hurt_nobody(calm: Ground) -> None:
    fuzz(calm, 10_000)


def texts(ground: Ground, count: int) -> None:
    """`count` prompts of any characters: each is refused with one sentence, or rendered as it is."""
    taken: dict[str, str] = {}
    refusals: list[str] = []

    @_examples(count)
    @given(st.text(st.characters(exclude_categories=()), max_size=60))
    def submit(text: str) -> None:
        try:
            taken[submit_job(text, seed=1, steps=1, model=SERVED.name).id] = text
        except InvalidJobError as error:
            refusals.append(str(error))

    submit()
    assert all(refusal.startswith("prompt ") for refusal in refusals)
    found = oracle.settle(ground, taken, timeout_s=300)
    for job_id in found.ids:
        stored = json.loads((ground.folder_of(job_id) / f"{job_id}.json").read_bytes())
        assert stored["job"]["prompt"] == taken[job_id]
    print(f"{count} prompts of any characters: {len(taken)} rendered, the others refused")


def test_prompts_of_any_characters_are_refused_or_rendered(calm: Ground) -> None:
    texts(calm, 60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_10_000_prompts_of_any_characters_are_refused_or_rendered(calm: Ground) -> None:
    texts(calm, 10_000)


def test_secrets_are_shown_to_nobody(calm: Ground) -> None:
    [failed] = calm.submit(1, "raise:Exception@step")
    wait_until("failed", lambda: calm.states([failed]).keys() == {"failed"})
    calm.ids.clear()
    calm.submit(3)
    oracle.settle(calm)
    secrets = {calm.stack.valkey.password, calm.stack.s3.secret_key}
    shown = [path.read_text(errors="replace") for path in (calm.stack.home.path / "logs").iterdir()]
    shown += [path.read_text() for path in calm.images.rglob("*.json")]
    with calm.redis as client:
        shown += [client.dump(key).decode("latin-1") for key in calm_keys(calm)]
    from worker.contract.settings import producer_settings, worker_settings

    shown += [repr(worker_settings(calm.stack.environment)), repr(producer_settings(calm.stack.environment))]
    for secret in secrets:
        assert not any(secret in text for text in shown)


def calm_keys(ground: Ground) -> list[bytes]:
    """All keys of its Redis."""
    import redis

    with redis.Redis.from_url(ground.stack.valkey.url) as client:
        return list(client.scan_iter())


def aside(ground: Ground) -> dict[str, str]:
    """The messages that were set aside, with the reason of each."""
    with ground.redis as client:
        found = Failures(client).unreadable()
    return {each.message.decode(errors="replace"): each.reason for each in found}


def with_properties(message: str, **properties: Any) -> str:
    """The message with other properties."""
    found = json.loads(message)
    found["properties"] |= properties
    return json.dumps(found)


#: What an otherwise ordinary message of a job can ask of Celery, by where it stands: header, option of the
#: body, property.
FEATURES: dict[str, dict[str, Any]] = {
    "chain": {"header": json.loads((ROOT / "tests" / "faults" / "chain.json").read_text())},
    "chain in the body": {"option": {"chain": "x"}},
    "callbacks": {"option": {"callbacks": [{"task": TASK, "args": [], "options": {"queue": "prey"}}]}},
    "errbacks": {"option": {"errbacks": [{"task": TASK, "args": [], "options": {"queue": "prey"}}]}},
    "eta": {"header": {"eta": "2036-01-01T00:00:00+00:00"}},
    "expires": {"header": {"expires": "2001-01-01T00:00:00+00:00"}},
    "timelimit": {"header": {"timelimit": [0.001, 0.001]}},
    "group": {"header": {"group": "g", "group_index": 1}},
    "stamps": {"header": {"stamped_headers": ["a"], "stamps": {"a": 1}}},
    "compression": {"header": {"compression": "application/x-bzip2"}},
    "another encoding": {"property": {"body_encoding": "rot13"}},
}


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_of_celery_is_no_way_into_a_worker(calm: Ground, name: str) -> None:
    """21 such messages stopped a worker for good, or made it publish, or filled its memory."""
    feature = FEATURES[name]
    made = []
    for _ in range(21):
        job = calm.job()
        body = json.dumps([[payload_of(job)], {}, feature.get("option", {})]).encode()
        if name == "compression":
            body = bz2.compress(b" " * 10**9 if len(made) == 20 else b" " * 10**6)
        message = envelope(body, id=f"{job.id}-x", **feature.get("header", {}))
        made.append(with_properties(message, **feature.get("property", {})))
    before = resident(calm)
    push(calm, *made)
    calm.submit(3)
    oracle.settle(calm)
    reasons = aside(calm)
    assert set(made) <= set(reasons)
    assert all(reasons[each].startswith("it") for each in made)
    assert resident(calm) - before < 50_000_000
    with calm.redis as client:
        assert not client.exists("prey")
    oracle.no_slot_is_lost(calm, *calm.workers)


def test_a_job_whose_only_message_cannot_be_read_fails_with_the_reason(calm: Ground) -> None:
    """No forged message fails somebody's job: the record has the fingerprint of the one that was sent."""
    job = calm.job()
    with calm.redis as client:
        records, name = Records(client, 1_000), f"{job.id}-0123abcd"
        broken = payload_of(job) | {"job": {"unknown": "field"}}
        sent = envelope(arguments(broken), id=name)
        records.submitted(job, QUEUE, "s", name, fingerprint(sent))
        for forged in (
            envelope(arguments(payload_of(job)), id=f"{job.id}-forged", chain="x"),
            envelope(arguments(payload_of(job)), id=name, chain="x"),
            envelope(arguments(broken), id=name),
        ):
            push(calm, forged)
            wait_until("the forged one set aside", lambda: forged in aside(calm))  # noqa: B023
            assert records.get(job.id).state == "queued"
        push(calm, sent)
        record = records.wait(job.id, 20)
        assert (record.state, record.error_type) == ("failed", "InvalidJobError")
        assert "No worker could read the job's message: " in str(record.error)
        client.delete(f"smallcat:job:{job.id}")


def test_no_text_of_others_moves_the_log_of_a_worker_or_forges_a_line_of_it(calm: Ground) -> None:
    hostile = "a\x1b[2J\r\n[2026-11-28 00:00:00: INFO] FORGED\u202e\x9b31m\u2028b"
    jobs = [calm.job() for _ in range(3)]
    broken = payload_of(jobs[0]) | {"job": {hostile: hostile}}
    with calm.redis as client:
        client.hset(f"smallcat:job:{jobs[1].id}", "state", hostile)
    push(
        calm,
        envelope(arguments(broken), id=f"{jobs[0].id}-x"),
        envelope(arguments(payload_of(jobs[1])), id=f"{jobs[1].id}-x", argsrepr=hostile, lang=hostile),
        envelope(arguments(payload_of(jobs[1])), id=f"{jobs[1].id}-y", **{hostile: hostile}),
        envelope(arguments(payload_of(jobs[2])), id=hostile),
        envelope(arguments(payload_of(jobs[2])), task=hostile),
    )
    with calm.redis as client:
        client.publish("smallcat:to-workers", f"cancel {hostile}")
    calm.ids.append(jobs[1].id)
    calm.submit(1, "raise:Exception@step")
    wait_until("it has failed", lambda: calm.states(calm.ids).keys() == {"done", "failed"})
    wait_until("set aside", lambda: len(aside(calm)) >= 4)
    wait_until("said", lambda: "FORGED" in calm.workers[0].output())
    text = calm.workers[0].output()
    assert {each for each in text if unicodedata.category(each) in ("Cc", "Cf", "Zl", "Zp")} <= {"\n"}
    assert not [line for line in text.splitlines() if line.startswith("[2026-11-28 00:00:00: INFO]")]
    calm.ids.clear()


def resident(ground: Ground) -> int:
    """Bytes of memory of the worker."""
    lines = Path(f"/proc/{ground.workers[0].pid}/status").read_text().splitlines()
    [size] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(size) * 1024


def test_metadata_is_what_the_caller_said_whatever_kombu_makes_of_it(calm: Ground) -> None:
    metadata = {"a": {"__type__": "uuid", "__value__": "no"}, "b": {"__type__": "datetime", "__value__": 1}}
    [job_id] = calm.submit(1, metadata=metadata)
    oracle.settle(calm)
    record = (calm.images / job_id[:2] / f"{job_id}.json").read_bytes()
    assert json.loads(record)["job"]["metadata"] == metadata


def test_a_message_of_a_newer_version_waits_where_a_worker_that_reads_it_looks(calm: Ground) -> None:
    """However many there are, they are looked at once each, and keep nobody from work."""
    jobs = [calm.job() for _ in range(500)]
    bodies = [
        arguments({**payload_of(job), "version": FORMAT_VERSION + 1, "unknown": "field"}) for job in jobs
    ]
    made = [envelope(body, id=f"{job.id}-newer") for job, body in zip(jobs, bodies, strict=True)]
    where = parked_list_of(QUEUE, 0, FORMAT_VERSION + 1)
    with calm.redis as client:
        try:
            push(calm, *made)
            calm.submit(5)
            oracle.settle(calm)
            assert client.lrange(where, 0, -1) == made[::-1]
            assert client.smembers(PARKED) == {where}
            assert not client.exists(*(f"smallcat:job:{job.id}" for job in jobs))
            assert calm.workers[0].output().count(f"of version {FORMAT_VERSION + 1}") == 1
            assert "update it" in calm.workers[0].output()
        finally:
            client.delete(where, PARKED)
    assert queue_of(jobs[0]) == QUEUE
