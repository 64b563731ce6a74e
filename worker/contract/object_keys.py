"""The keys of a job's objects in the bucket, below the prefix. They follow from the job alone.

images/<id[:2]>/<id>.png    a job's picture (or .webp, .jpeg), and its record (.json)
inputs/<sha256>             the file of a picture that jobs begin with, by its content
images/tenants/<tenant>/... of a job that has a tenant
inputs/tenants/<tenant>/...
"""

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


def input_key(sha256: str, tenant: str = "") -> str:
    """The key of a file that jobs begin with, by the SHA-256 of its bytes. Raises as `object_key`.

    Tenants cannot tell by it what others have: each has a folder of its own.
    """
    folder = f"tenants/{tenant_name(tenant)}/" if tenant else ""
    return f"inputs/{folder}{sha256}"
