"""The tenants of the HTTP API and their limits, in Redis.

    smallcat:http:tenants   hash   a tenant's name -> its settings as JSON

A key belongs to a tenant, or to none (`producer.http.key_store`). `producer.http.limits` says what the limits
mean; a server believes what it has read for a few seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker.contract.choices import ImageFormat
from worker.contract.errors import CallerError
from worker.contract.explain import short
from worker.contract.job_parameters import MAX_MODEL, MAX_PRIORITY
from worker.contract.limits import limits_of, requirement
from worker.state.keys import HTTP_TENANTS

if TYPE_CHECKING:
    from redis.client import Redis

#: What a tenant's name looks like.
NAME: Final = r"[a-z0-9][a-z0-9-]{0,39}"
#: Begins the name under which tenants that share their pictures have them in the bucket and in the queue; no
#: tenant's own name begins so.
SHARED: Final = "shared-"
#: The largest number of a limit.
MOST: Final = 10**15


class Tenant(BaseModel):
    """A tenant and its settings. None, or what is empty: there is no such limit."""

    model_config = ConfigDict(frozen=True)

    #: Its name: up to 40 lower-case letters, digits and hyphens.
    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    #: Unix seconds when it was added, by Redis' clock.
    created: int = 0
    #: Requests a second in the long run, of all its keys together; above 0.
    requests_per_s: Annotated[float | None, Field(gt=0, le=1e6, allow_inf_nan=False)] = None
    #: Requests that may come at once after a pause. Not given: two seconds' worth, at least 1.
    burst: Annotated[int | None, Field(ge=1, le=MOST)] = None
    #: Jobs that wait or run.
    max_queued: Annotated[int | None, Field(ge=1, le=MOST)] = None
    #: Width x height x steps of a job.
    max_pixel_steps: Annotated[int | None, Field(ge=1, le=MOST)] = None
    #: Width x height x steps of all jobs that are submitted in a day (UTC).
    max_pixel_steps_a_day: Annotated[int | None, Field(ge=1, le=MOST)] = None
    #: The highest priority that a job may ask for, 0 to 9.
    max_priority: Annotated[int | None, Field(ge=0, le=MAX_PRIORITY)] = None
    #: The formats that a job may ask for.
    formats: tuple[ImageFormat, ...] = ()
    #: The models that a job may ask for, by their names.
    models: tuple[Annotated[str, Field(min_length=1, max_length=MAX_MODEL)], ...] = ()
    #: Tenants with the same word here share pictures: their equal jobs are one job, rendered once. Each sees
    #: what it has submitted itself. Empty: the tenant shares with nobody.
    pictures: Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9-]{0,29})?$")] = ""

    #: How limits were typed that are products, such as 1024x1024x30, by their names.
    typed: dict[str, str] = {}

    @property
    def owner(self) -> str:
        """The tenant that its jobs say: a part of their ids, and of the keys of their pictures."""
        return f"{SHARED}{self.pictures}" if self.pictures else self.name


#: The settings by name.
SETTINGS: Final = tuple(name for name in Tenant.model_fields if name not in ("name", "created", "typed"))


class TenantStore:
    """The tenants in one Redis. Thread-safe. Raises redis-py's errors."""

    def __init__(self, client: Redis) -> None:
        self._redis = client

    def add(self, name: str, settings: Mapping[str, Any]) -> Tenant:
        """Add a tenant. Raises `CallerError`."""
        if not re.fullmatch(NAME, name) or name.startswith(SHARED):
            raise CallerError(
                f"name is {short(name)}: use up to 40 lower-case letters, digits and hyphens, a "
                f"letter or digit first, and not {SHARED}."
            )
        made = _checked({"name": name, "created": int(cast("Any", self._redis.time())[0]), **settings})
        if not self._redis.hsetnx(HTTP_TENANTS, name, made.model_dump_json()):
            raise CallerError(f'There is a tenant "{name}" already: `smallcat tenants set` changes it.')
        return made

    def set(self, name: str, settings: Mapping[str, Any]) -> Tenant:
        """Change those settings of a tenant; the others stay. Raises `CallerError`."""
        before = self.get(name)
        typed = {each: text for each, text in before.typed.items() if each not in settings}
        typed |= settings.get("typed", {})
        made = _checked(before.model_dump() | dict(settings) | {"typed": typed})
        self._redis.hset(HTTP_TENANTS, name, made.model_dump_json())
        return made

    def get(self, name: str) -> Tenant:
        """The tenant of that name. Raises `CallerError`."""
        found = self.find(name)
        if found is None:
            raise CallerError(
                f"There is no tenant {short(name)}: `smallcat tenants list` has all, and "
                "`smallcat tenants add NAME` makes one."
            )
        return found

    def find(self, name: str) -> Tenant | None:
        """The tenant of that name; None where there is none that can be read."""
        return _read(name, cast("str | None", self._redis.hget(HTTP_TENANTS, name)))

    def list(self) -> list[Tenant]:
        """All tenants by name."""
        texts = cast("dict[str, str]", self._redis.hgetall(HTTP_TENANTS))
        found = [_read(name, text) for name, text in sorted(texts.items())]
        return [each for each in found if each is not None]

    def remove(self, name: str) -> None:
        """Remove a tenant. Its jobs and pictures stay. Raises `CallerError`."""
        self.get(name)
        self._redis.hdel(HTTP_TENANTS, name)


def _read(name: str, text: str | None) -> Tenant | None:
    try:
        found = Tenant.model_validate_json(text or "null")
    except ValidationError:
        return None
    return found if found.name == name else None


def _checked(values: Mapping[str, Any]) -> Tenant:
    """The tenant of these values. Raises `CallerError` that names the first that is wrong, and its limit."""
    try:
        return Tenant.model_validate(values)
    except ValidationError as error:
        finding = error.errors(include_url=False)[0]
        name = str(finding["loc"][0])
        limits = limits_of(Tenant.model_fields[name].metadata) if name in Tenant.model_fields else ""
        rule = requirement(finding, limits)
        must = re.sub(r"^\w+ should ", "", rule) if " should " in rule else f"be {rule}"
        raise CallerError(f"{name} is {short(finding['input'])}: it must {must}.") from None
