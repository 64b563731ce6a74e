"""`REDIS_URL`: where Redis is, read and checked once, for redis-py and for Celery alike.

    redis://[[user]:password@]host[:6379][/db]          rediss:// for TLS
    unix://[[user]:password@]/path/of/socket[?db=1]     also as Celery writes it: redis+socket:///path
    redis+sentinel://[[user]:password@]host[:26379],host[:26379]/service[/db]    rediss+sentinel:// for TLS

User, password, path and service may hold any character as %XX. Behind a "?" there may be the options of
`OPTIONS`. Imports no client: producers and the `celery` command read it before they load one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn
from urllib.parse import parse_qsl, quote, unquote, urlencode

#: The forms, as an error shows them.
RULE: Final = (
    "must look like redis://[:password@]host:port/db, rediss:// for TLS, unix:///path/of/socket?db=0, or "
    "redis+sentinel://host:port,host:port/service/db"
)
_ONE_ADDRESS: Final = (
    "must be one address. Several are Sentinel's: redis+sentinel://host:port,host:port/service/db"
)

#: Scheme -> what it is called from here on. Kombu's own name of a socket is taken as well.
_SCHEMES: Final = {
    "redis": "redis",
    "rediss": "rediss",
    "unix": "unix",
    "redis+socket": "unix",
    "redis+sentinel": "redis+sentinel",
    "rediss+sentinel": "rediss+sentinel",
}
_REDIS_PORT, _SENTINEL_PORT = 6379, 26379

#: A second address, with a scheme of its own or behind the first one's port. A password may hold ";" and ",".
_SECOND_ADDRESS: Final = re.compile(r"[;,]\s*[a-z+]*://|@[^@/;,]*:\d+[;,]", re.IGNORECASE)


def _number(value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise ValueError("a database is a number, 0 or above")
    return int(value)


def _protocol(value: str) -> int:
    if value not in ("2", "3"):
        raise ValueError("2 or 3")
    return int(value)


def _certificates(value: str) -> str:
    """As redis-py names them; Python's own names, which Celery takes, mean the same."""
    name = value.lower().removeprefix("cert_")
    if name not in ("required", "optional", "none"):
        raise ValueError("required, optional or none")
    return name


