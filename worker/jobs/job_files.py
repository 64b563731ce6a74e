"""What the way of a job asks of the files that its worker offers beside its model."""

from __future__ import annotations

from typing import Protocol

from worker.contract.errors import MissingFileError
from worker.contract.file_index import NO_FILES, FileIndex
from worker.contract.job import Job
from worker.contract.job_files import files_of, lacks_hashes, with_files


class Files(Protocol):
    """The files of a worker: `worker.model.beside.file_store.FileStore`."""

    @property
    def index(self) -> FileIndex:
        """All of them."""

    def provide(self, job: Job) -> Job:
        """`job` with its files here. Raises `MissingFileError`, `InvalidJobError`."""

    def stop(self) -> None:
        """Let jobs that wait for a file go back to the queue."""


class NoFiles:
    """Those of a worker that offers none."""

    index = NO_FILES

    def provide(self, job: Job) -> Job:
        """`job`, if it uses none. Raises `MissingFileError`, `InvalidJobError`."""
        if lacks_hashes(job):
            return with_files(job, NO_FILES)
        if job.file_hashes:
            raise MissingFileError(f"This worker lacks {', '.join(files_of(job))}: another one may have it.")
        return job

    def stop(self) -> None:
        """None waits."""
