"""What became of a run's jobs: from its journal, else from their records, else from the run's bits alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from producer.ingest.ended import Ended
from producer.ingest.journal import Journal
from producer.ingest.plan import Planned, Rejected
from producer.ingest.run_state import Run
from producer.session import Session
from worker.contract.choices import ImageFormat
from worker.contract.errors import UnknownJobError
from worker.contract.record import JobRecord

if TYPE_CHECKING:
    from worker.storage.bucket import Bucket


class Results:
    """The results of the jobs of one run."""

    def __init__(self, run: Run, session: Session, tenant: str) -> None:
        self._run, self._session, self._tenant = run, session, tenant

    def of(self, journal: Journal, number: int, job_id: str) -> Mapping[str, Any]:
        """What became of the job `number` of the run."""
        if (result := journal.result(number)) is not None:
            return result
        try:
            record = self._session.records.get(job_id)
        except UnknownJobError:
            bucket = self._session.bucket
            if bucket is None or (stored := bucket.record(job_id, self._tenant)) is None:
                return {"state": self._run.state_of(number) or "unknown"}
            record = JobRecord.model_validate_json(stored)
        return record.model_dump(mode="json", exclude={"job"})

    def placed(self, ended: Ended) -> Ended:
        """The outcome with the picture's address as it follows from the job's id, whatever Redis says."""
        ending = (ended.uri or "").rpartition(".")[2]
        if ended.uri is None or ending not in list(ImageFormat) or (bucket := self._session.bucket) is None:
            return ended
        return ended._replace(uri=bucket.uri(ended.id, ImageFormat(ending), self._tenant))

    def complete(self, journal: Journal, jobs: Iterable[Planned | Rejected], bucket: Bucket) -> None:
        """Write into the journal of a run that is over what it does not have.

        Pictures have their addresses in `bucket`.
        """
        for number, job in enumerate(each for each in jobs if isinstance(each, Planned)):
            if journal.result(number) is not None:
                continue
            templated = job.templated
            found = self.of(journal, number, templated.id)
            image_format = ImageFormat(templated.shape.get("format", ImageFormat.PNG))
            is_done = found["state"] == "done"
            ended = Ended(
                number,
                job.file,
                job.line,
                templated.id,
                found["state"],
                bucket.uri(templated.id, image_format, self._tenant) if is_done else None,
                found.get("timings") or {},
                found.get("error_type"),
                found.get("error"),
                bool(found.get("cached")),
                found.get("attempts") or 0,
            )
            journal.write([ended])
