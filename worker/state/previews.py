"""Previews of jobs that are rendered, made while somebody asks for them.

smallcat:preview:<id>    string   the latest one as JSON; a worker writes it, and it expires in seconds
smallcat:to-workers      channel  "preview <id>": somebody looks at it
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from worker.state.keys import WORKERS_CHANNEL, preview_key

if TYPE_CHECKING:
    from redis.client import Redis

#: Seconds that a preview stays, and those for which whoever asked counts as looking at it.
STAYS_S, ASKED_S = 10, 5.0
#: Bytes of a preview, at most.
_LARGEST: Final = 1_000_000


@dataclass(frozen=True)
class Preview:
    """A job's latents as a tiny picture."""

    #: Steps that it has, and steps in all.
    step: int
    steps: int
    #: A WebP file.
    data: bytes


class Previews:
    """The previews in one Redis. Thread-safe. Raises redis-py's errors."""

    def __init__(self, client: Redis) -> None:
        self._redis = client

    def ask(self, job_id: str) -> Preview | None:
        """Ask the job's worker for previews for the next seconds; returns the latest, or None."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.publish(WORKERS_CHANNEL, f"preview {job_id}")
            pipe.get(preview_key(job_id))
            text = cast("str | None", pipe.execute()[1])
        return _read(text)

    def put(self, job_id: str, preview: Preview) -> None:
        """Write a preview, in the place of the one before."""
        image = base64.b64encode(preview.data).decode()
        text = json.dumps({"step": preview.step, "steps": preview.steps, "image": image})
        self._redis.set(preview_key(job_id), text, ex=STAYS_S)


def _read(text: str | None) -> Preview | None:
    """The preview that a text of Redis describes; None for what is none."""
    if not text or len(text) > _LARGEST:
        return None
    try:
        values = json.loads(text)
        data = base64.b64decode(values["image"], validate=True)
        return Preview(int(values["step"]), int(values["steps"]), data)
    except (ValueError, TypeError, KeyError, RecursionError, binascii.Error):
        return None
