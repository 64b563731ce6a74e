"""Tenants that wait in the queues, and their weights. `worker/broker/shares.lua` deals out the shares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from worker.contract.errors import CallerError
from worker.contract.job_checks import is_tenant
from worker.contract.job_parameters import MAX_PRIORITY
from worker.contract.queues import SHARES, WEIGHTS, arrivals_of, list_of
from worker.contract.refusals import code_of

if TYPE_CHECKING:
    from redis.client import Redis

#: A tenant's weight is these two numbers at least and at most; without one it is 1.
MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0
#: Tenants whose lists are measured in one round trip.
_AT_ONCE: Final = 100


def tenants_in(client: Redis, queue: str) -> list[str]:
    """The tenants that may have messages in a queue.

    Empty where this user may not read it: the ACL of an earlier version does not name these keys.
    """
    with client.pipeline(transaction=False) as pipe:
        for class_, step in enumerate((0, MAX_PRIORITY)):
            pipe.zrange(f"{SHARES}{queue}:{class_}", 0, -1)
            pipe.lrange(arrivals_of(queue, step), 0, -1)
        found = pipe.execute(raise_on_error=False)
    refused = [each for each in found if isinstance(each, Exception)]
    if refused and any(code_of(each) != "NOPERM" for each in refused):
        raise refused[0]
    names = {str(name) for each in found if isinstance(each, list) for name in each}
    return sorted(filter(is_tenant, names))


def lists_of_tenant(queue: str, tenant: str) -> list[str]:
    """A tenant's Redis lists in a queue, most urgent first."""
    return [list_of(queue, step, tenant) for step in range(MAX_PRIORITY + 1)]


def waiting_of_tenants(client: Redis, queue: str) -> dict[str, int]:
    """How many messages wait in a queue, for each tenant that has some."""
    found: dict[str, int] = {}
    for part in _parts(tenants_in(client, queue)):
        with client.pipeline(transaction=False) as pipe:
            for tenant in part:
                for name in lists_of_tenant(queue, tenant):
                    pipe.llen(name)
            lengths = iter(pipe.execute())
        for tenant in part:
            found[tenant] = sum(next(lengths) for _ in range(MAX_PRIORITY + 1))
    return {tenant: count for tenant, count in found.items() if count}


class Weights:
    """The tenants' weights: among tenants that wait, each gets as much as its weight. Not for producers."""

    def __init__(self, client: Redis) -> None:
        self._redis = client

    def all(self) -> dict[str, float]:
        """Those that are not 1, by tenant; "" stands for jobs without one."""
        found: Any = self._redis.hgetall(WEIGHTS)
        return {str(tenant): _number(text) for tenant, text in sorted(found.items())}

    def set(self, tenant: str, weight: float) -> None:
        """Give a tenant this weight. Raises `CallerError`."""
        if tenant and not is_tenant(tenant):
            raise CallerError(
                f"{tenant!r} is no tenant: names have 1 to 40 lower-case letters, digits and hyphens."
            )
        if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise CallerError(f"weight is {weight:g}: it must be {MIN_WEIGHT:g} to {MAX_WEIGHT:g}.")
        if weight == 1:
            self._redis.hdel(WEIGHTS, tenant)
        else:
            self._redis.hset(WEIGHTS, tenant, f"{weight:g}")


def _number(text: object) -> float:
    try:
        number = float(str(text))
    except ValueError:
        return 1.0
    return number if math.isfinite(number) and MIN_WEIGHT <= number <= MAX_WEIGHT else 1.0


def _parts(tenants: Sequence[str]) -> Iterator[Sequence[str]]:
    return (tenants[start : start + _AT_ONCE] for start in range(0, len(tenants), _AT_ONCE))
