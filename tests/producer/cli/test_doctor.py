"""What the doctor finds, and the remedy it names for each thing that is not as it should be."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from redis import Redis

from producer.cli.doctor import Finding, _replication, examine
from producer.client import submit_job
from producer.ingest.runs import cancel_run
from producer.ingest.submit_file import submit_file
from tests.worker.engine.fake_runner import SERVED, job_of
from tests.worker.storage.wire import EVERYTHING, Wire
from worker.contract.errors import SettingsError
from worker.contract.file_index import FileEntry, FileIndex
from worker.contract.queues import queue_of
from worker.contract.served_model import ServedModel
from worker.state.fleet import Fleet, WorkerInfo
from worker.state.records import Records
from worker.state.redis_client import connect


@pytest.fixture
def environment(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    # What this machine has is its worker's business: see their own tests.
    monkeypatch.setattr("producer.cli.doctor.importlib.util.find_spec", lambda name: None)
    return environment


@pytest.fixture
def client(environment: dict[str, str]) -> Iterator[Redis]:
    with connect(environment["REDIS_URL"], retry_s=2) as client:
        yield client


def announce(
    client: Redis,
    name: str,
    torch: str = "2.13",
    paused: str = "",
    files: str = "",
    served: ServedModel = SERVED,
) -> None:
    info = WorkerInfo(
        name=name,
        served=served,
        started_at=1.0,
        device="CPU",
        attention="sdpa",
        max_rows=8,
        versions={"torch": torch},
        paused=paused,
        files=files,
    )
    Fleet(client, 1_000).announce(info)


def found(what: str) -> list[Finding]:
    return [finding for finding in examine() if finding.what == what]


def the_bad_one(what: str) -> str:
    (bad,) = [finding for finding in found(what) if not finding.ok]
    assert "\n" not in bad.text
    return bad.text


def test_all_is_well(client: Redis) -> None:
    announce(client, "w1")
    findings = list(examine())
    assert all(finding.ok for finding in findings), findings
    assert {finding.what for finding in findings} >= {"redis", "bucket", "workers"}
    shown = json.dumps([finding._asdict() for finding in findings])
    assert f"w1 serves {SERVED.name}" in shown
    assert "presigned links open" in shown
    password = client.connection_pool.connection_kwargs["password"]
    assert password
    assert password not in shown


def test_a_model_made_for_inpainting_is_known_by_it(client: Redis) -> None:
    announce(client, "w1")
    announce(client, "w2", served=SERVED.model_copy(update={"name": "edits", "inpainting": True}))
    shown = {finding.text.split()[0]: finding.text for finding in found("workers")}
    assert "inpainting" not in shown["w1"]
    assert f"serves edits at {SERVED.revision}, made for inpainting, CPU" in shown["w2"]


def test_the_doctor_leaves_nothing_in_the_bucket(client: Redis, environment: dict[str, str]) -> None:
    list(examine())
    listing = boto3.client("s3").list_objects_v2(Bucket=environment["S3_BUCKET"])
    assert listing.get("Contents", []) == []


def test_a_redis_that_is_nearly_full(client: Redis) -> None:
    announce(client, "w1")
    [advice] = [each for each in found("redis") if each.text.startswith("has no maxmemory: CONFIG SET")]
    assert advice.ok
    assert advice.is_note
    # What is as it should be orders nothing.
    assert not any("CONFIG SET" in each.text for each in found("redis") if each.ok and not each.is_note)
    used = client.info("memory")["used_memory"]
    try:
        client.config_set("maxmemory", 4 * used)
        assert all(finding.ok for finding in found("redis"))
        client.config_set("maxmemory", used)
        assert re.fullmatch(r"uses 1\d\d% of its maxmemory: .* or raise maxmemory", the_bad_one("redis"))
    finally:
        client.config_set("maxmemory", 0)


def test_no_worker(client: Redis) -> None:
    assert the_bad_one("workers") == "none is alive: start one with `celery -A worker worker`"


def test_a_worker_that_takes_no_jobs(client: Redis) -> None:
    announce(client, "w1", paused='The bucket "x" refuses (ExpiredToken): get new keys.')
    announce(client, "w2")
    text = the_bad_one("workers")
    assert text == 'w1 takes no jobs at present: The bucket "x" refuses (ExpiredToken): get new keys.'


def test_workers_of_different_versions(client: Redis) -> None:
    announce(client, "w1", torch="2.12")
    announce(client, "w2", torch="2.13")
    assert the_bad_one("workers") == "run different versions of torch: 2.12 on w1; 2.13 on w2"


def test_jobs_in_a_queue_that_nobody_serves(client: Redis) -> None:
    announce(client, "w1")
    lost, served = job_of(1).model_copy(update={"revision": "gone"}), job_of(2)
    for job in (lost, served):
        Records(client, 1_000).submitted(job, queue_of(job))
        client.lpush(queue_of(job), "message")
    text = the_bad_one("queues")
    assert text.startswith(f"1 job waits for {queue_of(lost)}, which no live worker serves")
    assert [finding.text for finding in found("queues") if finding.ok] == [
        f"1 job waits in {queue_of(served)}"
    ]


def test_jobs_of_a_model_that_nobody_serves_are_named_by_it_until_nobody_wants_them(client: Redis) -> None:
    announce(client, "w1")
    handles = [submit_job("a cat", seed=seed, model="sdxl") for seed in range(3)]
    assert the_bad_one("queues").startswith("3 jobs wait for the model sdxl, which no live worker serves")
    handles[0].cancel()
    assert the_bad_one("queues").startswith("2 jobs wait for the model sdxl, ")
    for handle in handles:
        handle.cancel()
    [finding] = found("queues")
    assert (finding.ok, finding.text) == (
        True,
        "3 messages of jobs that are over wait for the model sdxl: its next worker drops them",
    )


def test_a_run_that_was_cancelled_leaves_no_complaint(client: Redis, tmp_path: Path) -> None:
    announce(client, "w1")
    file = tmp_path / "p.csv"
    file.write_text("prompt,model,revision\na cat,sdxl,gone\na dog,sdxl,gone\n")
    outcome = submit_file(file, detach=True)
    assert the_bad_one("queues").startswith("2 jobs wait for the model sdxl at gone, which no live worker")
    cancel_run(client, Records(client, 1_000), outcome.run)
    assert all(finding.ok for finding in found("queues"))


def test_a_producer_without_a_bucket_is_well_and_a_worker_is_not(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("S3_BUCKET")
    announce(client, "w1")
    [finding] = found("bucket")
    assert finding.ok
    assert finding.text.startswith("S3_BUCKET is not set, which is enough to submit and fetch")
    monkeypatch.setattr("producer.cli.doctor.importlib.util.find_spec", lambda name: name == "torch")
    monkeypatch.setattr("producer.cli.doctor._device", lambda: iter(()))
    assert the_bad_one("bucket") == "S3_BUCKET is not set: name the bucket for the pictures."


def test_a_queue_that_was_left_empty_is_no_finding(client: Redis) -> None:
    announce(client, "w1")
    gone = job_of(1).model_copy(update={"revision": "gone"})
    Records(client, 1_000).submitted(gone, queue_of(gone))
    assert found("queues") == []


def test_a_redis_that_evicts(client: Redis) -> None:
    before = client.config_get("maxmemory-policy")["maxmemory-policy"]
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        text = the_bad_one("redis")
    finally:
        client.config_set("maxmemory-policy", before)
    assert text == "evicts jobs when it is full (allkeys-lru): CONFIG SET maxmemory-policy noeviction"


def test_a_redis_that_looks_through_the_messages_that_workers_hold_one_by_one(client: Redis) -> None:
    before = client.config_get("hash-max-ziplist-entries")["hash-max-ziplist-entries"]
    client.config_set("hash-max-ziplist-entries", 512)  # Redis' default.
    try:
        texts = [finding.text for finding in found("redis")]
    finally:
        client.config_set("hash-max-ziplist-entries", before)
    [text] = [each for each in texts if each.startswith("looks through")]
    assert text.endswith("CONFIG SET hash-max-ziplist-entries 64")
    assert not [each for each in found("redis") if each.text.startswith("looks through")]


def test_a_redis_whose_records_take_more_memory_than_they_need(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> list[str]:
        return [finding.text for finding in found("redis") if finding.text.startswith("records of jobs")]

    assert said() == []
    before = client.config_get("hash-max-ziplist-value")["hash-max-ziplist-value"]
    client.config_set("hash-max-ziplist-value", 64)  # Redis' default.
    try:
        [text] = said()
        assert text.endswith("CONFIG SET hash-max-ziplist-value 2048 hash-max-ziplist-entries 64")
        client.acl_setuser(
            "asks",
            enabled=True,
            passwords="+pw",
            keys=["*"],
            channels=["*"],
            categories=["+@all"],
            commands=["-config"],
            reset=True,
        )
        monkeypatch.setenv("REDIS_URL", re.sub("//.*@", "//asks:pw@", os.environ["REDIS_URL"]))
        # This user may not ask.
        assert all(finding.ok for finding in found("redis"))
        assert said() == []
    finally:
        client.config_set("hash-max-ziplist-value", before)
        client.acl_deluser("asks")


def test_a_replica(client: Redis) -> None:
    client.replicaof("127.0.0.1", "1")
    try:
        assert the_bad_one("redis").startswith("is a replica, which takes no jobs: use the primary's address")
    finally:
        client.replicaof("NO", "ONE")


def test_too_few_replicas(client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLCAT_WAIT_REPLICAS", "2")
    assert the_bad_one("redis").startswith("0 replicas follow it, submissions wait for 2 (SMALLCAT_WAIT")


@pytest.mark.parametrize("wanted", [1, 3])
def test_fewer_than_all_replicas_are_told_of(wanted: int) -> None:
    """A cut may leave the one that has a job on the old primary's side, and another one is promoted."""
    [finding] = _replication({"role": "master", "connected_slaves": 3}, wanted)
    assert finding.ok
    assert ("3 would exclude that" in finding.text) is (wanted == 1)


