"""The files that a worker offers beside its model, indexed: those in folders, and those in buckets.

    places (`file_places`)  ─►  what is known of each file (`file_knowledge`)  ─►  the index
    a job                   ─►  its files on this disk (`bucket_files`)        ─►  their paths

A file in a bucket is fetched when a first job needs it, on the thread that handles the job: a step never
waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from worker.contract.errors import (
    EngineStoppedError,
    MachineError,
    MissingFileError,
    SettingsError,
    SmallcatError,
)
from worker.contract.file_index import MAX_FILES, NO_FILES, FileEntry, FileIndex, Kind, parts_of
from worker.contract.job import Job
from worker.contract.job_files import lacking, lacks_hashes, with_files
from worker.contract.settings import WorkerSettings
from worker.model.beside.bucket_files import BucketFiles
from worker.model.beside.file_knowledge import FileKnowledge, Shared
from worker.model.beside.file_places import Found, Remote, in_bucket, on_disk, place_of

logger = logging.getLogger("smallcat.files")

#: Seconds between two looks at folders and at buckets; and between two that jobs ask for.
LOOK_EVERY_S, LOOK_AT_BUCKET_EVERY_S, ASKED_EVERY_S = 10.0, 60.0, 5.0
#: The LoRAs that come with the bundled model: those of a user take the places of their names.
BUNDLED_LORAS = Path(__file__).parents[2] / "demo" / "loras"


class FileStore:
    """The files that some settings name. Thread-safe."""

    def __init__(
        self,
        places: Mapping[Kind, Sequence[str]],
        cache: Path,
        remote_of: Callable[[str], Remote] | None = None,
        shared: Shared | None = None,
        disk: int | None = None,
    ) -> None:
        """`places` of each kind: folders, files, s3:// prefixes and hub ids. `remote_of` a name: the bucket.

        `shared`: what all workers know of files in buckets; None: this one shares with nobody. `disk`: bytes
        that those take that are fetched, at most; None: chosen by what is free.
        Raises `SettingsError` for a place that is not there, `StorageError`.
        """
        self._places = [place_of(kind, place) for kind, found in places.items() for place in found if place]
        self._copies = BucketFiles(cache / "files", remote_of, disk)
        self._knowledge = FileKnowledge(cache / "files", self._copies, shared)
        self._found: Mapping[tuple[str, str], Found] = {}
        self._looking, self._looked_s = threading.Lock(), 0.0
        #: All of them. Replaced when something changes.
        self.index: FileIndex = NO_FILES
        self.look()

    @classmethod
    def of(
        cls, settings: WorkerSettings, remote_of: Callable[[str], Remote], shared: Shared | None = None
    ) -> FileStore:
        """The files that a worker's settings name. Raises as the class does."""
        vaes = [place.strip() for place in settings.vaes.split(",")]
        loras = [place.strip() for place in settings.loras.split(",")]
        if not settings.model and BUNDLED_LORAS.is_dir():
            loras.append(str(BUNDLED_LORAS))
        places = {Kind.EMBEDDING: [settings.embeddings], Kind.VAE: vaes, Kind.LORA: loras}
        return cls(places, settings.cache_folder, remote_of, shared, settings.file_disk)

    def start(self) -> FileStore:
        """Say what was found, and look again now and then, in a thread that ends with the process."""
        for entry in self.index.files:
            if entry.problem:
                logger.warning('The %s "%s" cannot be used: %s.', entry.kind, entry.name, entry.problem)
        for kind in dict.fromkeys(place.kind for place in self._places):
            usable = sum(each.kind == kind and not each.problem for each in self.index.files)
            where = ", ".join(place.where for place in self._places if place.kind == kind)
            logger.info("files of the kind %s: %d (%s)", kind, usable, where)
        if any(place.is_far for place in self._places):
            limit, reason = self._copies.limit()
            logger.info("disk for files of buckets: %.1f GiB (%s)", limit / 2**30, reason)
        if self._places:
            threading.Thread(target=self._go_on_looking, name="files", daemon=True).start()
        return self

    def look(self) -> None:
        """Find out what is there now. Raises `SettingsError`, `StorageError`."""
        with self._looking:
            listed = list(self._listed())
            known = self._knowledge.of(listed)
            entries: dict[tuple[str, str], FileEntry] = {}
            files: dict[tuple[str, str], Found] = {}
            for found in listed:
                entry = known[found.stamp]
                if (entry.kind, entry.name) in entries:
                    if found.path is not None and BUNDLED_LORAS in found.path.parents:
                        continue  # The user's own takes its place.
                    problem = f"two files have this name, {found.where} is one: rename it"
                    entry = entry.model_copy(update={"problem": problem})
                entries[entry.kind, entry.name] = entry
                # One that is on this disk is taken rather than the same one in a bucket.
                is_nearer = found.path is not None or (entry.kind, entry.sha256) not in files
                if not entry.problem and is_nearer:
                    files[entry.kind, entry.sha256] = found
            self._found = files
            if (index := FileIndex.of(entries.values())) != self.index:
                self.index = index
            self._looked_s = time.monotonic()

    def provide(self, job: Job) -> Job:
        """`job` with its files here; with those that its names mean here, where nobody could say it before.

        Raises `MissingFileError` where this worker has not got them and cannot get them, `InvalidJobError`.
        """
        if job.is_open or lacks_hashes(job):
            job = with_files(job, self.index)
        is_due = time.monotonic() > self._looked_s + ASKED_EVERY_S
        if self._places and is_due and lacking(job, self.index):
            self._look_for(job)
        if lacks := lacking(job, self.index):
            raise MissingFileError(f"This worker lacks {', '.join(lacks)}: another one may have it.")
        for key, sha256 in job.file_hashes.items():
            self._here(parts_of(key)[0], sha256)
        return job

    def path(self, kind: Kind, sha256: str) -> Path | None:
        """Where the file with this content is; None where it is gone.

        One of a bucket is fetched again where other jobs' files took its place since `provide`.
        """
        try:
            return self._here(kind, sha256)
        except MachineError as error:
            logger.warning("%s", error)
            return None

    def stop(self) -> None:
        """Let jobs that wait for a file go back to the queue: the worker stops."""
        self._copies.stop()

    def _here(self, kind: str, sha256: str) -> Path | None:
        """Where a file is on this machine, to which it is fetched. Raises `MissingFileError`."""
        if (found := self._found.get((kind, sha256))) is None:
            return None
        if found.path is not None:
            return found.path
        try:
            path = self._copies.fetch(found, sha256)
        except MachineError:
            raise
        except (OSError, SmallcatError) as error:
            raise MissingFileError(f"This worker cannot fetch {found.where}: {error}") from error
        if path is None:
            self._knowledge.forget(found)
            raise MissingFileError(f"{found.where} is another file than it was: it is read again.")
        return path

    def _look_for(self, job: Job) -> None:
        """Look because of a job. Where that is not possible, another worker may be able to."""
        try:
            self.look()
        except MachineError:
            raise
        except SmallcatError as error:
            lacks = ", ".join(lacking(job, self.index))
            raise MissingFileError(f"This worker lacks {lacks}, and cannot look for it: {error}") from error

    def _go_on_looking(self) -> None:
        is_far = any(place.is_far for place in self._places)
        is_logged = False
        while True:
            time.sleep(LOOK_AT_BUCKET_EVERY_S if is_far else LOOK_EVERY_S)
            try:
                self.look()
            except EngineStoppedError:
                return
            except Exception as error:  # noqa: BLE001 - the thread must not end
                if not is_logged:
                    logger.warning("The files beside the model cannot be looked at: %s", error)
                is_logged = True
            else:
                is_logged = False

    def _listed(self) -> Iterator[Found]:
        """All files of all places, in their order."""
        count = 0
        for place in self._places:
            is_far = place.is_far
            for found in in_bucket(place, self._copies.remote(place.where)) if is_far else on_disk(place):
                count += 1
                if count > MAX_FILES:
                    raise SettingsError(f"{place.where} has more than {MAX_FILES:,} files: part them.")
                yield found
