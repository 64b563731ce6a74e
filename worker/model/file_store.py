"""The files that a worker offers beside its model: found in folders and s3:// prefixes, and indexed.

A file's name is its own without the suffix; that of a folder where the file has diffusers' general name. What
lies in a bucket is copied into the cache once, and kept there under its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import IO, NamedTuple, Protocol

from worker.contract.errors import MissingFileError, ServiceError, SettingsError, SmallcatError
from worker.contract.file_index import (
    MAX_FILES,
    NO_FILES,
    FileEntry,
    FileIndex,
    Kind,
    composed_name,
    name_problem,
)
from worker.contract.job import Job
from worker.contract.job_files import lacking, lacks_hashes, with_files
from worker.contract.settings import WorkerSettings
from worker.model import embedding_files, lora_files, lora_header, lora_hub, lora_scales, vae_files
from worker.model.index import PICKLE_REASON, PICKLED

logger = logging.getLogger("smallcat.files")

#: Seconds between two looks at folders and at buckets; and between two that jobs ask for.
LOOK_EVERY_S, LOOK_AT_BUCKET_EVERY_S, ASKED_EVERY_S = 10.0, 60.0, 5.0
SUFFIX = ".safetensors"
#: Where what is known of files is kept, in the cache; and the version of how they are described.
REMEMBERED, DESCRIBED = "known.json", 1
#: Names of files that say nothing: their folder's name counts.
_GENERAL = ("learned_embeds", "diffusion_pytorch_model", "model", *lora_hub.GENERAL)
#: What a file fits, and why it cannot be used, by its kind.
_DESCRIBE: Mapping[Kind, Callable[[Path], tuple[str, str]]] = MappingProxyType(
    {Kind.EMBEDDING: embedding_files.describe, Kind.VAE: vae_files.describe, Kind.LORA: lora_files.describe}
)
#: Bytes of a file that is copied from a bucket, at most, by its kind.
_MOST: Mapping[Kind, int] = MappingProxyType(
    {
        Kind.EMBEDDING: embedding_files.MAX_BYTES,
        Kind.VAE: vae_files.MAX_BYTES,
        Kind.LORA: lora_header.MAX_BYTES,
    }
)
#: The file beside one of these kinds that is part of its content.
_CONFIGS: Mapping[Kind, str] = MappingProxyType({Kind.VAE: vae_files.CONFIG, Kind.LORA: lora_scales.CONFIG})
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: Files that are read at once when they are new: hashing one takes a core.
_AT_ONCE = 4


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


#: The SHA-256 of a file's content, by its kind.
_SHA256: Mapping[Kind, Callable[[Path], str]] = MappingProxyType(
    {Kind.EMBEDDING: _sha256, Kind.VAE: vae_files.sha256_of, Kind.LORA: lora_files.sha256_of}
)


class Remote(Protocol):
    """A bucket that files lie in: `worker.storage.bucket.Bucket`."""

    def below(self, address: str) -> Iterator[tuple[str, float]]:
        """The objects under an address: address, and Unix time of the put."""

    def open(self, uri: str) -> AbstractContextManager[IO[bytes]]:
        """The bytes at an address."""


class _Place(NamedTuple):
    """Where files of a kind are."""

    kind: Kind
    #: A folder, a file or an s3:// prefix.
    where: str
    #: What a file of a general name is called that lies at its root.
    name: str = ""


@dataclass(frozen=True)
class _Found:
    """A file where it lies."""

    kind: Kind
    #: Path or address.
    where: str
    #: Another one when the file is another one.
    stamp: str
    #: What it is called.
    name: str
    #: Where it is on this machine; None: in a bucket.
    path: Path | None


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
        self._places = [_place(kind, place) for kind, found in places.items() for place in found if place]
        self._cache, self._remote_of = cache / "files", remote_of
        #: What is known of each file, by its stamp: kept in the cache, since reading a file again takes long.
        self._known: dict[str, FileEntry] = _remembered(self._cache / REMEMBERED)
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
                self._remember(known)
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
        is_far = any(place.where.startswith("s3://") for place in self._places)
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

    def _looked_at(self) -> list[tuple[_Found, FileEntry, Path]]:
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

    def _known_here(self, found: _Found) -> tuple[FileEntry, Path] | None:
        """What is known of a file, if it is still here or cannot be used; where it is."""
        if (entry := self._known.get(found.stamp)) is None:
            return None
        path = found.path or self._cache / f"{entry.sha256}{SUFFIX}"
        return (entry, path) if entry.problem or path.is_file() else None

    def _found(self) -> Iterator[_Found]:
        count = 0
        for place in self._places:
            is_far = place.where.startswith("s3://")
            for found in self._in_bucket(place) if is_far else _here(place):
                if PurePosixPath(found.where).suffix.lower() not in (SUFFIX, *PICKLED):
                    continue
                count += 1
                if count > MAX_FILES:
                    raise SettingsError(f"{place.where} has more than {MAX_FILES:,} files: part them.")
                yield found

    def _in_bucket(self, place: _Place) -> Iterator[_Found]:
        for uri, put_at in self._remote(place.where).below(place.where):
            path = PurePosixPath(uri)
            name = path.parent.name if path.stem in _GENERAL else path.stem
            yield _Found(place.kind, uri, f"{place.kind} {uri} {put_at}", name, None)

    def _remote(self, uri: str) -> Remote:
        if self._remote_of is None:
            raise SettingsError(f"{uri} is in a bucket, and there is none here.")
        return self._remote_of(uri.removeprefix("s3://").partition("/")[0])

    def _remember(self, known: Mapping[str, FileEntry]) -> None:
        """Keep what is known for the next start, beside what other workers of this machine know.

        A cache that cannot be written costs that start some time.
        """
        others = _remembered(self._cache / REMEMBERED)
        both = known if len(others) > 4 * MAX_FILES else {**others, **known}
        values = {stamp: entry.model_dump(mode="json") for stamp, entry in both.items()}
        part = self._cache / f".{secrets.token_hex(8)}.part"
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({"version": DESCRIBED, "files": values}), "utf-8")
            part.replace(self._cache / REMEMBERED)
        except OSError as error:
            logger.warning("What is known of files cannot be kept in %s: %s", self._cache, error)

    def _entry(self, found: _Found) -> tuple[FileEntry, Path]:
        """What is to be known of a file, and where it is on this machine."""
        name = found.name.removeprefix("<").removesuffix(">")
        if found.kind is Kind.LORA:
            name = composed_name(name)
        if PurePosixPath(found.where).suffix.lower() in PICKLED:
            return FileEntry(kind=found.kind, name=name[:200], problem=PICKLE_REASON), Path()
        if problem := name_problem(name, found.kind):
            return FileEntry(kind=found.kind, name=name[:200], problem=problem), Path()
        try:
            path = found.path or self._fetch(found)
            size = path.stat().st_size
            sha256 = _SHA256[found.kind](path)
        except (OSError, SmallcatError) as error:
            if isinstance(error, ServiceError):
                raise
            return FileEntry(kind=found.kind, name=name, problem=str(error).rstrip(".")), Path()
        fits, problem = _DESCRIBE[found.kind](path)
        entry = FileEntry(
            kind=found.kind, name=name, sha256=sha256, architecture=fits, size=size, problem=problem
        )
        if found.kind is Kind.LORA and not problem:
            entry = entry.model_copy(update={"auto_v3": lora_files.auto_v3(path)})
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


def _place(kind: Kind, place: str) -> _Place:
    """A place as a setting names it. Raises `SettingsError` for one that is not there."""
    if place.startswith("s3://"):
        return _Place(kind, place)
    path = Path(place).expanduser()
    if path.exists():
        return _Place(kind, str(path), path.parent.name if path.is_file() else path.name)
    if kind is Kind.VAE and _HUB_ID.fullmatch(place) and not place.startswith("."):
        return _Place(kind, str(vae_files.from_hub(place)), place.partition("/")[2])
    if kind is Kind.LORA and lora_hub.PLACE.fullmatch(place):
        return _Place(kind, str(lora_hub.fetch(place)), place.split("/")[1])
    raise SettingsError(
        f"The folder {place}, which {kind.setting} names, is not there: make it, or correct {kind.setting}."
    )


def _here(place: _Place) -> Iterator[_Found]:
    """The files of a place on this machine, the better one where a folder has the same in several formats."""
    root = Path(place.where)
    if not root.exists():
        raise SettingsError(f"{root} is no longer there.")
    paths = [root] if root.is_file() else sorted(each for each in root.rglob("*") if each.is_file())
    known = {each.as_posix().lower() for each in paths}
    for path in paths:
        plain = path.with_name(path.stem.removesuffix(".fp16"))
        is_other = path.suffix.lower() in PICKLED or path.stem.endswith(".fp16")
        if is_other and f"{plain.as_posix()}{SUFFIX}".lower() in known:
            continue
        beside = [path.with_name(_CONFIGS[place.kind])] if place.kind in _CONFIGS else []
        stats = [each.stat() for each in (path, *beside) if each.is_file()]
        # The last one changes with every write, also where `cp -p` sets the time of another file.
        found = [(each.st_size, each.st_mtime_ns, each.st_ino, each.st_ctime_ns) for each in stats]
        stamp = f"{place.kind} {place.name} {path} {found}"
        is_general = path.stem.removesuffix(".fp16") in _GENERAL
        name = (place.name if root in (path, path.parent) else path.parent.name) if is_general else path.stem
        yield _Found(place.kind, path.as_posix(), stamp, name, path)


def _remembered(path: Path) -> dict[str, FileEntry]:
    """What an earlier process knew of files; nothing where that cannot be read, or is another version's."""
    try:
        kept = json.loads(path.read_text("utf-8"))
        if kept["version"] != DESCRIBED:
            return {}
        return {stamp: FileEntry.model_validate(entry) for stamp, entry in kept["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
