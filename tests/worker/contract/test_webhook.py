"""Where a webhook may lead: by its address, and by what its name stands for."""

from __future__ import annotations

import ipaddress
import json

import pytest

from worker.contract.errors import InvalidJobError
from worker.contract.webhook import MAX_WEBHOOK, Hosts, hook_of, is_public

#: Addresses of this machine, of its networks, of many hosts, of clouds' metadata, and what leads to others.
NOT_PUBLIC = (
    *("0.0.0.0", "127.0.0.1", "127.1.2.3", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1"),  # noqa: S104
    *("169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.88.99.1", "198.18.0.1"),
    *("224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "192.0.2.1"),
    *("::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "ff0e::1", "2001:db8::1"),
    *("::7f00:1", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "2002:7f00:1::", "2001::1"),
)
PUBLIC = ("8.8.8.8", "1.1.1.1", "168.63.129.17", "2606:4700:4700::1111", "2a00:1450:4001::1")


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_an_address_that_is_not_public_is_never_connected_to_unless_it_is_listed(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    for given in (address, f"::ffff:{address}" if "." in address else address):
        literal = f"[{given}]" if ":" in given else given
        for text in ("", "*", "*.example.com,*", "10.255.0.0/16"):
            hosts = Hosts.parse(text)
            assert not hosts.permits("a.example.com", 443, given)
            with pytest.raises(ValueError, match="SMALLCAT_WEBHOOK_HOSTS"):
                hosts.check(f"https://{literal}/")
        listed = Hosts.parse(f"*, {address}")
        assert listed.permits("a.example.com", 443, given)
        assert listed.check(f"http://{literal}:81/")


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_permitted(address: str) -> None:
    literal = f"[{address}]" if ":" in address else address
    assert Hosts.parse("").permits("a.example.com", 443, address)
    assert Hosts.parse("").check(f"https://{literal}/")
    with pytest.raises(ValueError, match="does not list"):
        Hosts.parse("*.example.com").check(f"https://{literal}/")


@pytest.mark.parametrize(
    "url",
    [
        *("https://a.example.com", "https://a.example.com/b/c?d=e&f=%20", "HTTPS://A.Example.COM:443/"),
        *("https://a.example.com:8443/", "https://a.example.com./", "https://xn--bcher-kva.example/"),
    ],
)
def test_public_hosts_are_taken(url: str) -> None:
    assert json.loads(hook_of(url, "")) == {"url": url}
    assert json.loads(hook_of(url, "", "acme"))["tenant"] == "acme"


@pytest.mark.parametrize(
    ("url", "part"),
    [
        (7, "it must be a text"),
        ("", "is empty"),
        (["https://a.example.com"], "it must be a text"),
        ("a.example.com/hook", "is no address of https"),
        ("ftp://a.example.com", "is no address of https"),
        ("file:///etc/passwd", "is no address of https"),
        ("http://a.example.com", "use https, or list"),
        ("https://user:pa55@a.example.com/", "a user or a password"),
        ("https://a.example.com@127.0.0.1/", "a user or a password"),
        ("https://a.example.com/#x", "a fragment"),
        ("https://a.example.com:25/", "has the port 25"),
        ("https://a.example.com:0/", "no host that can be read"),
        ("https://a.example.com:99999/", "is no address"),
        ("https:///hook", "no host that can be read"),
        ("https://a..example.com/", "no host that can be read"),
        ("https://-a.example.com/", "no host that can be read"),
        ("https://2130706433/", "no host that can be read"),
        ("https://0x7f.0.0.1/", "no host that can be read"),
        ("https://127.1/", "no host that can be read"),
        ("https://0177.0.0.1/", "no host that can be read"),
        ("https://localhost/", "is not public"),
        ("https://backend/", "is not public"),
        ("https://metadata.google.internal/", "is not public"),
        ("https://a.example.com/ b", "blanks"),
        ("https://a.example.com\\@127.0.0.1/", "backslashes"),
        ("https://a.example.com/\n", "blanks"),
        ("https://bücher.example/", "beyond ASCII"),
        ("https://[::1", "is no address"),
        ("https://[fe80::1%25eth0]/", "is not public"),
        ("https://a.example.com/" + "x" * MAX_WEBHOOK, "the limit is 2,000"),
    ],
)
def test_others_are_refused_in_one_sentence(url: object, part: str) -> None:
    with pytest.raises(InvalidJobError, match=r"^webhook ") as refused:
        hook_of(url, "")
    assert part in str(refused.value)
    assert str(refused.value).endswith(".")
    assert "pa55" not in str(refused.value)


def test_a_host_that_is_listed_by_name_may_be_private_and_plain() -> None:
    hosts = Hosts.parse("backend:8080, Hooks.Example.com")
    assert hosts.check("http://backend:8080/x")
    assert hosts.check("http://hooks.example.com./x")
    assert hosts.permits("backend", 8080, "172.17.0.2")
    for url in ("http://backend/", "https://other.example.com/", "https://x.hooks.example.com/"):
        with pytest.raises(ValueError, match="does not list"):
            hosts.check(url)
    assert not hosts.permits("other.example.com", 443, "172.17.0.2")


def test_a_pattern_permits_public_hosts_below_it_by_https_alone() -> None:
    hosts = Hosts.parse("*.example.com, 10.0.0.0/8")
    assert hosts.check("https://a.b.example.com/")
    for url in ("https://example.com/", "https://badexample.com/", "http://a.example.com/"):
        with pytest.raises(ValueError, match="SMALLCAT_WEBHOOK_HOSTS"):
            hosts.check(url)
    assert hosts.permits("a.example.com", 443, "10.1.1.1"), "that network is listed"
    assert not hosts.permits("a.example.com", 443, "192.168.1.1")


def test_nothing_is_no_webhook() -> None:
    assert hook_of(None, "") == ""
