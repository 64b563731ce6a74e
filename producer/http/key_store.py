"""The keys of the HTTP API, in Redis: hashes alone, never the keys.

    smallcat:http:keys        hash   SHA-256 of a key -> its name, scopes, tenant and time as JSON
    smallcat:http:keys:used   hash   a key's name -> when it was last used, in Unix seconds

A key has 256 random bits, so a plain hash cannot be searched for it.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from producer.http.tenant_store import TenantStore
from worker.contract.errors import CallerError
from worker.contract.explain import short
from worker.state.keys import HTTP_KEYS, HTTP_KEYS_USED

if TYPE_CHECKING:
    from redis.client import Redis

#: What a key may be allowed: `admin` includes the others, and jobs of other keys; a tenant's key, of its own.
SCOPES: Final = ("submit", "read", "admin")
#: The scopes of a key where none are named.
DEFAULT_SCOPES: Final = ("submit", "read")
#: Begins every key, so that scanners for leaked secrets can find it.
_BEGINNING: Final = "smallcat-"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key."""

    #: Its name: up to 64 letters, digits, dots, dashes and underscores.
    name: str
    #: What it may do: some of `SCOPES`.
    scopes: tuple[str, ...]
    #: Whose it is (`producer.http.tenant_store`); empty: nobody's in particular.
    tenant: str
    #: Unix seconds when it was made.
    created: int
    #: Unix seconds when it was last used, to about a minute; None: never.
    used: int | None = None


def digest_of(key: str) -> str:
    """The hash by which a key is known."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class KeyStore:
    """The keys in one Redis. Thread-safe. Raises redis-py's errors."""

    def __init__(self, client: Redis) -> None:
        self._redis = client

    def add(self, name: str, scopes: tuple[str, ...] = DEFAULT_SCOPES, tenant: str = "") -> str:
        """Make a key of that name and return it, this once: only its hash is kept. Raises `CallerError`."""
        return self.keep(f"{_BEGINNING}{secrets.token_urlsafe(32)}", name, scopes, tenant)

    def keep(self, key: str, name: str, scopes: tuple[str, ...], tenant: str = "") -> str:
        """Keep the hash of a `key` that was made elsewhere. Raises `CallerError`."""
        if not _NAME.fullmatch(name):
            raise CallerError(
                f"name is {short(name)}: use up to 64 letters, digits, dots, dashes and underscores."
            )
        if wrong := [scope for scope in scopes if scope not in SCOPES]:
            raise CallerError(f"scope is {short(wrong[0])}: use some of {', '.join(SCOPES)}.")
        if not scopes:
            raise CallerError(f"A key without a scope can do nothing: use some of {', '.join(SCOPES)}.")
        if tenant:
            TenantStore(self._redis).get(tenant)
        if any(each.name == name for each in self._all().values()):
            raise CallerError(f'There is a key "{name}" already: revoke it first, or use another name.')
        values = asdict(ApiKey(name, tuple(scopes), tenant, int(cast("Any", self._redis.time())[0])))
        values.pop("used")
        self._redis.hset(HTTP_KEYS, digest_of(key), json.dumps(values))
        return key

    def revoke(self, name: str) -> None:
        """Revoke the key of that name; servers refuse it within seconds. Raises `CallerError`."""
        found = [digest for digest, each in self._all().items() if each.name == name]
        if not found:
            raise CallerError(f"There is no key {short(name)}: `smallcat keys list` has all.")
        self._redis.hdel(HTTP_KEYS, *found)
        self._redis.hdel(HTTP_KEYS_USED, name)

    def list(self) -> list[ApiKey]:
        """All keys by name."""
        return sorted(self._all().values(), key=lambda each: each.name)

    def find(self, digest: str) -> ApiKey | None:
        """The key of that hash, and note that it was used; None where there is none."""
        text = cast("str | None", self._redis.hget(HTTP_KEYS, digest))
        found = _read(text, None)
        if found is not None:
            self._redis.hset(HTTP_KEYS_USED, found.name, int(cast("Any", self._redis.time())[0]))
        return found

    def _all(self) -> dict[str, ApiKey]:
        texts = cast("dict[str, str]", self._redis.hgetall(HTTP_KEYS))
        used = cast("dict[str, str]", self._redis.hgetall(HTTP_KEYS_USED))
        found = {digest: _read(text, used) for digest, text in texts.items()}
        return {digest: each for digest, each in found.items() if each is not None}


def _read(text: str | None, used: dict[str, str] | None) -> ApiKey | None:
    """The key that a text in Redis describes; None for what is none."""
    try:
        values = json.loads(text or "null")
        name = str(values["name"])
        last = (used or {}).get(name)
        return ApiKey(
            name,
            tuple(str(each) for each in values["scopes"]),
            str(values.get("tenant", "")),
            int(values["created"]),
            int(last) if last else None,
        )
    except (ValueError, TypeError, KeyError):
        return None
