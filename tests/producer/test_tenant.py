"""A tenant's jobs, as producers submit them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from redis import Redis

from producer import JobHandle, submit_file, submit_job
from producer.ingest.plan import Planned, unresolved
from producer.ingest.submit_file import make_plan, make_variants
from tests.producer.test_client import client, environment, finish, fleet, records, storage
from worker.contract.errors import InvalidJobError, SettingsError, UnknownJobError
from worker.contract.found_message import FoundMessage
from worker.contract.job import Job
from worker.state.fleet import Fleet
from worker.state.keys import job_key
from worker.state.records import Records
from worker.storage.bucket import Bucket

__all__ = ["client", "environment", "fleet", "records", "storage"]


def test_a_job_is_its_callers_tenants(fleet: Fleet, client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    nobodys = submit_job("a small cat", seed=3)
    said = submit_job("a small cat", seed=3, tenant="acme")
    assert nobodys.record().job.tenant == ""
    monkeypatch.setenv("SMALLCAT_TENANT", "acme")
    assert submit_job("a small cat", seed=3).id == said.id != nobodys.id
    assert submit_job(Job(prompt="a small cat", seed=3)).id == said.id
    assert submit_job("a small cat", seed=3, tenant="other").record().job.tenant == "other"
    # What is known of a job is submitted again as it was.
    assert submit_job(nobodys.record().job).id == nobodys.id
    with pytest.raises(InvalidJobError, match="tenant is 'A'"):
        submit_job("a small cat", tenant="A")
    monkeypatch.setenv("SMALLCAT_TENANT", "a/b")
    with pytest.raises(SettingsError, match=r"SMALLCAT_TENANT has the value 'a/b'\. It must be 1 to 40"):
        submit_job("a small cat")


def test_a_tenants_record_is_found_in_its_folder_when_redis_has_it_no_longer(
    fleet: Fleet, records: Records, storage: Bucket, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = submit_job("a small cat", seed=3, tenant="acme")
    finish(records, storage, handle.record().job)
    assert handle.result(5).uri == storage.uri(handle.id, handle.result(5).job.format, "acme")
    client.delete(job_key(handle.id))
    assert handle.result(5).data()
    assert JobHandle(handle.id, tenant="acme").record().job.tenant == "acme"
    for tenant in (None, "other"):
        with pytest.raises(UnknownJobError):
            JobHandle(handle.id, tenant=tenant).record()
    monkeypatch.setenv("SMALLCAT_TENANT", "acme")
    assert JobHandle(handle.id).image().size


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "prompt,tenant\na cat,other\n"),
        ("p.jsonl", json.dumps({"prompt": "a cat", "tenant": "other"})),
        ("p.tsv", "prompt\tTenant\na cat\tother\n"),
    ],
)
def test_a_column_of_a_file_never_says_whose_jobs_they_are(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(text)
    variants = make_variants({}, 1, None, {}, None, None, literal=False)
    digests = set()
    for tenant in ("", "acme"):
        monkeypatch.setenv("SMALLCAT_TENANT", tenant)
        plan = make_plan([str(tmp_path / name)], file_format=None, variants=variants)
        [planned] = plan.items(unresolved)
        assert isinstance(planned, Planned)
        assert planned.templated.shape.get("tenant", "") == tenant
        [(found, value)] = planned.templated.metadata.items()
        assert (found.lower(), value) == ("tenant", "other")
        digests.add(plan.digest)
    assert len(digests) == 2, "another tenant's run is another run"


def test_a_file_is_submitted_for_the_tenant_that_python_names(
    fleet: Fleet, client: Redis, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(InvalidJobError, match="tenant is 'A'"):
        submit_file(tmp_path / "p.txt", tenant="A")
    submit_file(tmp_path / "p.txt", tenant="acme", detach=True)
    [name] = [each for each in client.scan_iter("smallcat.*") if each.endswith("t=acme")]
    [job] = [FoundMessage.read(each).job for each in client.lrange(name, 0, -1)]
    assert job is not None
    assert job.tenant == "acme"
