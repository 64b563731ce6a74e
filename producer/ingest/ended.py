"""The outcome of a job of a run, as Redis hands it over."""

from __future__ import annotations

import json
from typing import NamedTuple, Self

from worker.state.hashes import JOB_ID, says_final, shown


class Ended(NamedTuple):
    """The outcome of a job, as the workers' scripts write it (`worker.state.scripts`)."""

    #: The job's number in the run, from 0, which is the position of its bit.
    number: int
    file: int
    line: int
    id: str
    state: str
    uri: str | None
    timings: dict[str, float | None]
    error_type: str | None
    error: str | None
    cached: bool
    attempts: int

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The outcome that a worker's script wrote; None for what no such script writes."""
        try:
            number, file, line, job_id, state, uri, timings, error_type, error, cached, attempts = json.loads(
                text
            )
            numbers = int(number), int(file), int(line)
            attempts, timings = int(attempts or 0), dict(json.loads(timings)) if timings else {}
        except (ValueError, TypeError, RecursionError):
            return None
        if not JOB_ID.fullmatch(str(job_id)) or not says_final(state):
            return None
        texts = (shown(str(each)) if each else None for each in (uri, error_type, error))
        uri, error_type, error = texts
        return cls(*numbers, job_id, state, uri, timings, error_type, error, cached == "true", attempts)
