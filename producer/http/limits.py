"""What a caller may submit: the one hook that every way of submitting goes through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from producer.http.caller import Caller
    from producer.ingest.message_templates import TemplatedJob


class Limits:
    """Admits all that is within a job's own limits."""

    async def admit(self, caller: Caller, jobs: Sequence[TemplatedJob]) -> None:
        """Return where `caller` may submit all of `jobs` now. Raises `RefusedError` (429, 403)."""
