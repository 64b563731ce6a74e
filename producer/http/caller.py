"""Who sent a request, as all parts see it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from producer.http.key_store import SCOPES


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    #: The name of the key.
    name: str
    #: What it may do.
    scopes: frozenset[str]
    #: Whose it is; empty: there are no tenants.
    tenant: str = ""

    @property
    def mark(self) -> str:
        """8 hexadecimal digits that begin the ids of this caller's submissions."""
        return hashlib.sha256(f"{self.tenant}\0{self.name}".encode()).hexdigest()[:8]

    def may(self, scope: str) -> bool:
        """Whether the caller may do what needs `scope`."""
        return scope in self.scopes or "admin" in self.scopes


#: Everybody, where the server asks for no key.
ANYBODY: Final = Caller("anybody", frozenset(SCOPES))
