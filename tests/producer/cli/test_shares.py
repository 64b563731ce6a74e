"""`smallcat shares`: weights are set, and what waits is listed by tenant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from deploy.embedded.servers import ValkeyProcess
from producer import submit_file, submit_job
from producer.cli.main import cli
from producer.session import session
from tests.fast_worker import announce
from worker.contract.errors import CallerError
from worker.contract.queues import WEIGHTS


@pytest.fixture(autouse=True)
def redis_url(valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", valkey.url)


def shares(*words: str) -> Result:
    return CliRunner().invoke(cli, ["shares", *words])


def test_weights_are_set_listed_and_taken_back() -> None:
    assert shares("set", "acme", "2.5").stdout == "acme has the weight 2.5\n"
    assert shares("set", "", "0.5").stdout == "(no tenant) has the weight 0.5\n"
    found = json.loads(shares("list", "--json").stdout)
    assert [(each["tenant"], each["weight"]) for each in found] == [("", 0.5), ("acme", 2.5)]
    assert "acme" in shares("list").stdout
    for tenant in ("acme", ""):
        shares("set", tenant, "1")
    assert session().redis.exists(WEIGHTS) == 0
    assert shares("list").stderr == "No jobs wait, and no tenant has a weight other than 1.\n"


@pytest.mark.parametrize(
    ("tenant", "weight", "why"),
    [
        ("A", "1", "'A' is no tenant"),
        ("a", "0", "0.01 to 100"),
        ("a", "nan", "0.01 to 100"),
        ("a", "101", "101"),
    ],
)
def test_what_is_no_tenant_or_no_weight_is_refused(tenant: str, weight: str, why: str) -> None:
    ran = shares("set", tenant, weight)
    assert isinstance(ran.exception, CallerError)
    assert why in str(ran.exception)


def test_what_waits_is_counted_for_each_tenant_and_in_all_figures(
    valkey: ValkeyProcess, tmp_path: Path
) -> None:
    announce(valkey.url)
    for number in range(3):
        submit_job("a cat", seed=number)
    handles = [submit_job("a cat", seed=number, tenant="a", priority=number) for number in range(4)]
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    submit_file(tmp_path / "p.txt", tenant="b", detach=True)
    found = {each["tenant"]: each["waiting"] for each in json.loads(shares("list", "--json").stdout)}
    assert found == {"": 3, "a": 4, "b": 2}
    assert sum(session().fleet.waiting().values()) == 9
    # A tenant sees what is its own.
    assert handles[0].progress().queued == 4
    ran = CliRunner().invoke(cli, ["doctor"])
    assert "9 jobs wait in" in ran.stdout
