"""What a run keeps from its beginning: a revision of each model that its jobs name, and its limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from producer.ingest.message_templates import Resolver
from producer.ingest.run_state import Run
from producer.ingest.types import Gate
from worker.contract.choices import PromptSyntax
from worker.contract.file_index import FileIndex
from worker.contract.job import OPEN_REVISION, Job
from worker.contract.job_files import with_files
from worker.contract.served_model import Defaults
from worker.contract.stored_jobs import LIMITS

if TYPE_CHECKING:
    from worker.state.fleet import Fleet


#: The run's field of the limits that its lines are taken by. Earlier versions noted none.
_LIMITS: Final = "limits"


def pin_limits(run: Run) -> None:
    """Note that lines of the run, which begins now, are taken by the limits of this version."""
    run.note(_LIMITS, str(LIMITS))


def has_new_limits(run: Run) -> bool:
    """Whether the run has the limits of this version: it began with them, or is yet to begin."""
    begins = run.noted("cursor") is None or run.noted("cancelled") is not None
    return begins or run.noted(_LIMITS) == str(LIMITS)


class Pinned:
    """Resolves jobs as `Fleet.resolve` does, but each model once in a run. Redis keeps the answer."""

    def __init__(self, run: Run, fleet: Fleet, gate: Gate | None = None, *, is_new: bool = True) -> None:
        """`gate` says which resolved jobs the run may not have; `is_new` as in `Plan`."""
        self._run, self._fleet, self._gate, self._is_new = run, fleet, gate or Gate(), is_new
        self._known: dict[tuple[str, str], _Pin] = {}
        self._foreseen: dict[tuple[str, str], _Pin] = {}

    def resolve(self, job: Job) -> Job:
        """`job` for the model that it means in this run, with that model's defaults, syntax and files.

        Raises `InvalidJobError` for one that the run may not have.
        """
        return self._checked(self._pin(job), job)

    def foreseen(self, job: Job) -> Job:
        """What `resolve` would give now. Pins nothing, for a run that may not begin."""
        return self._checked(self._foresee(job), job)

    @property
    def resolver(self) -> Resolver:
        """`resolve`, for many jobs."""
        return Resolver(self.resolve, lambda job: self._pin(job).index.embedding_names)

    @property
    def foreseer(self) -> Resolver:
        """`foreseen`, for many jobs."""
        return Resolver(self.foreseen, lambda job: self._foresee(job).index.embedding_names)

    def _pin(self, job: Job) -> _Pin:
        name = (job.model, job.revision)
        if name not in self._known:
            pin = self._run.note_once(f"model:{json.dumps(name)}", json.dumps(self._resolve(job)))
            self._known[name] = _Pin.of(json.loads(pin))
        return self._known[name]

    def _foresee(self, job: Job) -> _Pin:
        name = (job.model, job.revision)
        if name not in self._foreseen:
            pin = self._run.noted(f"model:{json.dumps(name)}")
            self._foreseen[name] = _Pin.of(json.loads(pin) if pin else self._resolve(job))
        return self._foreseen[name]

    def _checked(self, pin: _Pin, job: Job) -> Job:
        resolved = pin.resolve(job, is_new=self._is_new)
        self._gate.check(resolved)
        if pin.values.get("unserved"):
            self._gate.check_unserved(resolved)
        return resolved

    def _resolve(self, job: Job) -> dict[str, Any]:
        probe = Job(prompt="x", seed=0, model=job.model, revision=job.revision)
        meant = self._fleet.meant(probe)
        resolved = probe if meant is None else probe.in_syntax(meant.prompt_syntax).resolved(meant.served)
        if meant is None and not probe.revision:
            resolved = probe.opened()
        # No worker has announced the model yet: all jobs of the run wait for the same unknown revision.
        revision = OPEN_REVISION + self._run.id if resolved.is_open else resolved.revision
        values = {name: getattr(resolved, name) for name in Defaults.model_fields}
        defaults = {name: value for name, value in values.items() if value is not None}
        syntax = (
            {} if resolved.prompt_syntax is PromptSyntax.PLAIN else {"prompt_syntax": resolved.prompt_syntax}
        )
        # All of the index: that of now may be gone from Redis when the run is resumed.
        files: dict[str, Any] = {}
        if meant and meant.index.files:
            files["files"] = meant.index.model_dump(mode="json")
            files |= {"architecture": meant.served.architecture} if meant.served.architecture else {}
        unserved = {} if meant else {"unserved": True}
        return {**defaults, **syntax, **files, **unserved, "model": resolved.model, "revision": revision}


@dataclass(frozen=True)
class _Pin:
    """What a name means in a run."""

    values: Mapping[str, Any]
    index: FileIndex

    @classmethod
    def of(cls, values: dict[str, Any]) -> _Pin:
        """The pin that lies in Redis as `values`. A run that an earlier version began has no files."""
        return cls(values, FileIndex.model_validate(values.get("files", {})))

    def resolve(self, job: Job, *, is_new: bool) -> Job:
        """`job` with all that is pinned. Raises `InvalidJobError`.

        Earlier versions did not look whether it is a job with the model's defaults.
        """
        # A run that an earlier version began has no syntax pinned, and stays plain.
        job = job.in_syntax(PromptSyntax(self.values.get("prompt_syntax", PromptSyntax.PLAIN)))
        place = {name: self.values[name] for name in ("model", "revision")}
        filled = (
            job.with_defaults(self.values) if is_new else job.model_copy(update=job.left_open(self.values))
        )
        job = filled.model_copy(update=place)
        # Nobody serves the model yet: the worker that does says which files are meant.
        if self.values.get("unserved"):
            return job
        return with_files(job, self.index, self.values.get("architecture", ""))
