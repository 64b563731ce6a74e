"""All jobs of a run that name the same model are rendered by the same revision of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from producer.ingest.run_state import Run
from worker.contract.choices import PromptSyntax
from worker.contract.job import OPEN_REVISION, Job
from worker.contract.served_model import Defaults

if TYPE_CHECKING:
    from worker.state.fleet import Fleet


class Pinned:
    """Resolves jobs as `Fleet.resolve` does, but each model once in a run. Redis keeps the answer."""

    def __init__(self, run: Run, fleet: Fleet, check: Callable[[Job], None] = lambda job: None) -> None:
        """`check` raises `InvalidJobError` for a resolved job that the run may not have."""
        self._run, self._fleet, self._check = run, fleet, check
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        self._foreseen: dict[tuple[str, str], dict[str, Any]] = {}

    def resolve(self, job: Job) -> Job:
        """`job` for the model that it means in this run, with that model's defaults.

        Raises `InvalidJobError` for one that the run may not have.
        """
        name = (job.model, job.revision)
        if name not in self._known:
            pin = self._run.note_once(f"model:{json.dumps(name)}", json.dumps(self._resolve(job)))
            self._known[name] = json.loads(pin)
        return self._checked(_as_pinned(job, self._known[name]))

    def foreseen(self, job: Job) -> Job:
        """What `resolve` would give now. Pins nothing, for a run that may not begin."""
        name = (job.model, job.revision)
        if name not in self._foreseen:
            pin = self._run.noted(f"model:{json.dumps(name)}")
            self._foreseen[name] = json.loads(pin) if pin else self._resolve(job)
        return self._checked(_as_pinned(job, self._foreseen[name]))

    def _checked(self, job: Job) -> Job:
        self._check(job)
        return job

    def _resolve(self, job: Job) -> dict[str, Any]:
        resolved = self._fleet.resolve(Job(prompt="x", seed=0, model=job.model, revision=job.revision))
        # No worker has announced the model yet: all jobs of the run wait for the same unknown revision.
        revision = OPEN_REVISION + self._run.id if resolved.is_open else resolved.revision
        values = {name: getattr(resolved, name) for name in Defaults.model_fields}
        defaults = {name: value for name, value in values.items() if value is not None}
        syntax = (
            {} if resolved.prompt_syntax is PromptSyntax.PLAIN else {"prompt_syntax": resolved.prompt_syntax}
        )
        return {**defaults, **syntax, "model": resolved.model, "revision": revision}


def _as_pinned(job: Job, pinned: dict[str, Any]) -> Job:
    # A run that an earlier version began has no syntax pinned, and stays plain.
    job = job.in_syntax(PromptSyntax(pinned.get("prompt_syntax", PromptSyntax.PLAIN)))
    filled = {field: pinned[field] for field in Defaults.model_fields if field in pinned}
    filled = {field: value for field, value in filled.items() if getattr(job, field) is None}
    return job.model_copy(update={**filled, "model": pinned["model"], "revision": pinned["revision"]})
