"""The keys of a job's objects in the bucket, below the prefix. They follow from the job alone."""

from __future__ import annotations

from worker.contract.job_checks import tenant_name


def object_key(job_id: str, ending: str, tenant: str = "") -> str:
    """The key of a job's object: its picture's, or with `json` its record's.

    A tenant's objects are in a folder of its own, where rights that were given for `images/` hold, too. No
    other tenant's name leads there, nor does any to the objects of jobs without one. Raises `ValueError` for
    what is no tenant's name.
    """
    folder = f"tenants/{tenant_name(tenant)}/" if tenant else ""
    return f"images/{folder}{job_id[:2]}/{job_id}.{ending}"
