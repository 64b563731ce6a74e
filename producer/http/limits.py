"""What a caller may submit: the one hook that all ways of submitting go through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from producer.http.caller import Caller
    from producer.ingest.message_templates import TemplatedJob


class Limits:
    """Admits all that is within a job's own limits."""

    async def admit(self, caller: Caller, jobs: Sequence[TemplatedJob]) -> None:
        """Return where `caller` may submit all of `jobs` now. Raises `RefusedError` (429, 403)."""

    async def admit_run(self, caller: Caller, fields: Mapping[str, Any]) -> None:
        """Return where `caller` may upload a prompt file now, with `fields` for lines that do not set them.

        Raises `RefusedError` (429, 403).
        """
