"""Submit jobs and get their pictures: `client` and `ingest` are behind it, `cli` is the command.

    >>> from producer import submit_job, submit_file
    >>> submit_job("a small cat").result().url()
    >>> submit_file("prompts.txt", images=4)

`import smallcat` has the same names. Importing either takes a few milliseconds: what they name is imported
when it is first used. torch and diffusers are never loaded here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from producer.client import JobHandle, Progress, submit_job
    from producer.client.job_result import JobResult
    from producer.ingest.submit_file import submit_file
    from worker.contract.errors import (
        CallerError,
        InputError,
        InvalidJobError,
        JobCancelledError,
        JobError,
        JobTimeoutError,
        JobTooLargeError,
        NotFiniteError,
        PermanentStorageError,
        PoisonJobError,
        PromptFileError,
        QueueError,
        RenderError,
        ServiceError,
        SettingsError,
        SmallcatError,
        StorageError,
        UnknownJobError,
        UnknownModelError,
    )
    from worker.contract.job import Job
    from worker.contract.metadata.job_from_image import job_from_image
    from worker.contract.record import State

#: The public names. Those of `worker.contract.errors` that only a worker raises are left out.
__all__ = [
    "CallerError",
    "InputError",
    "InvalidJobError",
    "Job",
    "JobCancelledError",
    "JobError",
    "JobHandle",
    "JobResult",
    "JobTimeoutError",
    "JobTooLargeError",
    "NotFiniteError",
    "PermanentStorageError",
    "PoisonJobError",
    "Progress",
    "PromptFileError",
    "QueueError",
    "RenderError",
    "ServiceError",
    "SettingsError",
    "SmallcatError",
    "State",
    "StorageError",
    "UnknownJobError",
    "UnknownModelError",
    "job_from_image",
    "submit_file",
    "submit_job",
]

#: The modules that define them; all others are errors.
_MODULES = {
    "Job": "worker.contract.job",
    "JobHandle": "producer.client",
    "JobResult": "producer.client.job_result",
    "Progress": "producer.client",
    "State": "worker.contract.record",
    "job_from_image": "worker.contract.metadata.job_from_image",
    "submit_file": "producer.ingest.submit_file",
    "submit_job": "producer.client",
}


def name_conflict() -> str | None:
    """Why the package `worker` is not smallcat's own, and the remedy; None where it is."""
    loaded = sys.modules.get("worker")
    spec = None if loaded else importlib.util.find_spec("worker")
    found = getattr(loaded, "__file__", None) if loaded else spec and spec.origin
    if not found or Path(found).resolve() == Path(__file__).resolve().parents[1] / "worker" / "__init__.py":
        return None
    return f'{found} hides smallcat\'s own package "worker": rename it, or start from another folder.'


def _imported(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if conflict := name_conflict():
        raise ImportError(conflict)
    value = getattr(importlib.import_module(_MODULES.get(name, "worker.contract.errors")), name)
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # A type checker would take every name for one that there is.
    __getattr__ = _imported


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