def test_a_redis_that_is_away_does_not_end_the_examination(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("REDIS_URL", f"redis://:hunter2@127.0.0.1:{held.getsockname()[1]}/0")
        findings = list(examine())
    assert [finding.what for finding in findings if not finding.ok] == ["redis", "workers"]
    assert all("start it, or set REDIS_URL" in finding.text for finding in findings if not finding.ok)
    assert "hunter2" not in str(findings)
    assert any(finding.what == "bucket" and finding.ok for finding in findings)


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("S3_BUCKET", "no-such-bucket", "create it, or set S3_BUCKET"),
        ("AWS_SECRET_ACCESS_KEY", "wrong" * 8, "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_a_bucket_that_refuses(
    client: Redis, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, remedy: str
) -> None:
    announce(client, "w1")
    monkeypatch.setenv(variable, value)
    assert remedy in the_bad_one("bucket")
    assert all(finding.ok for finding in examine() if finding.what in ("redis", "workers"))


def test_rights_that_no_job_needs_are_reported_and_are_no_fault(client: Redis, wire: Wire) -> None:
    wire.rights = EVERYTHING - {"s3:DeleteObject", "s3:ListBucket"}
    findings = found("bucket")
    assert all(finding.ok for finding in findings), findings
    texts = [finding.text for finding in findings]
    assert [text for text in texts if "cannot be removed, which no job needs" in text]
    assert [text for text in texts if "cannot be listed, which only galleries" in text]
    assert "presigned links open" in texts


def test_a_producer_may_have_no_right_to_write(client: Redis, wire: Wire) -> None:
    wire.rights = frozenset({"s3:GetObject", "s3:ListBucket"})
    (finding,) = found("bucket")
    assert finding.ok
    assert "can be read, not written, which workers need: " in finding.text


def test_a_machine_that_may_be_a_workers_needs_the_right_to_write(
    client: Redis, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.cli.doctor.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("producer.cli.doctor._device", lambda: iter(()))
    wire.rights = frozenset({"s3:GetObject", "s3:ListBucket"})
    assert "AccessDenied" in the_bad_one("bucket")


def test_a_link_that_does_not_open_names_its_host_and_the_settings(
    client: Redis, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{held.getsockname()[1]}"
        monkeypatch.setattr("worker.storage.bucket.Bucket.url", lambda *_, **__: f"http://{host}/b/k?x=1")
        text = the_bad_one("bucket")
    assert text.startswith(f"a presigned link to {host} does not open (")
    assert text.endswith("and AWS_REGION and SMALLCAT_S3_ADDRESSING")
    listing = boto3.client("s3").list_objects_v2(Bucket=environment["S3_BUCKET"])
    assert listing.get("Contents", []) == []


def test_a_misspelt_setting_ends_the_examination(client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLCAT_MODLE", "x")
    with pytest.raises(SettingsError, match="Did you mean SMALLCAT_MODEL"):
        list(examine())


def test_files_beside_the_model_are_listed_and_what_is_wrong_with_any(client: Redis) -> None:
    good = FileEntry(kind="embedding", name="cat", sha256="ab" * 32, architecture="SD 1.x", size=3_200)
    bad = FileEntry(kind="embedding", name="dog", problem="it is a pickle: convert it")
    index = FileIndex.of([good, bad])
    Fleet(client, 1_000).indexes.put(index)
    announce(client, "a", files=index.digest)
    listed, wrong = found("files")
    assert (listed.ok, listed.text) == (True, "embedding cat: SD 1.x, 3,200 bytes, AutoV2 ABABABABAB")
    assert (wrong.ok, wrong.text) == (False, "embedding dog cannot be used: it is a pickle: convert it")
    of_each = [
        FileEntry(kind=kind, name=f"{number:02}", sha256=f"{number:064}", size=10)
        for kind in ("lora", "vae")
        for number in range(52)
    ]
    index = FileIndex.of([*of_each, FileEntry(kind="lora", name="x", problem="it is a LoHa: use a LoRA")])
    Fleet(client, 1_000).indexes.put(index)
    announce(client, "a", files=index.digest)
    texts = [each.text for each in found("files")]
    assert texts[0] == "LoRA 00: what it fits is not known, 10 bytes, AutoV2 0000000000"
    assert (texts[50], texts[101]) == (
        "and 2 more LoRA files that can be used",
        "and 2 more VAE files that can be used",
    )
    assert texts[102:] == ["LoRA x cannot be used: it is a LoHa: use a LoRA"]
    announce(client, "b")
    assert "offer different files (a; b): give them the same ones" in found("files")[-1].text
