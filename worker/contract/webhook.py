"""Where a webhook may lead: what its address must look like, and which machines it may stand for.

By default every public host, by https alone. `SMALLCAT_WEBHOOK_HOSTS` narrows that, and opens it:

    hooks.example.com       this host, wherever it is, also by http
    hooks.internal:8080     likewise, at this port alone
    10.1.0.0/16, 127.0.0.1  these addresses, also by http; and what a permitted name may stand for
    *.example.com           hosts below it, at public addresses and by https
    *                       every host, likewise

An address is checked twice: as text where it is submitted, and by what its name stands for when the sender
connects, because a name may stand for something else by then.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import re
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import SplitResult, urlsplit

from worker.contract.errors import InvalidJobError
from worker.contract.explain import short

#: Characters of a webhook's address, at most.
MAX_WEBHOOK: Final = 2_000
#: Version of messages that a submission with a webhook needs: workers of earlier versions tell nobody.
WEBHOOK_SINCE: Final = 3
#: The least port that an unlisted host may have, beside those of https.
_LEAST_PORT: Final = 1_024
_PORTS: Final = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: A host's name in lower case. The last label of a name is no number.
_NAME: Final = re.compile(
    r"(?=.{1,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
)
_NUMBER: Final = re.compile(r"(.*\.)?(0x[0-9a-f]*|[0-9]+)")
#: All that is public in version 6 of IP, and what of it leads elsewhere: Teredo, and 6to4.
_PUBLIC_6: Final = ipaddress.ip_network("2000::/3")
_NOT_PUBLIC: Final = tuple(
    map(
        ipaddress.ip_network,
        # Teredo and 6to4 with its relays, which lead to other addresses; metadata of Azure and Oracle.
        ("2001::/32", "2002::/16", "192.88.99.0/24", "168.63.129.16/32", "192.0.0.0/24"),
    )
)


@dataclass(frozen=True)
class Hosts:
    """The hosts that webhooks may lead to: `SMALLCAT_WEBHOOK_HOSTS`."""

    #: Names, each with its port; None: any port.
    names: frozenset[tuple[str, int | None]]
    #: Addresses, likewise.
    networks: tuple[tuple[Network, int | None], ...]
    #: What names may end in, from the dot on; "" for all names.
    endings: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """The hosts in a text, separated by commas; every public host for an empty one.

        Raises `ValueError` with the end of a sentence that begins with the setting's name.
        """
        names: set[tuple[str, int | None]] = set()
        networks: list[tuple[Network, int | None]] = []
        endings: list[str] = []
        for item in filter(None, map(str.strip, (text or "*").lower().split(","))):
            if item == "*" or item.startswith("*."):
                if item != "*" and not _NAME.fullmatch(item[2:]):
                    raise _no_host(item)
                endings.append(item[1:])
                continue
            host, port = _host_and_port(item)
            try:
                networks.append((ipaddress.ip_network(host), port))
            except ValueError:
                if not _NAME.fullmatch(host) or _NUMBER.fullmatch(host):
                    raise _no_host(item) from None
                names.add((host.rstrip("."), port))
        return cls(frozenset(names), tuple(networks), tuple(endings))

    def check(self, url: object) -> SplitResult:
        """The parts of a webhook's address. Raises `ValueError` with the end of a sentence."""
        parts = _parts_of(url)
        host, port = host_of(parts), port_of(parts)
        is_listed = self._lists(host, port)
        if not is_listed and not self._has_pattern_for(host):
            raise ValueError(f"leads to {short(host)}, which SMALLCAT_WEBHOOK_HOSTS does not list")
        if is_listed:
            return parts
        if parts.scheme != "https":
            raise ValueError(
                f"leads to {short(host)} by http: use https, or list this host in SMALLCAT_WEBHOOK_HOSTS"
            )
        if port != _PORTS["https"] and port < _LEAST_PORT:
            raise ValueError(
                f"has the port {port}: use 443 or one from {_LEAST_PORT} on, or list the host in "
                "SMALLCAT_WEBHOOK_HOSTS"
            )
        address = _address(host)
        if (address is not None and not is_public(address)) or (address is None and _is_local(host)):
            raise ValueError(
                f"leads to {short(host)}, which is not public: list it in SMALLCAT_WEBHOOK_HOSTS to permit it"
            )
        return parts

    def permits(self, host: str, port: int, address: str) -> bool:
        """Whether a connection for `host` may be made to the address that its name stands for now."""
        found = _address(address.partition("%")[0])
        if found is None:
            return False
        return (
            (host, port) in self.names
            or (host, None) in self.names
            or (self._lists(str(found), port) or is_public(found))
        )

    def _lists(self, host: str, port: int) -> bool:
        """Whether the host is listed by its name or by its address."""
        if (host, port) in self.names or (host, None) in self.names:
            return True
        address = _address(host)
        return address is not None and any(
            address in network and only in (None, port) for network, only in self.networks
        )

    def _has_pattern_for(self, host: str) -> bool:
        return any(
            not ending or (host.endswith(ending) and _address(host) is None) for ending in self.endings
        )


