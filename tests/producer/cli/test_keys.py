"""`smallcat keys`: what is printed, and what is kept."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from deploy.embedded.servers import ValkeyProcess
from producer.cli.main import cli
from producer.http.key_store import KeyStore, digest_of
from tests.full_redis import full
from worker.contract.errors import CallerError
from worker.state.redis_client import connect


@pytest.fixture(autouse=True)
def redis_url(valkey: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", valkey.url)


def keys(*words: str) -> Result:
    return CliRunner().invoke(cli, ["keys", *words])


def test_a_key_is_made_listed_and_revoked(valkey: ValkeyProcess) -> None:
    key = keys("add", "website").stdout.strip()
    assert key.startswith("smallcat-")
    assert len(key) > 40
    assert keys("add", "robot", "--scope", "read", "--scope", "admin").exit_code == 0
    with connect(valkey.url, 1) as client:
        store = KeyStore(client)
        found = store.find(digest_of(key))
        assert found is not None
        assert (found.name, found.scopes, found.tenant, found.used) == (
            "website",
            ("submit", "read"),
            "",
            None,
        )
        [robot, website] = json.loads(keys("list", "--json").stdout)
        assert (robot["name"], robot["scopes"], robot["used"]) == ("robot", ["read", "admin"], None)
        assert website["used"] >= website["created"]
        assert key not in keys("list").stdout
        assert "website" in keys("list").stdout
        assert keys("revoke", "website").stdout == "website is revoked\n"
        assert store.find(digest_of(key)) is None


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("add", "a b"), "name is 'a b': use up to 64 letters"),
        (("add", ""), "name is ''"),
        (("add", "x" * 65), "use up to 64 letters"),
        (("revoke", "nobody"), "There is no key 'nobody': `smallcat keys list` has all."),
        (("rotate", "nobody"), "There is no key 'nobody': `smallcat keys list` has all."),
    ],
)
def test_what_cannot_be_done_is_said(words: tuple[str, ...], part: str) -> None:
    with pytest.raises(CallerError) as caught:
        CliRunner().invoke(cli, ["keys", *words], catch_exceptions=False)
    assert part in str(caught.value)


def test_a_key_is_rotated_while_both_are_valid(valkey: ValkeyProcess) -> None:
    old = keys("add", "site", "--scope", "admin").stdout.strip()
    with connect(valkey.url, 1) as client:
        store = KeyStore(client)
        store.find(digest_of(old))
        new = keys("rotate", "site").stdout.strip()
        assert [(each["name"], each["scopes"], each["used"] is not None) for each in listed()] == [
            ("site", ["admin"], True),
            ("site", ["admin"], False),
        ]
        lines = keys("list").stdout.splitlines()
        assert [line.rpartition("  ")[2] for line in lines] == ["older: --drop-old revokes it", "newer"]
        found = [store.find(digest_of(key)) for key in (old, new)]
        # The name is what submissions and runs are known by.
        assert [each and (each.name, each.scopes, each.tenant) for each in found] == 2 * [
            ("site", ("admin",), "")
        ]
        with pytest.raises(CallerError, match=r"There are 2 keys 'site' already: .*rotate site --drop-old"):
            CliRunner().invoke(cli, ["keys", "rotate", "site"], catch_exceptions=False)
        assert keys("rotate", "site", "--drop-old").stdout == "the older key site is revoked\n"
        assert [store.find(digest_of(key)) is None for key in (old, new)] == [True, False]
        assert keys("rotate", "site", "--drop-old").stdout == "site has one key alone\n"
        keys("rotate", "site")
        keys("revoke", "site")
        assert listed() == []
        assert not client.exists("smallcat:http:keys", "smallcat:http:keys:used")


def test_the_last_use_that_an_earlier_server_has_noted_is_shown(valkey: ValkeyProcess) -> None:
    """It noted the name alone, which says nothing while there are two keys of it."""
    keys("add", "site")
    with connect(valkey.url, 1) as client:
        client.hset("smallcat:http:keys:used", "site", 1_700_000_000)
        assert [each["used"] for each in listed()] == [1_700_000_000]
        keys("rotate", "site")
        assert [each["used"] for each in listed()] == [None, None]


def test_a_key_is_let_in_by_a_full_redis(valkey: ValkeyProcess) -> None:
    """Its last use is not noted then."""
    key = keys("add", "site").stdout.strip()
    with connect(valkey.url, 1) as client:
        with full(client):
            assert KeyStore(client).find(digest_of(key)) is not None
            assert [each["used"] for each in listed()] == [None]
        assert KeyStore(client).find(digest_of(key)) is not None
        assert listed()[0]["used"]


def listed() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(keys("list", "--json").stdout)
    return found


def test_a_name_is_one_keys_alone() -> None:
    keys("add", "twice")
    with pytest.raises(CallerError, match='There is a key "twice" already'):
        CliRunner().invoke(cli, ["keys", "add", "twice"], catch_exceptions=False)
