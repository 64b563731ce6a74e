"""The log as JSON, for programs: `SMALLCAT_LOG=json`. One object a line."""

from __future__ import annotations

import datetime
import json
import logging
import math
from typing import Any

from worker.contract.job_scope import job_scope

_TRACEBACKS = logging.Formatter()


class JsonFormatter(logging.Formatter):
    """A record as one line: `timestamp` (RFC 3339, UTC), `level`, `logger`, `message`, then what there is.

    `job` and `trace` are those of the record, or of the code that logs (`worker.contract.job_scope`);
    `exception` is a traceback. The record's `fields`, a mapping, are fields of the object, too. What other
    people's code says beside its message is left out: it may have prompts.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON in ASCII: no text in it can begin a line, or move a cursor."""
        job, trace = scope_of(record)
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "timestamp": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in (("job", job), ("trace", trace)) if value}
        if record.exc_info:
            line["exception"] = _TRACEBACKS.formatException(record.exc_info)
        elif record.exc_text:
            line["exception"] = record.exc_text
        if record.stack_info:
            line["stack"] = record.stack_info
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line |= {name: value for name, value in fields.items() if name not in line}
        try:
            return json.dumps(line, default=str, allow_nan=False)
        except ValueError:
            return json.dumps(_finite(line), default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    """`value` with null for each number that JSON has not: infinite ones, and those that are none."""
    if isinstance(value, dict):
        return {_finite(name): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scope_of(record: logging.LogRecord) -> tuple[str, str]:
    """The ids of the job and of the trace that a record is about, each empty where there is none."""
    scope = job_scope()
    return str(getattr(record, "job", scope.job)), str(getattr(record, "trace", scope.trace))
