"""Whose job it is: it is hashed, leads to one folder, and is not said by who writes the job."""

from __future__ import annotations

import json
from typing import Any

import pytest

from producer.cli.job_options import JOB_OPTIONS
from producer.ingest.download import FIELDS as NAME_FIELDS
from producer.ingest.message_templates import JobTemplates
from producer.ingest.plan import unresolved
from producer.ingest.submit_file import AXES
from producer.prompts.fields import meaning_of, near_miss
from worker.contract import infotext
from worker.contract.errors import InvalidJobError
from worker.contract.job import WRITTEN_FIELDS, Job, hashed
from worker.contract.message import COST, Message, payload_of, route_of, task_call_of
from worker.contract.object_keys import object_key
from worker.contract.record import JobRecord, State

WHOLE: dict[str, Any] = {"prompt": "a small cat", "seed": 1, "width": 64, "height": 64, "steps": 4}
#: What is no tenant's name, and would lead elsewhere in the bucket or in Redis.
NO_NAMES = ["Acme", "a/b", "..", "a.b", "a_b", "a b", "é", "a\n", "a\0", "a:b", "*", "a" * 41, "\x06\x16"]


def job(**fields: Any) -> Job:
    return Job.parse(WHOLE | fields)


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_tenants_name_is_refused_everywhere(name: str) -> None:
    with pytest.raises(InvalidJobError, match=r"^tenant is .+(1 to 40 lower-case letters|the limit is 40)"):
        job(tenant=name)
    with pytest.raises(InvalidJobError):
        job().of_tenant(name)
    with pytest.raises(InvalidJobError):
        JobTemplates(unresolved).fill(WHOLE, name)
    with pytest.raises(ValueError, match="use 1 to 40"):
        object_key("0" * 32, "png", name)
    payload = payload_of(job(tenant="acme"))
    forged = json.loads(json.dumps(payload).replace('"acme"', json.dumps(name)))
    with pytest.raises(InvalidJobError):
        Message.parse(forged)


def test_equal_jobs_of_two_tenants_are_two_jobs_and_those_without_one_stay_as_they_were() -> None:
    ids = {job().id, job(tenant="a").id, job(tenant="b").id, job(tenant="-").id}
    assert len(ids) == 4
    assert job(tenant="").id == job().id
    without = [job().model_dump_json(), json.dumps(payload_of(job())), hashed(job().model_dump(mode="json"))]
    assert not [text for text in without if "tenant" in text]
    assert (job().version, job(tenant="a" * 40).version) == (1, 3)
    assert Message.parse(payload_of(job(tenant="a"))).job.tenant == "a"


def test_another_tenant_in_a_message_is_another_id_and_so_is_refused() -> None:
    payload = json.loads(json.dumps(payload_of(job(tenant="a"))).replace('"tenant": "a"', '"tenant": "b"'))
    with pytest.raises(InvalidJobError, match="its job's id is"):
        Message.parse(payload)


def test_a_tenants_message_says_what_its_job_costs_and_others_do_not() -> None:
    costs = {tenant: route_of(job(tenant=tenant)).cost for tenant in ("", "a")}
    assert costs == {"": 0, "a": 64 * 64 * 4}
    assert route_of(job(tenant="a", steps=None)).cost == 0
    assert "headers" not in task_call_of(job())
    assert task_call_of(job(tenant="a"))["headers"] == {COST: 64 * 64 * 4}


def test_each_tenant_has_a_folder_of_its_own() -> None:
    names = ["", "a", "b", "images", "tenants", "00", "a-b"]
    keys = {object_key("0" * 32, "png", name) for name in names}
    assert len(keys) == len(names)
    assert object_key("0" * 32, "png", "a") == f"images/tenants/a/00/{'0' * 32}.png"


def test_nobody_who_writes_a_job_says_whose_it_is() -> None:
    assert "tenant" not in {*WRITTEN_FIELDS, *JOB_OPTIONS, *AXES, *NAME_FIELDS}
    assert meaning_of("tenant") is meaning_of("Tenant ") is near_miss("tenant") is None
    text = infotext.write(job(tenant="acme", guidance_scale=7.5, model="m", revision="r"))
    assert "acme" not in text
    assert infotext.read(text.replace("Version: ", "Tenant: acme, tenant: acme, Version: ")).tenant == ""
    with pytest.raises(InvalidJobError, match="it follows from who submits"):
        JobTemplates(unresolved).fill(WHOLE | {"tenant": "acme"}, "b")


def test_a_job_keeps_its_tenant_and_its_lack_of_one_when_a_record_is_submitted_again() -> None:
    assert job().of_tenant("b").tenant == "b"
    for mine in (job(), job(tenant="a")):
        text = JobRecord(id=mine.id, state=State.DONE, job=mine).model_dump_json()
        assert JobRecord.model_validate_json(text).job.of_tenant("b") == mine


def test_the_fleets_default_syntax_is_taken_for_a_tenants_job_as_well() -> None:
    assert not job().of_tenant("a").says_syntax
