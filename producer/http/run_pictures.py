"""What the lines of an uploaded prompt file may begin with: references, and the pictures of jobs.

Never a path or an address: those would be the server's own files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from producer.http.caller import tenant_mark
from producer.http.guard import INPUTS
from producer.ingest.pictures import Pictures
from producer.session import session, unknown_picture
from worker.contract.input_reference import InputReference
from worker.state.submissions import Submissions

if TYPE_CHECKING:
    from worker.contract.given_picture import Given

#: What a line may have instead of a path or an address.
_INSTEAD: Final = (
    f"send the file to {INPUTS} first, and give the reference that it answers (sha256:...), or a job's id"
)


class UploadedPictures(Pictures):
    """The pictures of one run. `tenant`: the settings of who uploaded it; `owner`: what its jobs say."""

    def __init__(self, tenant: Mapping[str, Any] | None, owner: str) -> None:
        super().__init__(session(), owner)
        # Other tenants' jobs have the same owner.
        self._shares = str(tenant.get("name", "")) if tenant and tenant.get("pictures") else ""

    def _given(self, named: dict[str, Any], folder: Path | None) -> Given | None:
        from worker.contract.given_picture import Reach, read_given

        return read_given(named, Reach(job=self._picture_of, instead=_INSTEAD))

    def _known_picture(self, job_id: str, name: str) -> tuple[InputReference, bool]:
        if self._shares:
            mine = tenant_mark(self._shares)
            with self._session.queue_errors():
                found = Submissions(self._session.redis, 1).of(job_id)
            if not any(each.startswith(mine) for each in found):
                raise unknown_picture(name, job_id)
        return super()._known_picture(job_id, name)
