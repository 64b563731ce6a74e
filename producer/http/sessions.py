"""Sign-ins of browsers, which keep no key: a cookie has a random token, and Redis has the token's SHA-256.

    smallcat:http:session:<SHA-256 of the token>   string   the SHA-256 of the key that signed in
    smallcat:http:sessions:<SHA-256 of the key>    zset     its sessions, by when they began

A session ends with its key, when it is signed out, when its key has signed in 20 times more, and after a
week. The cookie is HttpOnly and SameSite, so that neither scripts nor pages of other sites can use it.
Requests that change something need the session's proof as well, which only a script of the page can read.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import TYPE_CHECKING, Final, cast

from worker.state.keys import HTTP_SESSION, HTTP_SESSIONS

if TYPE_CHECKING:
    from redis.client import Redis

#: The cookie, and the header with the proof.
COOKIE, PROOF_HEADER = "smallcat_session", "x-csrf-token"
#: Seconds that a session lasts.
LASTS_S: Final = 7 * 86_400
#: Sessions that a key has, at most: one more ends the oldest.
MAX_SESSIONS: Final = 20
#: Characters of a token that are looked at: a token has 43.
_LONGEST: Final = 100


class Sessions:
    """The sessions in one Redis. Thread-safe. Raises redis-py's errors."""

    def __init__(self, client: Redis) -> None:
        self._redis = client

    def begin(self, key_digest: str) -> str:
        """Sign in with the key of that hash, which is known to be valid. Returns the token."""
        token = secrets.token_urlsafe(32)
        of_key = f"{HTTP_SESSIONS}{key_digest}"
        with self._redis.pipeline() as pipe:
            pipe.set(_name(token), key_digest, ex=LASTS_S)
            pipe.zadd(of_key, {digest_of(token): time.time()})
            pipe.expire(of_key, LASTS_S)
            pipe.zrangebyscore(of_key, "-inf", "+inf")
            found = cast("list[str]", pipe.execute()[-1])
        if too_many := found[:-MAX_SESSIONS]:
            self._redis.delete(*(f"{HTTP_SESSION}{each}" for each in too_many))
            self._redis.zrem(of_key, *too_many)
        return token

    def key_of(self, token: str) -> str | None:
        """The hash of the key that signed in; None where there is no such session (any more)."""
        return cast("str | None", self._redis.get(_name(token)))

    def end(self, token: str) -> None:
        """Sign out."""
        if key_digest := self.key_of(token):
            self._redis.delete(_name(token))
            self._redis.zrem(f"{HTTP_SESSIONS}{key_digest}", digest_of(token))


def digest_of(token: str) -> str:
    """The hash by which a session is known."""
    return hashlib.sha256(token[:_LONGEST].encode("utf-8", "surrogateescape")).hexdigest()


def proof_of(token: str) -> str:
    """What a request that changes something must bring beside the cookie."""
    return hmac.new(token[:_LONGEST].encode("utf-8", "surrogateescape"), b"csrf", "sha256").hexdigest()[:32]


def is_proof(token: str, proof: str) -> bool:
    """Whether `proof` is that of the session."""
    return hmac.compare_digest(proof_of(token).encode(), proof.encode("utf-8", "surrogateescape"))


def _name(token: str) -> str:
    return f"{HTTP_SESSION}{digest_of(token)}"
