"""The files that a worker offers beside its model: found in folders and s3:// prefixes, and indexed.

A file's name is its own without the suffix; that of a folder where the file has diffusers' general name. What
lies in a bucket is copied into the cache once, and kept there under its SHA-256.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import IO, Protocol

from worker.contract.errors import MissingFileError, ServiceError, SettingsError, SmallcatError
from worker.contract.file_index import MAX_FILES, NO_FILES, FileEntry, FileIndex, Kind, name_problem
from worker.contract.job import Job
from worker.contract.job_files import lacking, with_files
from worker.contract.settings import WorkerSettings
from worker.model import embedding_files
from worker.model.index import PICKLE_REASON, PICKLED

logger = logging.getLogger("smallcat.files")

#: Seconds between two looks at folders and at buckets; and between two that jobs ask for.
LOOK_EVERY_S, LOOK_AT_BUCKET_EVERY_S, ASKED_EVERY_S = 10.0, 60.0, 5.0
SUFFIX = ".safetensors"
#: Names of files that say nothing: their folder's name counts.
_GENERAL = ("learned_embeds", "diffusion_pytorch_model", "model")
#: What a file fits, and why it cannot be used, by its kind.
_DESCRIBE: Mapping[Kind, Callable[[Path], tuple[str, str]]] = MappingProxyType(
    {Kind.EMBEDDING: embedding_files.describe}
)
#: Bytes of a file that is copied from a bucket, at most, by its kind.
_MOST: Mapping[Kind, int] = MappingProxyType({Kind.EMBEDDING: embedding_files.MAX_BYTES})


class Remote(Protocol):
    """A bucket that files lie in: `worker.storage.bucket.Bucket`."""

    def below(self, address: str) -> Iterator[tuple[str, float]]:
        """The objects under an address: address, and Unix time of the put."""

    def open(self, uri: str) -> AbstractContextManager[IO[bytes]]:
        """The bytes at an address."""


@dataclass(frozen=True)
class _Found:
    """A file where it lies."""

    kind: Kind
    #: Path or address.
    where: str
    #: Another one when the file is another one.
    stamp: str
    #: Where it is on this machine; None: in a bucket.
    path: Path | None


class FileStore:
    """The files that some settings name. Thread-safe."""

    def __init__(
        self,
        places: Mapping[Kind, str],
        cache: Path,
        remote_of: Callable[[str], Remote] | None = None,
    ) -> None:
        """`places`: a folder or an s3:// prefix for each kind, or "". `remote_of` a name: the bucket.

        Raises `SettingsError` for a folder that is not there, `StorageError`.
        """
        self._places = {kind: place for kind, place in places.items() if place}
        self._cache, self._remote_of = cache / "files", remote_of
        #: What is known of each file, by its stamp: the entry, and where it is.
        self._known: dict[str, tuple[FileEntry, Path | None]] = {}
        self._paths: Mapping[tuple[str, str], Path] = {}
        self._looking, self._looked_s = threading.Lock(), 0.0
        #: All of them. Replaced when something changes.
        self.index: FileIndex = NO_FILES
        self.look()

    @classmethod
    def of(cls, settings: WorkerSettings, remote_of: Callable[[str], Remote]) -> FileStore:
        """The files that a worker's settings name. Raises as the class does."""
        return cls({Kind.EMBEDDING: settings.embeddings}, settings.cache_folder, remote_of)

    def start(self) -> None:
        """Say what was found, and look again now and then, in a thread that ends with the process."""
        for entry in self.index.files:
            if entry.problem:
                logger.warning('The %s "%s" cannot be used: %s.', entry.kind, entry.name, entry.problem)
        for kind, place in self._places.items():
            usable = sum(each.kind == kind and not each.problem for each in self.index.files)
            logger.info("files of the kind %s: %d (%s)", kind, usable, place)
        if self._places:
            threading.Thread(target=self._go_on_looking, name="files", daemon=True).start()

    def look(self) -> None:
        """Find out what is there now. Raises `SettingsError`, `StorageError`."""
        with self._looking:
            entries: dict[tuple[str, str], FileEntry] = {}
            paths: dict[tuple[str, str], Path] = {}
            known: dict[str, tuple[FileEntry, Path | None]] = {}
            for found in self._found():
                entry, path = self._known.get(found.stamp) or self._entry(found)
                known[found.stamp] = entry, path
                if (entry.kind, entry.name) in entries:
                    problem = f"two files have this name, {found.where} is one: rename it"
                    entry = entry.model_copy(update={"problem": problem})
                entries[entry.kind, entry.name] = entry
                if path is not None and not entry.problem:
                    paths[entry.kind, entry.sha256] = path
            self._known, self._paths = known, paths
            if (index := FileIndex.of(entries.values())) != self.index:
                self.index = index
            self._looked_s = time.monotonic()

    def provide(self, job: Job) -> Job:
        """`job` with its files here; with the names that it means here, where its model was not known before.

        Raises `MissingFileError` where this worker has not got them, `InvalidJobError`, `StorageError`.
        """
        if job.is_open:
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
        is_far = any(place.startswith("s3://") for place in self._places.values())
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

    def _found(self) -> Iterator[_Found]:
        count = 0
        for kind, place in self._places.items():
            is_far = place.startswith("s3://")
            for found in self._in_bucket(kind, place) if is_far else _in_folder(kind, place):
                if PurePosixPath(found.where).suffix.lower() not in (SUFFIX, *PICKLED):
                    continue
                count += 1
                if count > MAX_FILES:
                    raise SettingsError(f"{place} has more than {MAX_FILES:,} files: part them.")
                yield found

    def _in_bucket(self, kind: Kind, place: str) -> Iterator[_Found]:
        for uri, put_at in self._remote(place).below(place):
            yield _Found(kind, uri, f"{kind} {uri} {put_at}", None)

    def _remote(self, uri: str) -> Remote:
        if self._remote_of is None:
            raise SettingsError(f"{uri} is in a bucket, and there is none here.")
        return self._remote_of(uri.removeprefix("s3://").partition("/")[0])

    def _entry(self, found: _Found) -> tuple[FileEntry, Path | None]:
        """What is to be known of a file, and where it is on this machine."""
        place = PurePosixPath(found.where)
        stem = place.stem if place.stem not in _GENERAL else place.parent.name
        name = stem.removeprefix("<").removesuffix(">")
        if place.suffix.lower() in PICKLED:
            return FileEntry(kind=found.kind, name=name[:200], problem=PICKLE_REASON), None
        if problem := name_problem(name):
            return FileEntry(kind=found.kind, name=name[:200], problem=problem), None
        try:
            path = found.path or self._fetch(found)
            sha256, size = _sha256(path), path.stat().st_size
        except (OSError, SmallcatError) as error:
            if isinstance(error, ServiceError):
                raise
            return FileEntry(kind=found.kind, name=name, problem=str(error).rstrip(".")), None
        fits, problem = _DESCRIBE[found.kind](path)
        entry = FileEntry(
            kind=found.kind, name=name, sha256=sha256, architecture=fits, size=size, problem=problem
        )
        return entry, path

    def _fetch(self, found: _Found) -> Path:
        """Copy a file from its bucket into the cache. Raises `StorageError`, `OSError`, `SettingsError`."""
        self._cache.mkdir(parents=True, exist_ok=True)
        most, digest, size = _MOST[found.kind], hashlib.sha256(), 0
        part = self._cache / f".{secrets.token_hex(8)}.part"
        try:
            with self._remote(found.where).open(found.where) as body, part.open("wb") as file:
                while data := body.read(1 << 20):
                    digest.update(data)
                    size += len(data)
                    if size > most:
                        raise SettingsError(f"it has more than {most:,} bytes, the limit of its kind")
                    file.write(data)
            path = self._cache / f"{digest.hexdigest()}{SUFFIX}"
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        logger.info("%s: copied into the cache, %d bytes", found.where, size)
        return path


def _in_folder(kind: Kind, place: str) -> Iterator[_Found]:
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise SettingsError(f"The folder {place} for files of the kind {kind} is not there: make it.")
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        stat = path.stat()
        stamp = f"{kind} {path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
        yield _Found(kind, path.as_posix(), stamp, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
