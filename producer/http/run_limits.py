"""The limits of the tenant that has uploaded a prompt file: they hold for its run as for single jobs.

A line that asks for what the tenant may never have is rejected. Jobs for which there is no room now are sent
when there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from producer.http.limits import crowded, refusal, stopped, unserved
from producer.http.tenant_store import Tenant, TenantStore
from producer.ingest.message_templates import TemplatedJob
from producer.ingest.types import Gate
from producer.session import FEEDER_RETRY_S, session
from worker.contract.errors import InvalidJobError
from worker.contract.job import Job
from worker.contract.second_pass import pixel_steps
from worker.state.tenant_limits import TenantLimits


class TenantGate(Gate):
    """Lets the jobs of one run through."""

    def __init__(self, tenant: Tenant, run: str) -> None:
        """`tenant` as it was at the upload: by it lines are rejected, the same ones each time."""
        now = session(FEEDER_RETRY_S)
        self._tenant, self._run = tenant, run
        self._store = TenantStore(now.redis)
        self._counters = TenantLimits(now.redis, now.settings.record_ttl_s)
        self._why = ""
        self._length = lambda queue, tenant: now.fleet.length(queue, tenant=tenant)

    def check(self, job: Job) -> None:
        """Raise `InvalidJobError` for a job that the tenant may never have."""
        if reason := refusal(self._tenant, job.model_dump(mode="json")):
            raise InvalidJobError(reason)

    def check_unserved(self, job: Job) -> None:
        """Raise `InvalidJobError` for a job of a model that the tenant may ask for only once it is served."""
        if reason := unserved(self._tenant, job.model, job.revision, ()):
            raise InvalidJobError(reason)

    def admit(self, first: int, jobs: Sequence[TemplatedJob]) -> tuple[int, str]:
        """How many of the next jobs may be sent, by the tenant's present limits; why not the others."""
        tenant = self._store.find(self._tenant.name) or self._tenant
        if not jobs or (tenant.max_queued is None and tenant.max_pixel_steps_a_day is None):
            return len(jobs), ""
        if sentence := crowded(tenant, jobs, self._length):
            return 0, sentence
        asked = [(job.id, pixel_steps(job.shape) or 0) for job in jobs]
        found = self._counters.admit_of_run(
            tenant.name,
            self._run,
            first,
            asked,
            most_open=tenant.max_queued,
            most_work=tenant.max_pixel_steps_a_day,
        )
        return found.jobs, stopped(tenant, found, asked[found.jobs :])[0] if found.stopped else ""


def gate_of(tenant: Mapping[str, Any] | None, run: str) -> Gate:
    """The gate of a run that a tenant with these settings has uploaded; None: it has no limits."""
    return Gate() if tenant is None else TenantGate(Tenant.model_validate(tenant), run)
