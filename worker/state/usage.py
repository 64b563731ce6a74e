"""What tenants have used: pictures, the device's time and bytes, by day.

    smallcat:worker-only:usage:<day>   hash   "<tenant>:<what>" -> a number; days since 1970-01-01 (UTC), kept
                                              for 400 days

The script that marks a job done counts it (`usage.lua`), so a picture counts once, however often it was
rendered or its message came back. One that was in the bucket already is counted apart. Producers cannot
write it.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from worker.contract.errors import CallerError
from worker.contract.explain import short
from worker.state.keys import USAGE

if TYPE_CHECKING:
    from redis.client import Redis

#: Days for which usage is kept.
KEPT_DAYS: Final = 400
_EPOCH: Final = datetime.date(1970, 1, 1)
#: What is counted, as the fields end.
_COUNTED: Final = ("images", "cached", "device_us", "bytes")


class Used(NamedTuple):
    """What one job has used."""

    #: Whether its picture was in the bucket already.
    is_cached: bool = False
    #: Its share of the device's time, in seconds.
    device_s: float = 0.0
    #: Bytes of its picture.
    size: int = 0

    def of(self, tenant: str) -> str:
        """As `usage.lua` takes it."""
        made, cached = int(not self.is_cached), int(self.is_cached)
        return f"{tenant} {made} {cached} {round(self.device_s * 1e6)} {self.size}"


class Usage(NamedTuple):
    """What a tenant has used in a day."""

    #: The day (UTC), as 2026-11-28.
    day: str
    tenant: str
    #: Pictures that were made.
    images: int
    #: Jobs that were answered by a picture which was in the bucket already.
    cached: int
    #: Seconds of the device's time: of each step the share of its jobs' rows.
    gpu_s: float
    #: Bytes of the pictures that were made.
    bytes: int


def read_usage(
    client: Redis, since: datetime.date, until: datetime.date, tenant: str | None = None
) -> list[Usage]:
    """What was used from `since` to `until`, both included; by day, then by tenant. None: all tenants.

    Raises `CallerError` for more days than are kept, or none.
    """
    days = (until - since).days + 1
    if not 1 <= days <= KEPT_DAYS:
        raise CallerError(
            f"{since} to {until} are {days:,} days: ask for 1 to {KEPT_DAYS}, for which they are kept."
        )
    dates = [since + datetime.timedelta(number) for number in range(days)]
    with client.pipeline(transaction=False) as pipe:
        for date in dates:
            key = f"{USAGE}{(date - _EPOCH).days}"
            if tenant is None:
                pipe.hgetall(key)
            else:
                pipe.hmget(key, [f"{tenant}:{what}" for what in _COUNTED])
        found = pipe.execute()
    if tenant is None:
        return [each for date, fields in zip(dates, found, strict=True) for each in _all(date, fields)]
    rows = [_usage(date, tenant, values) for date, values in zip(dates, found, strict=True)]
    return [row for row in rows if row is not None]


def day_of(text: str, name: str) -> datetime.date:
    """The day in a text such as 2026-11-28. Raises `CallerError`; `name` is what the text is called."""
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise CallerError(f"{name} is {short(text)}: write a day as 2026-11-28.") from None


def _all(date: datetime.date, fields: dict[str, str]) -> Iterator[Usage]:
    for tenant in sorted({name.partition(":")[0] for name in fields}):
        row = _usage(date, tenant, [fields.get(f"{tenant}:{what}") for what in _COUNTED])
        if row is not None:
            yield row


def _usage(date: datetime.date, tenant: str, values: list[Any]) -> Usage | None:
    """A row; None where nothing was used."""
    if not any(values):
        return None
    images, cached, device_us, size = (int(value or 0) for value in values)
    return Usage(date.isoformat(), tenant, images, cached, device_us / 1e6, size)
