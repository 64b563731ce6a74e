"""Values of Parquet and of Python as JSON has them, for metadata."""

from __future__ import annotations

import json
import math
from typing import Any

from worker.contract.job_parameters import MAX_METADATA_DEPTH


def json_of(value: Any, level: int = 0) -> Any:
    """A value as JSON has it: what JSON does not know is a text, and NaN is no value."""
    if isinstance(value, dict) and level < MAX_METADATA_DEPTH:
        return {str(key): json_of(each, level + 1) for key, each in value.items()}
    if isinstance(value, list | tuple) and level < MAX_METADATA_DEPTH:
        return [json_of(each, level + 1) for each in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.hex()
    if isinstance(value, float) and math.isnan(value):
        return None
    return value if is_json(value) else str(value)


def is_json(value: object) -> bool:
    """Whether JSON can hold a value as it is."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
