"""Who calls: the one dependency that every route has, and that says what the caller may do.

A key comes as `Authorization: Bearer KEY`, or as the password of Basic, which clients of AUTOMATIC1111's API
send; there the user's name is ignored. A browser that has signed in on the page sends its session's cookie
instead (`sessions`), on every route alike.
"""

from __future__ import annotations

import base64
import binascii
import time
from dataclasses import replace
from typing import Annotated, Final

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import Request

from producer.http.backend import Backend, backend_of
from producer.http.caller import ANYBODY, Caller
from producer.http.key_store import digest_of
from producer.http.problems import RefusedError
from producer.http.sessions import COOKIE, PROOF_HEADER, is_proof
from producer.http.sessions import digest_of as session_digest
from worker.contract.errors import QueueError

#: Seconds that a key is believed without asking Redis again, and so those after which a revoked one ends.
BELIEVED_S: Final = 5.0
#: Seconds that an unknown key is not looked up again, and keys that are remembered, at most.
UNKNOWN_S, MAX_KNOWN = 1.0, 10_000
#: Characters of an Authorization header that are looked at.
_LONGEST: Final = 1_000
#: Methods that change nothing, for which a session's cookie is enough.
_SAFE: Final = frozenset(("GET", "HEAD", "OPTIONS"))


class Authentication:
    """Finds the caller of a request's key. One for a server; remembers keys for seconds."""

    def __init__(self, backend: Backend, *, is_open: bool) -> None:
        self._backend, self._is_open = backend, is_open
        self._known: dict[str, tuple[Caller | None, float]] = {}
        self._sessions: dict[str, tuple[str | None, float]] = {}

    @property
    def is_open(self) -> bool:
        """Whether everybody may do everything, without a key."""
        return self._is_open

    async def caller(self, request: Request) -> Caller:
        """The caller of a request. Raises `RefusedError` (401, 403), `QueueError`."""
        if self._is_open:
            return replace(ANYBODY, owner=self._backend.session.settings.tenant)
        authorization = request.headers.get("authorization")
        token = request.cookies.get(COOKIE)
        if authorization is None and token:
            return await self._signed_in(request, token)
        key = _key_in(authorization or "")
        if not key:
            raise _unauthorized("A key is missing: send it as `Authorization: Bearer KEY`.")
        if (caller := await self.of_key(digest_of(key))) is None:
            raise _unauthorized("There is no such key: `smallcat keys list` has all, by their names.")
        require_tenant(caller)
        return caller

    async def _signed_in(self, request: Request, token: str) -> Caller:
        """The caller of a browser's session."""
        name = session_digest(token)
        digest, until_s = self._sessions.get(name, (None, 0.0))
        if time.monotonic() >= until_s:
            digest = await self._backend.run(self._backend.sessions.key_of, token)
            if len(self._sessions) >= MAX_KNOWN:
                self._sessions.clear()
            self._sessions[name] = digest, time.monotonic() + (UNKNOWN_S if digest is None else BELIEVED_S)
        caller = None if digest is None else await self.of_key(digest)
        if caller is None:
            # Without a challenge for Basic, at which a browser would ask for a password of its own.
            raise _unauthorized("You are signed out: sign in again.", basic=False)
        require_tenant(caller)
        if request.method not in _SAFE and not is_proof(token, request.headers.get(PROOF_HEADER, "")):
            raise RefusedError(
                403,
                f"The request lacks the session's proof, {PROOF_HEADER}: load the page again, or send a key.",
                code="Forbidden",
            )
        return caller

    def forget(self, token: str) -> None:
        """Ask Redis again about a session that was signed out here."""
        self._sessions.pop(session_digest(token), None)

    async def of_key(self, digest: str) -> Caller | None:
        """The caller with the key of that hash; None where there is no such key. Raises `QueueError`."""
        caller, until_s = self._known.get(digest, (None, 0.0))
        if time.monotonic() >= until_s:
            caller = await self._backend.run(self._find, digest)
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[digest] = caller, time.monotonic() + (UNKNOWN_S if caller is None else BELIEVED_S)
        return caller

    def _find(self, digest: str) -> Caller | None:
        """The caller of a key, by Redis; without `limits` where its tenant is gone."""
        key = self._backend.keys.find(digest)
        if key is None:
            return None
        tenant = self._backend.tenants.find(key.tenant) if key.tenant else None
        owner = tenant.owner if tenant else self._backend.session.settings.tenant
        return Caller(key.name, frozenset(key.scopes), key.tenant, tenant, owner)


class Rights:
    """What the caller of a request that goes on may still do. Asked again every `BELIEVED_S` seconds."""

    def __init__(self, request: Request, caller: Caller) -> None:
        self._request, self._caller = request, caller
        self._asked_s = time.monotonic()

    async def have_ended(self) -> bool:
        """Whether the key, the session, the tenant or the rights are other than when the request began."""
        if time.monotonic() - self._asked_s < BELIEVED_S:
            return False
        self._asked_s = time.monotonic()
        authentication: Authentication = self._request.app.state.authentication
        try:
            return await authentication.caller(self._request) != self._caller
        except RefusedError as error:
            return error.status in (401, 403)
        except QueueError:
            return False  # Nobody can tell: Redis is away.


def require_tenant(caller: Caller) -> None:
    """Raise `RefusedError` (403) where the tenant of the caller's key is gone."""
    if caller.tenant and caller.limits is None:
        raise RefusedError(
            403,
            f"The tenant of this key, {caller.tenant}, was removed: `smallcat tenants list` has all.",
            code="Forbidden",
        )


def _key_in(authorization: str) -> str:
    scheme, _, value = authorization[:_LONGEST].strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            text = base64.b64decode(value.strip(), validate=True).decode()
        except (binascii.Error, ValueError):
            return ""
        return text.partition(":")[2]
    return ""


def _unauthorized(detail: str, *, basic: bool = True) -> RefusedError:
    challenge = 'Bearer realm="smallcat"' + (', Basic realm="smallcat"' if basic else "")
    return RefusedError(401, detail, code="Unauthorized", headers={"WWW-Authenticate": challenge})


_bearer = HTTPBearer(auto_error=False, description="A key of `smallcat keys add NAME`.")


class Needs:
    """The dependency of a route: the caller, who must have `scope`. Raises `RefusedError` (401, 403, 429)."""

    def __init__(self, scope: str) -> None:
        self._scope = scope

    async def __call__(
        self,
        request: Request,
        _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    ) -> Caller:
        """The caller of this request."""
        authentication: Authentication = request.app.state.authentication
        caller = await authentication.caller(request)
        if not caller.may(self._scope):
            raise RefusedError(
                403,
                f'The key "{caller.name}" has no scope {self._scope}: make one with '
                f"`smallcat keys add NAME --scope {self._scope}`.",
                code="Forbidden",
            )
        await request.app.state.backend.limits.request(caller)
        request.state.caller = caller
        return caller


#: The callers of routes, by what they must be allowed.
Submitter = Annotated[Caller, Depends(Needs("submit"))]
Reader = Annotated[Caller, Depends(Needs("read"))]
Admin = Annotated[Caller, Depends(Needs("admin"))]
Shared = Annotated[Backend, Depends(backend_of)]
