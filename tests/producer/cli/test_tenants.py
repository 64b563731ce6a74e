"""`smallcat tenants`, and keys that belong to one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from deploy.embedded.servers import ValkeyProcess
from producer.cli.main import cli
from producer.http.key_store import KeyStore, digest_of
from producer.http.tenant_store import SETTINGS, TenantStore
from worker.contract.errors import CallerError
from worker.state.redis_client import connect


@pytest.fixture(autouse=True)
def redis_url(valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", valkey.url)


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, words, catch_exceptions=False)


def tenant(*words: str) -> Any:
    return json.loads(call("tenants", *words, "--json").stdout)


#: Another value of each limit, as options, and as it is kept.
OTHER = {
    "requests_per_s": (("--requests-per-s", "2.5"), 2.5),
    "burst": (("--burst", "7"), 7),
    "max_queued": (("--max-queued", "1,000"), 1_000),
    "max_pixel_steps": (("--max-pixel-steps", "512x512x50"), 512 * 512 * 50),
    "max_pixel_steps_a_day": (("--max-pixel-steps-a-day", "512x512x50x1000"), 512 * 512 * 50_000),
    "max_priority": (("--max-priority", "5"), 5),
    "formats": (("--format", "png", "--format", "webp"), ["png", "webp"]),
    "models": (("--model", "a/b", "--model", "c"), ["a/b", "c"]),
    "pictures": (("--pictures", "stock"), "stock"),
}


def test_every_setting_is_set_kept_when_another_is_and_taken_away() -> None:
    assert set(OTHER) == set(SETTINGS)
    assert tenant("add", "acme") | {"created": 0} == {
        "name": "acme",
        "created": 0,
        "typed": {},
        **dict.fromkeys(SETTINGS),
        "formats": [],
        "models": [],
        "pictures": "",
    }
    for name, (words, value) in OTHER.items():
        assert tenant("set", "acme", *words)[name] == value
    made = tenant("set", "acme", "--burst", "8")
    assert {name: made[name] for name in SETTINGS} == {name: value for name, (_, value) in OTHER.items()} | {
        "burst": 8
    }
    assert json.loads(call("tenants", "list", "--json").stdout) == [made]
    assert "max-queued 1,000" in call("tenants", "list").stdout
    for name, (words, _) in OTHER.items():
        assert not tenant("set", "acme", words[0], "none")[name]
    assert "without limits" in call("tenants", "list").stdout


def test_limits_are_shown_as_they_were_typed() -> None:
    tenant("add", "acme", "--max-pixel-steps-a-day", "1024x1024x30x5000")
    shown = "max-pixel-steps-a-day 1024x1024x30x5000"
    assert shown in call("tenants", "set", "acme", "--burst", "8").stdout
    assert shown in call("tenants", "list").stdout
    text = call("tenants", "set", "acme", "--max-pixel-steps-a-day", "5000").stdout
    assert "max-pixel-steps-a-day 5,000" in text


def test_a_key_belongs_to_a_tenant_that_stays_while_it_has_keys(valkey: ValkeyProcess) -> None:
    tenant("add", "acme")
    key = call("keys", "add", "site", "--tenant", "acme").stdout.strip()
    with connect(valkey.url, 1) as client:
        found = KeyStore(client).find(digest_of(key))
        assert found is not None
        assert found.tenant == "acme"
        assert TenantStore(client).get("acme").name == "acme"
    assert "tenant acme" in call("keys", "list").stdout
    with pytest.raises(CallerError, match="acme has 1 key, such as site: `smallcat keys revoke NAME` first"):
        call("tenants", "remove", "acme")
    call("keys", "revoke", "site")
    assert call("tenants", "remove", "acme").stdout == "acme is removed\n"
    assert call("tenants", "list").stdout == ""


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("tenants", "add", "A b"), "name is 'A b': use up to 40 lower-case letters"),
        (("tenants", "add", "shared-x"), "and not shared-"),
        (("tenants", "add", "x" * 41), "use up to 40 lower-case letters"),
        (
            ("tenants", "set", "nobody", "--burst", "1"),
            "There is no tenant 'nobody': `smallcat tenants list`",
        ),
        (("tenants", "set", "nobody"), "Which setting?"),
        (
            ("tenants", "add", "t", "--max-priority", "10"),
            "max_priority is 10: it must be 0 to 9",
        ),
        (
            ("tenants", "add", "t", "--requests-per-s", "0"),
            "requests_per_s is 0.0: it must be above 0 and up to 1,000,000",
        ),
        (
            ("tenants", "add", "t", "--format", "png", "--format", "none"),
            "--format is none and something else",
        ),
        (("keys", "add", "k", "--tenant", "nobody"), "There is no tenant 'nobody'"),
        (("tenants", "remove", "nobody"), "There is no tenant 'nobody'"),
    ],
)
def test_what_cannot_be_done_is_said(words: tuple[str, ...], part: str) -> None:
    with pytest.raises(CallerError) as caught:
        call(*words)
    assert part in str(caught.value)


def test_an_empty_model_is_refused_in_whole_words() -> None:
    tenant("add", "acme")
    with pytest.raises(CallerError, match="it must have at least 1 character"):
        call("tenants", "set", "acme", "--model", "")


def test_a_limit_that_is_no_number_is_refused() -> None:
    answer = call("tenants", "add", "t", "--max-queued", "many")
    assert answer.exit_code == 2
    assert "'many' is no limit: use a number, or none." in answer.stderr


def test_a_tenant_is_added_once() -> None:
    tenant("add", "acme")
    with pytest.raises(CallerError, match='There is a tenant "acme" already'):
        call("tenants", "add", "acme")
