"""The keys of the HTTP API, in Redis: hashes alone, never the keys.

    smallcat:http:keys        hash   SHA-256 of a key -> its name, scopes, tenant and time as JSON
    smallcat:http:keys:used   hash   a key's name, and its name with its hash -> Unix seconds of its last use

A key has 256 random bits, so a plain hash cannot be searched for it. While a key is rotated there are two of
its name: whatever one of them has submitted is the other's, too.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

from producer.http.tenant_store import TenantStore
from worker.contract.errors import CallerError
from worker.contract.explain import short
from worker.contract.refusals import code_of
from worker.state.keys import HTTP_KEYS, HTTP_KEYS_USED

if TYPE_CHECKING:
    from redis.client import Redis

#: What a key may be allowed: `admin` includes the others, and jobs of other keys; a tenant's key, of its own.
SCOPES: Final = ("submit", "read", "admin")
#: The scopes of a key where none are named.
DEFAULT_SCOPES: Final = ("submit", "read")
#: Begins every key, so that scanners for leaked secrets can find it.
_BEGINNING: Final = "smallcat-"
#: Keys of one name that are valid at once, at most.
MOST: Final = 2
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
            raise CallerError(
                f'There is a key "{name}" already: `smallcat keys rotate {name}` makes a new one beside it; '
                "else revoke it first, or use another name."
            )
        return self._put(key, ApiKey(name, tuple(scopes), tenant, self._now()))

    def rotate(self, name: str) -> str:
        """Make a second key beside that of the name, and return it, this once. Both are valid.

        Raises `CallerError` where there is none, or there are two already.
        """
        known = self._of(name)
        if len(known) >= MOST:
            older = f"`smallcat keys rotate {name} --drop-old` revokes the older one"
            raise CallerError(f"There are {len(known)} keys {short(name)} already: {older}.")
        last = max(known.values(), key=lambda each: each.created)
        created = max(self._now(), last.created + 1)  # It is the newer one within a second, too.
        key = f"{_BEGINNING}{secrets.token_urlsafe(32)}"
        return self._put(key, ApiKey(name, last.scopes, last.tenant, created))

    def drop_old(self, name: str) -> int:
        """Revoke all keys of that name but the newest. Returns how many. Raises `CallerError`."""
        old = sorted(self._of(name).items(), key=lambda item: item[1].created)[:-1]
        self._remove(name, [digest for digest, _ in old])
        return len(old)

    def revoke(self, name: str) -> None:
        """Revoke all keys of that name; servers refuse them within seconds. Raises `CallerError`."""
        self._remove(name, list(self._of(name)))
        self._redis.hdel(HTTP_KEYS_USED, name)

    def list(self) -> list[ApiKey]:
        """All keys by name, the older one of a name first."""
        return sorted(self._all().values(), key=lambda each: (each.name, each.created))

    def find(self, digest: str) -> ApiKey | None:
        """The key of that hash, and note that it was used; None where there is none."""
        text = cast("str | None", self._redis.hget(HTTP_KEYS, digest))
        found = _read(text)
        if found is not None:
            used = self._now()
            items: list[str | int] = [_own_use(found.name, digest), used]
            try:
                self._redis.hset(HTTP_KEYS_USED, found.name, used, items=items)
            except Exception as error:
                # A full Redis refuses it. That is no reason to let nobody read or cancel, which makes room.
                if code_of(error) != "OOM":
                    raise
        return found

    def _put(self, key: str, known: ApiKey) -> str:
        values = asdict(known)
        values.pop("used")
        self._redis.hset(HTTP_KEYS, digest_of(key), json.dumps(values))
        return key

    def _remove(self, name: str, digests: Sequence[str]) -> None:
        if digests:
            self._redis.hdel(HTTP_KEYS, *digests)
            self._redis.hdel(HTTP_KEYS_USED, *(_own_use(name, digest) for digest in digests))

    def _now(self) -> int:
        return int(cast("Any", self._redis.time())[0])

    def _of(self, name: str) -> dict[str, ApiKey]:
        """The keys of that name by their hashes. Raises `CallerError` where there is none."""
        found = {digest: each for digest, each in self._all().items() if each.name == name}
        if not found:
            raise CallerError(f"There is no key {short(name)}: `smallcat keys list` has all.")
        return found

    def _all(self) -> dict[str, ApiKey]:
        texts = cast("dict[str, str]", self._redis.hgetall(HTTP_KEYS))
        used = cast("dict[str, str]", self._redis.hgetall(HTTP_KEYS_USED))
        read = {digest: _read(text) for digest, text in texts.items()}
        found = {digest: each for digest, each in read.items() if each is not None}
        names = Counter(each.name for each in found.values())

        def last_used(digest: str, name: str) -> int | None:
            # Servers of earlier versions note the name alone.
            noted = used.get(_own_use(name, digest)) or (used.get(name) if names[name] == 1 else None)
            return int(noted) if noted else None

        return {digest: replace(each, used=last_used(digest, each.name)) for digest, each in found.items()}


def _own_use(name: str, digest: str) -> str:
    """The field that says when this key of the name was used last. No name has a blank."""
    return f"{name} {digest[:16]}"


def _read(text: str | None) -> ApiKey | None:
    """The key that a text in Redis describes; None for what is none."""
    try:
        values = json.loads(text or "null")
        return ApiKey(
            str(values["name"]),
            tuple(str(each) for each in values["scopes"]),
            str(values.get("tenant", "")),
            int(values["created"]),
        )
    except (ValueError, TypeError, KeyError):
        return None
