"""A job's time in the engine: its picture, and what its metrics and its trace say of it."""

from __future__ import annotations

import time
from typing import Any

from worker.contract.job import Job
from worker.engine.engine import Engine
from worker.engine.runner import JobInputs
from worker.engine.step_watch import StepWatch
from worker.engine.ticket import Rendered
from worker.jobs import metrics
from worker.tracing import attempts
from worker.tracing.attempts import Attempt
from worker.tracing.context import TraceContext


def render(engine: Engine[Any], job_id: str, job: Job, inputs: JobInputs | None) -> Rendered:
    """The picture, from the engine. Raises `SmallcatError`."""
    metrics.ATTEMPTS.inc()
    traced = attempts.current()
    watch = None if traced is None else StepWatch(traced.context)
    with metrics.RENDERED.time():
        # Returns once the texts are encoded.
        with metrics.TEXT_ENCODED.time(), attempts.stage("prepare"):
            future = engine.submit(job_id, job, inputs, watch)
        prepared_s = time.monotonic()
        try:
            rendered = future.result()
        finally:
            if traced is not None and watch is not None:
                with attempts.harmless():
                    _note_steps(traced, watch, prepared_s)
    metrics.DECODED.observe(rendered.decode_s)
    if traced is not None and watch is not None and watch.steps:
        with attempts.harmless():
            traced.add("decode", watch.ended_s, watch.ended_s + rendered.decode_s)
    return rendered


def _note_steps(traced: Attempt, watch: StepWatch, prepared_s: float) -> None:
    """One span for all steps, the wait for the first one included; it links to the mates of the job."""
    if watch.began_s is None:
        return
    figures = {
        "steps": watch.steps,
        "rows": round(watch.rows / watch.steps, 2),
        "step_s": round(watch.in_steps_s / watch.steps, 6),
        "wait_s": round(max(0.0, watch.ended_s - prepared_s - watch.in_steps_s), 6),
    }
    mates = [name for name in watch.mates if isinstance(name, TraceContext)]
    traced.add("steps", min(prepared_s, watch.began_s), watch.ended_s, figures, mates)
