"""Each model once a run: its jobs all mean the same revision."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from producer.ingest.run_state import Run
from worker.contract.job import OPEN_REVISION, Defaults, Job

if TYPE_CHECKING:
    from worker.state.fleet import Fleet


class Pinned:
    """Resolves jobs as `Fleet.resolve`, each model once a run: its jobs all mean the same revision."""

    def __init__(self, run: Run, fleet: Fleet) -> None:
        self._run, self._fleet = run, fleet
        self._known: dict[tuple[str, str], dict[str, Any]] = {}

    def resolve(self, job: Job) -> Job:
        """`job` for the model that it means in this run."""
        name = (job.model, job.revision)
        if name not in self._known:
            kept = self._run.keep(f"model:{json.dumps(name)}", json.dumps(self._look(job)))
            self._known[name] = json.loads(kept)
        pin = self._known[name]
        filled = {field: value for field, value in pin.items() if getattr(job, field) in (None, "")}
        return job.model_copy(update={**filled, "model": pin["model"], "revision": pin["revision"]})

    def _look(self, job: Job) -> dict[str, Any]:
        asked = Job(prompt="x", seed=0, model=job.model, revision=job.revision)
        meant = self._fleet.resolve(asked)
        # Nobody has announced it yet: all jobs of the run mean the same unknown revision.
        revision = OPEN_REVISION + self._run.id if meant.is_open else meant.revision
        values = {name: getattr(meant, name) for name in Defaults.model_fields}
        defaults = {name: value for name, value in values.items() if value is not None}
        return {**defaults, "model": meant.model, "revision": revision}