def is_public(address: Address) -> bool:
    """Whether an address is a public host's: none of this machine, its network, or many hosts."""
    if isinstance(address, ipaddress.IPv6Address) and address not in _PUBLIC_6:
        return False
    return address.is_global and not address.is_multicast and not any(address in each for each in _NOT_PUBLIC)


def hook_of(url: object, hosts: str, tenant: str = "") -> str:
    """What Redis keeps of a submission's webhook, as JSON; "" for none.

    `hosts` is `SMALLCAT_WEBHOOK_HOSTS`. Raises `InvalidJobError` for an address that it does not permit.
    """
    if url is None:
        return ""
    try:
        _parsed(hosts).check(url)
    except ValueError as error:
        raise InvalidJobError(f"webhook {error}.") from None
    return json.dumps({"url": url, **({"tenant": tenant} if tenant else {})})


@functools.lru_cache(maxsize=8)
def _parsed(hosts: str) -> Hosts:
    return Hosts.parse(hosts)


def host_of(parts: SplitResult) -> str:
    """The host of a webhook's address, in lower case and without a dot at its end."""
    return (parts.hostname or "").rstrip(".")


def port_of(parts: SplitResult) -> int:
    """Its port."""
    return _PORTS[parts.scheme] if parts.port is None else parts.port


def _parts_of(url: object) -> SplitResult:
    if not isinstance(url, str):
        raise ValueError(f"is {short(url)}: it must be a text, such as https://example.com/hook")
    if not url:
        raise ValueError("is empty: leave it out, or write https://example.com/hook")
    if len(url) > MAX_WEBHOOK:
        raise ValueError(f"has {len(url):,} characters, the limit is {MAX_WEBHOOK:,}")
    if not re.fullmatch(r"[!-\[\]-~]+", url):
        raise ValueError(
            "holds blanks, backslashes, or characters beyond ASCII: write them as %20, and names as xn--"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(f"is {short(url)}, which is no address: write https://example.com/hook") from None
    if parts.scheme not in _PORTS:
        raise ValueError("is no address of https: write https://example.com/hook")
    if "@" in parts.netloc:
        raise ValueError("has a user or a password before its host: notifications are signed instead")
    if "#" in url:
        raise ValueError("has a fragment, after #, which is never sent: leave it out")
    host = host_of(parts)
    if port == 0 or (_address(host) is None and (not _NAME.fullmatch(host) or _NUMBER.fullmatch(host))):
        raise ValueError("has no host that can be read: write https://example.com/hook")
    return parts


def _address(host: str) -> Address | None:
    """The IP address that a text is, in version 4 where one of version 6 stands for it; None: it is none."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _is_local(host: str) -> bool:
    """Whether a name means this machine or its network alone."""
    return "." not in host or host.endswith((".localhost", ".local", ".internal"))


def _host_and_port(item: str) -> tuple[str, int | None]:
    """The parts of one listed host. Raises `ValueError`."""
    found = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:]+))(?::([0-9]{1,5}))?", item)
    if found is None and item.count(":") > 1:
        return item, None  # Version 6 of IP.
    if found is None or not 0 < int(found[3] or 1) < 65_536:
        raise _no_host(item)
    return found[1] or found[2], int(found[3]) if found[3] else None


def _no_host(item: str) -> ValueError:
    return ValueError(
        f"must be hosts such as example.com, *.example.com, host:8080 or 10.0.0.0/8, and {item!r} is none"
    )
