"""Secrets by tenant: from the environment and from files, two while one replaces the other."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from producer.webhooks.payload import headers_of
from producer.webhooks.secrets import Secrets, new_secret
from worker.contract.errors import CallerError, SettingsError


def test_it_signs_as_the_specification_does() -> None:
    """The example of Standard Webhooks' own tests (standardwebhooks 1.1.0)."""
    headers = headers_of(
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1_614_265_330,
        b'{"test": 2432232314}',
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert headers["webhook-timestamp"] == "1614265330"


def test_a_new_secret_is_one(tmp_path: Path) -> None:
    assert Secrets(new_secret(), "").of("")
    assert Webhook(new_secret())


def test_rotation_keeps_the_old_one_until_it_is_dropped(tmp_path: Path) -> None:
    secrets = Secrets("", str(tmp_path / "secrets"))
    first = secrets.rotate("acme", is_new=True)
    assert secrets.of("acme") == [first]
    with pytest.raises(CallerError, match="--rotate"):
        secrets.rotate("acme", is_new=True)
    second = secrets.rotate("acme")
    assert secrets.of("acme") == [second, first]
    third = secrets.rotate("acme")
    assert secrets.of("acme") == [third, second]
    assert [secrets.drop_old("acme") for _ in range(2)] == [1, 0]
    assert secrets.of("acme") == [third]
    path = tmp_path / "secrets" / "acme"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [each.name for each in path.parent.iterdir()] == ["acme"]


def test_tenants_have_no_part_in_each_others(tmp_path: Path) -> None:
    own = new_secret()
    secrets = Secrets(own, str(tmp_path))
    assert secrets.of("") == [own]
    with pytest.raises(SettingsError, match="smallcat webhooks secret --tenant acme"):
        secrets.of("acme")
    other = secrets.rotate("acme")
    assert secrets.of("acme") == [other]
    for name in ("_default", "../acme", "a/b", "", ".."):
        if name:
            with pytest.raises(SettingsError, match="no secret of a tenant named"):
                secrets.of(name)


@pytest.mark.parametrize(
    "text", ["x", "whsec_", "whsec_AAAA", "whsec_é", f"whsec_{'A' * 200}", "whsec_!" * 9]
)
def test_what_is_no_secret_is_refused_without_showing_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "acme").write_text(text)
    for read in (lambda: Secrets(text, ""), lambda: Secrets("", str(tmp_path)).of("acme")):
        with pytest.raises(SettingsError, match="is no secret") as refused:
            read()
        assert text not in str(refused.value) or text in "whsec_"


def test_three_are_too_many() -> None:
    with pytest.raises(SettingsError, match="the limit is 2"):
        Secrets(" ".join(new_secret() for _ in range(3)), "")


def test_without_a_folder_nothing_is_written() -> None:
    with pytest.raises(SettingsError, match="SMALLCAT_WEBHOOK_SECRETS_DIR"):
        Secrets("", "").rotate("")
