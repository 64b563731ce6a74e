"""The files that a worker offers beside its model, indexed: those in folders, and those in buckets.

Where they are is in `worker.model.file_places`. What lies in a bucket is copied into the cache once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from worker.contract.errors import MissingFileError, SettingsError, SmallcatError
from worker.contract.file_index import MAX_FILES, NO_FILES, FileEntry, FileIndex, Kind
from worker.contract.job import Job
from worker.contract.job_files import lacking, lacks_hashes, with_files
from worker.contract.settings import WorkerSettings
from worker.model.bucket_files import BucketFiles
from worker.model.file_entries import entry_by_content, entry_by_name, remember, remembered, with_error
from worker.model.file_places import Found, Remote, in_bucket, on_disk, place_of

logger = logging.getLogger("smallcat.files")

#: Seconds between two looks at folders and at buckets; and between two that jobs ask for.
LOOK_EVERY_S, LOOK_AT_BUCKET_EVERY_S, ASKED_EVERY_S = 10.0, 60.0, 5.0
#: The LoRAs that come with the bundled model.
BUNDLED_LORAS = Path(__file__).parents[1] / "demo" / "loras"
#: Files that are read at once when they are new: hashing one takes a core.
_AT_ONCE = 4


class FileStore:
    """The files that some settings name. Thread-safe."""

    def __init__(
        self,
        places: Mapping[Kind, Sequence[str]],
        cache: Path,
        remote_of: Callable[[str], Remote] | None = None,
    ) -> None:
        """`places` of each kind: folders, files, s3:// prefixes and hub ids. `remote_of` a name: the bucket.

        Raises `SettingsError` for a place that is not there, `StorageError`.
        """
        self._places = [place_of(kind, place) for kind, found in places.items() for place in found if place]
        self._cache = cache / "files"
        self._copies = BucketFiles(self._cache, remote_of)
        #: What is known of each file, by its stamp.
        self._known: dict[str, FileEntry] = remembered(self._cache)
        self._paths: Mapping[tuple[str, str], Path] = {}
        self._looking, self._looked_s = threading.Lock(), 0.0
        #: All of them. Replaced when something changes.
        self.index: FileIndex = NO_FILES
        self.look()

    @classmethod
    def of(cls, settings: WorkerSettings, remote_of: Callable[[str], Remote]) -> FileStore:
        """The files that a worker's settings name. Raises as the class does."""
        vaes = [place.strip() for place in settings.vaes.split(",")]
        loras = [place.strip() for place in settings.loras.split(",")]
        if not settings.loras and not settings.model and BUNDLED_LORAS.is_dir():
            loras = [str(BUNDLED_LORAS)]
        places = {Kind.EMBEDDING: [settings.embeddings], Kind.VAE: vaes, Kind.LORA: loras}
        return cls(places, settings.cache_folder, remote_of)

    def start(self) -> None:
        """Say what was found, and look again now and then, in a thread that ends with the process."""
        for entry in self.index.files:
            if entry.problem:
                logger.warning('The %s "%s" cannot be used: %s.', entry.kind, entry.name, entry.problem)
        for kind in dict.fromkeys(place.kind for place in self._places):
            usable = sum(each.kind == kind and not each.problem for each in self.index.files)
            where = ", ".join(place.where for place in self._places if place.kind == kind)
            logger.info("files of the kind %s: %d (%s)", kind, usable, where)
        if self._places:
            threading.Thread(target=self._go_on_looking, name="files", daemon=True).start()

    def look(self) -> None:
        """Find out what is there now. Raises `SettingsError`, `StorageError`."""
        with self._looking:
            entries: dict[tuple[str, str], FileEntry] = {}
            paths: dict[tuple[str, str], Path] = {}
            known: dict[str, FileEntry] = {}
            for found, entry, path in self._looked_at():
                known[found.stamp] = entry
                if (entry.kind, entry.name) in entries:
                    problem = f"two files have this name, {found.where} is one: rename it"
                    entry = entry.model_copy(update={"problem": problem})
                entries[entry.kind, entry.name] = entry
                if not entry.problem:
                    paths[entry.kind, entry.sha256] = path
            if known != self._known:
                remember(self._cache, known)
            self._known, self._paths = known, paths
            if (index := FileIndex.of(entries.values())) != self.index:
                self.index = index
            self._looked_s = time.monotonic()

    def provide(self, job: Job) -> Job:
        """`job` with its files here; with those that its names mean here, where nobody could say it before.

        Raises `MissingFileError` where this worker has not got them, `InvalidJobError`, `StorageError`.
        """
        if job.is_open or lacks_hashes(job):
            return with_files(job, self.index)
        is_due = time.monotonic() > self._looked_s + ASKED_EVERY_S
        if self._places and is_due and lacking(job, self.index):
            self.look()
        if lacks := lacking(job, self.index):
            raise MissingFileError(f"This worker lacks {', '.join(lacks)}: another one may have it.")
        return job

    def path(self, kind: Kind, sha256: str) -> Path | None:
        """Where the file with this content is; None where it is gone."""
        return self._paths.get((kind, sha256))

    def _go_on_looking(self) -> None:
        is_far = any(place.is_far for place in self._places)
        is_logged = False
        while True:
            time.sleep(LOOK_AT_BUCKET_EVERY_S if is_far else LOOK_EVERY_S)
            try:
                self.look()
            except Exception as error:  # noqa: BLE001 - the thread must not end
                if not is_logged:
                    logger.warning("The files beside the model cannot be looked at: %s", error)
                is_logged = True
            else:
                is_logged = False

    def _looked_at(self) -> list[tuple[Found, FileEntry, Path]]:
        """What there is, in the order of places: what is to be known of it, and where it is here."""
        found = list(self._found())
        known = {each.stamp: here for each in found if (here := self._known_here(each)) is not None}
        new = [each for each in found if each.stamp not in known]
        if len(new) > _AT_ONCE:
            logger.info("%d new files are read, once: for their hashes", len(new))
        # Hashing releases Python's lock.
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="files") as pool:
            known |= zip((each.stamp for each in new), pool.map(self._entry, new), strict=True)
        return [(each, *known[each.stamp]) for each in found]

    def _known_here(self, found: Found) -> tuple[FileEntry, Path] | None:
        """What is known of a file, if it is still here or cannot be used; where it is."""
        if (entry := self._known.get(found.stamp)) is None:
            return None
        if entry.problem:
            return entry, Path()
        path = found.path or self._copies.path(entry.sha256)
        return (entry, path) if path is not None and path.is_file() else None

    def _found(self) -> Iterator[Found]:
        count = 0
        for place in self._places:
            is_far = place.is_far
            for found in in_bucket(place, self._copies.remote(place.where)) if is_far else on_disk(place):
                count += 1
                if count > MAX_FILES:
                    raise SettingsError(f"{place.where} has more than {MAX_FILES:,} files: part them.")
                yield found

    def _entry(self, found: Found) -> tuple[FileEntry, Path]:
        """What is to be known of a file, and where it is on this machine. Raises `StorageError`."""
        named = entry_by_name(found)
        if named.problem:
            return named, Path()
        if found.path is not None:
            return entry_by_content(found, found.path), found.path
        try:
            with self._copies.copied(found) as path:
                entry = entry_by_content(found, path)
                return entry, Path() if entry.problem else self._copies.keep(path, entry.sha256)
        except (OSError, SmallcatError) as error:
            return with_error(named, error), Path()
