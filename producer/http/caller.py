"""Who sent a request, as all parts see it."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from producer.http.key_store import SCOPES

if TYPE_CHECKING:
    from producer.http.tenant_store import Tenant


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    #: The name of the key.
    name: str
    #: What it may do.
    scopes: frozenset[str]
    #: Whose it is; empty: nobody's in particular.
    tenant: str = ""
    #: The tenant's settings.
    limits: Tenant | None = None
    #: The tenant that the caller's jobs say.
    owner: str = ""

    @functools.cached_property
    def mark(self) -> str:
        """The hexadecimal digits that begin the ids of this caller's submissions: 8, or 20 of a tenant's."""
        return self.tenant_mark + _digits(f"{self.tenant}\0{self.name}", 8)

    @functools.cached_property
    def tenant_mark(self) -> str:
        """The first of them, which all keys of a tenant have; empty without a tenant."""
        return tenant_mark(self.tenant)

    @property
    def sees_all(self) -> bool:
        """Whether the caller sees the jobs of all tenants, and of those without one."""
        return self.may("admin") and not self.tenant

    @property
    def shares(self) -> bool:
        """Whether other tenants' jobs say the same owner: then a tenant sees only what it has submitted."""
        return self.limits is not None and bool(self.limits.pictures)

    def may(self, scope: str) -> bool:
        """Whether the caller may do what needs `scope`. A tenant's key may do it to that tenant's alone."""
        return scope in self.scopes or "admin" in self.scopes

    def owns(self, mark: str) -> bool:
        """Whether a submission or a run whose name begins with `mark` is the caller's to act on."""
        if not self.may("admin"):
            return mark.startswith(self.mark)
        return mark.startswith(self.tenant_mark)


def tenant_mark(tenant: str) -> str:
    """The hexadecimal digits that begin the names of a tenant's submissions and runs; empty without one."""
    return _digits(tenant, 12) if tenant else ""


def _digits(text: str, count: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:count]


#: Everybody, where the server asks for no key.
ANYBODY: Final = Caller("anybody", frozenset(SCOPES))