def _boolean(value: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if value.lower() not in known:
        raise ValueError("true or false")
    return known[value.lower()]


def _file(value: str) -> str:
    if not Path(value).is_file():
        raise ValueError("a file that is there")
    return value


def _folder(value: str) -> str:
    if not Path(value).is_dir():
        raise ValueError("a folder that is there")
    return value


#: Options of a URL: what reads each, by the names that redis-py has for them. `ssl_*` are TLS' alone.
OPTIONS: Final[Mapping[str, Callable[[str], Any]]] = {
    "db": _number,
    "username": str,
    "password": str,
    "protocol": _protocol,
    "ssl_cert_reqs": _certificates,
    "ssl_ca_certs": _file,
    "ssl_ca_path": _folder,
    "ssl_certfile": _file,
    "ssl_keyfile": _file,
    "ssl_check_hostname": _boolean,
}
#: Names that Celery has for them.
_ALIASES: Final = {"virtual_host": "db"}


@dataclass(frozen=True)
class RedisURL:
    """A `REDIS_URL`, taken apart."""

    #: redis, rediss, unix, redis+sentinel or rediss+sentinel.
    scheme: str
    #: (host, port) of Redis, or of each sentinel; none for a socket.
    hosts: tuple[tuple[str, int], ...] = ()
    #: Path of the socket.
    path: str = ""
    #: Name by which sentinels know the primary and its replicas.
    service: str = ""
    #: Number of the database.
    db: int = 0
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    #: RESP version that was asked for.
    protocol: int | None = None
    #: redis-py's `ssl_*` arguments.
    tls_options: Mapping[str, str | bool] = field(default_factory=dict)

    @property
    def is_tls(self) -> bool:
        """Whether the connections are encrypted, those to sentinels included."""
        return self.scheme.startswith("rediss")

    @property
    def is_sentinel(self) -> bool:
        """Whether `hosts` are sentinels, which say where the primary is."""
        return self.scheme.endswith("+sentinel")

    @classmethod
    def parse(cls, url: str) -> RedisURL:
        """Read and check `url`. Raises `ValueError`, whose text never repeats what may be a password."""
        scheme, separator, rest = url.partition("://")
        known = _SCHEMES.get(scheme.lower())
        if separator and scheme.lower() in ("sentinel", "sentinels"):
            _refuse(
                f"{RULE}. {scheme.lower()}:// is written redis+sentinel:// here, rediss+sentinel:// for TLS"
            )
        if not separator or known is None:
            _refuse(RULE)
        place, _, query = rest.partition("#")[0].partition("?")
        options = _read_options(query)
        user, at, place = place.rpartition("@")
        if known in ("redis", "rediss") and _SECOND_ADDRESS.search(url):
            _refuse(_ONE_ADDRESS)
        if at and "/" in user:
            _refuse(f"{RULE}. Write special characters of the password as %XX")
        host, _, path = place.partition("/")
        is_tls, is_sentinel = known.startswith("rediss"), known.endswith("+sentinel")
        for name in options:
            if name.startswith("ssl_") and not is_tls:
                _refuse(f"must begin with rediss:// for its option {name!r}")
        if known == "unix":
            service, number = "", None
            if host or not path:
                _refuse(f"{RULE}. A socket's path begins with a third slash")
            path = "/" + unquote(path)
        elif is_sentinel:
            service, _, number = path.partition("/")
            path, service = "", unquote(service)
            if not service or service.isdigit():
                _refuse(f"{RULE}. The sentinels' name for the primary is missing, often it is mymaster")
        else:
            service, number, path = "", path, ""
            if re.search("[;,]", host):
                _refuse(_ONE_ADDRESS)
        username, _, password = user.partition(":")
        return cls(
            scheme=known,
            hosts=() if known == "unix" else read_hosts(host, _SENTINEL_PORT if is_sentinel else _REDIS_PORT),
            path=path,
            service=service,
            db=_database(number, options),
            username=unquote(username) or options.get("username"),
            password=unquote(password) or options.get("password"),
            protocol=options.get("protocol"),
            tls_options={name: value for name, value in options.items() if name.startswith("ssl_")},
        )

    def broker_url(self, schemes: Mapping[str, str]) -> str:
        """The same for Celery, `schemes[scheme]` being a scheme of a transport of our own.

        What a socket or sentinels need stands in the virtual host, before the database: the path, or all
        sentinels and the service. Kombu's own list of URLs would show the password to `celery inspect stats`.
        """
        user = quote(self.username or "", safe="")
        if self.password:
            user += ":" + quote(self.password, safe="")
        user = f"{user}@" if user else ""
        place = quote(self.path.removeprefix("/"))
        if self.is_sentinel:
            place = (
                f"{quote(','.join(map(_address, self.hosts)), safe=':,[]')}/{quote(self.service, safe='')}"
            )
        tail = f"/{place}/{self.db}" if place else f"/{self.db}"
        if self.tls_options:
            tail += "?" + urlencode({name: str(value) for name, value in self.tls_options.items()})
        host = _address(self.hosts[0]) if self.hosts else "localhost"
        return f"{schemes[self.scheme]}://{user}{host}{tail}"


def read_hosts(text: str, default_port: int = _SENTINEL_PORT) -> tuple[tuple[str, int], ...]:
    """(host, port) of each address in a list with commas. Raises `ValueError`."""
    found = []
    for each in text.split(","):
        match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:;@/\\\s]+))(?::(\d{1,5}))?", unquote(each))
        port = int(match[3] or default_port) if match else 0
        if match is None or not 0 < port < 65_536:
            _refuse(f"{RULE}. Write special characters of the password as %XX")
        found.append((match[1] or match[2], port))
    return tuple(found)


def _address(host: tuple[str, int]) -> str:
    name, port = host
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def hidden(redis_url: str) -> str:
    """`redis_url` without its password and options, for logs and errors."""
    scheme, _, rest = redis_url.partition("://")
    place = re.split("[?#]", rest, maxsplit=1)[0]
    user, at, place = place.rpartition("@")
    name, colon, _ = user.partition(":")
    shown = f"{name}:***@" if colon else f"{name}@" if at else ""
    return f"{scheme}://{shown}{place}"


def _read_options(query: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for given, value in parse_qsl(query, keep_blank_values=True):
        name = _ALIASES.get(given, given)
        if name not in OPTIONS:
            near = difflib.get_close_matches(given, OPTIONS, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(OPTIONS)}"
            _refuse(f"may not have an option {given[:60]!r}. {hint}")
        try:
            found[name] = OPTIONS[name](value)
        except ValueError as error:
            shown = "" if name == "password" else f", not {value[:100]!r}"
            _refuse(f"must have for its option {given!r}: {error}{shown}")
    return found


def _database(number: str | None, options: Mapping[str, Any]) -> int:
    given: int | None = options.get("db")
    if not number:
        return given or 0
    try:
        found = _number(unquote(number))
    except ValueError:
        _refuse(f"{RULE}. The database is a number")
    if given not in (None, found):
        _refuse(f"must name one database: its path says {found}, its option db says {given}")
    return found


def _refuse(rule: str) -> NoReturn:
    raise ValueError(rule)
