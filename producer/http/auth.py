"""Who calls: the one dependency that every route has, and that says what the caller may do.

A key comes as `Authorization: Bearer KEY`, or as the password of Basic, which clients of AUTOMATIC1111's API
send; there the user's name is ignored.
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

#: Seconds that a key is believed without asking Redis again, and so those after which a revoked one ends.
BELIEVED_S: Final = 5.0
#: Seconds that an unknown key is not looked up again, and keys that are remembered, at most.
UNKNOWN_S, MAX_KNOWN = 1.0, 10_000
#: Characters of an Authorization header that are looked at.
_LONGEST: Final = 1_000


class Authentication:
    """Finds the caller of a request's key. One for a server; remembers keys for seconds."""

    def __init__(self, backend: Backend, *, is_open: bool) -> None:
        self._backend, self._is_open = backend, is_open
        self._known: dict[str, tuple[Caller | None, float]] = {}

    async def caller(self, authorization: str | None) -> Caller:
        """The caller by an Authorization header. Raises `RefusedError` (401), `QueueError`."""
        if self._is_open:
            return replace(ANYBODY, owner=self._backend.session.settings.tenant)
        key = _key_in(authorization or "")
        if not key:
            raise _unauthorized("A key is missing: send it as `Authorization: Bearer KEY`.")
        digest = digest_of(key)
        caller, until_s = self._known.get(digest, (None, 0.0))
        if time.monotonic() >= until_s:
            caller = await self._backend.run(self._find, digest)
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[digest] = caller, time.monotonic() + (UNKNOWN_S if caller is None else BELIEVED_S)
        if caller is None:
            raise _unauthorized("There is no such key: `smallcat keys list` has all, by their names.")
        if caller.tenant and caller.limits is None:
            raise RefusedError(
                403,
                f"The tenant of this key, {caller.tenant}, was removed: `smallcat tenants list` has all.",
                code="Forbidden",
            )
        return caller

    def _find(self, digest: str) -> Caller | None:
        """The caller of a key, by Redis; without `limits` where its tenant is gone."""
        key = self._backend.keys.find(digest)
        if key is None:
            return None
        tenant = self._backend.tenants.find(key.tenant) if key.tenant else None
        owner = tenant.owner if tenant else self._backend.session.settings.tenant
        return Caller(key.name, frozenset(key.scopes), key.tenant, tenant, owner)


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


def _unauthorized(detail: str) -> RefusedError:
    challenge = 'Bearer realm="smallcat", Basic realm="smallcat"'
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
        caller = await authentication.caller(request.headers.get("authorization"))
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
