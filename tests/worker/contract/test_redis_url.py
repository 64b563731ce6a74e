"""`REDIS_URL`: what is understood, and what is said about the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.contract.redis_url import OPTIONS, RedisURL, hidden


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h", RedisURL("redis", (("h", 6379),))),
        ("REDIS://h", RedisURL("redis", (("h", 6379),))),
        ("redis://u:p@h:7000/3", RedisURL("redis", (("h", 7000),), db=3, username="u", password="p")),
        ("redis://:p@[::1]:7000/", RedisURL("redis", (("::1", 7000),), password="p")),
        ("redis://:p%40%2F%3A@h", RedisURL("redis", (("h", 6379),), password="p@/:")),
        ("redis://:a@b@h", RedisURL("redis", (("h", 6379),), password="a@b")),
        ("redis://h?db=5&protocol=3", RedisURL("redis", (("h", 6379),), db=5, protocol=3)),
        ("redis://h/5?db=5", RedisURL("redis", (("h", 6379),), db=5)),
        ("redis://h?password=p&username=u", RedisURL("redis", (("h", 6379),), username="u", password="p")),
        ("unix:///run/redis.sock", RedisURL("unix", path="/run/redis.sock")),
        ("unix:///a%3Fb/my redis.sock?db=1", RedisURL("unix", path="/a?b/my redis.sock", db=1)),
        ("unix://u:p@/r.sock", RedisURL("unix", path="/r.sock", username="u", password="p")),
        ("redis+socket:///r.sock?virtual_host=1", RedisURL("unix", path="/r.sock", db=1)),
        (
            "redis+sentinel://u:p@a:1,b,[::1]:3/main/2",
            RedisURL(
                "redis+sentinel",
                (("a", 1), ("b", 26379), ("::1", 3)),
                service="main",
                db=2,
                username="u",
                password="p",
            ),
        ),
        ("redis+sentinel://a/main", RedisURL("redis+sentinel", (("a", 26379),), service="main")),
        ("redis+sentinel://a/main?db=4", RedisURL("redis+sentinel", (("a", 26379),), service="main", db=4)),
        ("rediss+sentinel://a/m", RedisURL("rediss+sentinel", (("a", 26379),), service="m")),
    ],
)
def test_a_url_is_taken_apart(url: str, expected: RedisURL) -> None:
    assert RedisURL.parse(url) == expected


@pytest.mark.parametrize("value", ["none", "NONE", "CERT_NONE", "cert_none"])
def test_certificates_are_named_as_redis_py_and_as_python_name_them(value: str) -> None:
    assert RedisURL.parse(f"rediss://h?ssl_cert_reqs={value}").tls_options == {"ssl_cert_reqs": "none"}


def test_tls_options_are_those_of_redis_py(tmp_path: Path) -> None:
    (certificates := tmp_path / "ca.pem").touch()
    url = f"rediss://h?ssl_ca_certs={certificates}&ssl_ca_path={tmp_path}&ssl_check_hostname=False"
    assert RedisURL.parse(url).tls_options == {
        "ssl_ca_certs": str(certificates),
        "ssl_ca_path": str(tmp_path),
        "ssl_check_hostname": False,
    }


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("redis://h?ssl_cert_req=none", ["'ssl_cert_req'", "Did you mean 'ssl_cert_reqs'?"]),
        ("redis://h?sunshine=1", ["'sunshine'", ", ".join(OPTIONS)]),
        ("redis://h?socket_timeout=1", ["'socket_timeout'"]),
        ("redis://h?db=x", ["'db'", "a database is a number", "'x'"]),
        ("redis://h?db=-1", ["'db'", "'-1'"]),
        ("redis://h/1?db=2", ["its path says 1, its option db says 2"]),
        ("redis://h?protocol=4", ["'protocol'", "2 or 3", "'4'"]),
        ("redis://h?ssl_cert_reqs=none", ["must begin with rediss://", "'ssl_cert_reqs'"]),
        ("unix:///r?ssl_cert_reqs=none", ["must begin with rediss://"]),
        ("rediss://h?ssl_cert_reqs=never", ["required, optional or none", "'never'"]),
        (
            "rediss://h?ssl_ca_certs=/not/there.pem",
            ["'ssl_ca_certs'", "a file that is there", "/not/there.pem"],
        ),
        ("rediss://h?ssl_ca_path=/not/there", ["a folder that is there"]),
        ("rediss://h?ssl_check_hostname=perhaps", ["true or false"]),
        ("redis://h/x", ["The database is a number"]),
        ("redis://h:0", ["must look like redis://"]),
        ("redis://h:65536", ["must look like redis://"]),
        ("redis://h:1:2", ["must look like redis://"]),
        ("redis:///1", ["must look like redis://"]),
        ("redis://:a/b@h", ["Write special characters of the password as %XX"]),
        ("unix://run/redis.sock", ["a third slash"]),
        ("unix://", ["a third slash"]),
        ("sentinel://a:26379", ["redis+sentinel://"]),
        ("sentinel://a:26379;sentinel://b:26379/0", ["redis+sentinel://"]),
        ("redis+sentinel://a:26379", ["name for the primary is missing"]),
        ("redis+sentinel://a:26379/0", ["name for the primary is missing"]),
        ("redis+sentinel://a:26379/main/x", ["The database is a number"]),
        ("redis+sentinel://a:26379,/main", ["must look like redis://"]),
        ("redis+sentinel://a;b/main", ["must look like redis://"]),
        ("http://h", ["must look like redis://"]),
        ("h:6379", ["must look like redis://"]),
        ("", ["must look like redis://"]),
    ],
)
def test_what_is_wrong_is_named_with_the_remedy(url: str, parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^(must|may)") as caught:
        RedisURL.parse(url)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:hunter2@h:1/2", "redis://u:***@h:1/2"),
        ("redis://:hunter2@h?db=2", "redis://:***@h"),
        ("redis://u@h", "redis://u@h"),
        ("redis://h?password=hunter2", "redis://h"),
        ("unix://u:hunter2@/run/r.sock?db=2", "unix://u:***@/run/r.sock"),
        ("redis+sentinel://u:hunter2@a:1,[::1]:2/main/3", "redis+sentinel://u:***@a:1,[::1]:2/main/3"),
    ],
)
def test_a_shown_url_has_no_password(url: str, shown: str) -> None:
    assert hidden(url) == shown
    assert "hunter2" not in repr(RedisURL.parse(url))


@pytest.mark.parametrize("option", ["password=hunter2&", "ssl_ca_certs=/not/there&"])
def test_an_error_repeats_no_password(option: str) -> None:
    for scheme in ("redis", "rediss"):
        with pytest.raises(ValueError, match=r"must|may") as caught:
            RedisURL.parse(f"{scheme}://:hunter2@h?{option}protocol=9")
        assert "hunter2" not in str(caught.value)
