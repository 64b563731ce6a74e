"""The files of buckets on this machine's disk, fetched when a job needs them.

    FOLDER/<sha256>.safetensors          a file, by the SHA-256 of its content
    FOLDER/<sha256>/NAME.safetensors     one that has a config, and the config beside it
    FOLDER/.<random>.part/...            one that is on its way

Together they take a bounded space: what was used least lately goes first. All workers of a machine that have
the same cache share them.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from worker.contract.errors import EngineStoppedError, SettingsError
from worker.model.beside.file_kinds import KINDS
from worker.model.beside.file_places import REMOTE, SUFFIX, Found, Remote

logger = logging.getLogger("smallcat.files")

#: Bytes that are copied at a time.
_PIECE = 1 << 20
#: Seconds after which a file that is on its way, and grows no longer, is what a worker left that was killed.
STALE_S = 600.0
_KEPT = re.compile(rf"[0-9a-f]{{64}}({re.escape(SUFFIX)})?")


class _Kept(NamedTuple):
    """What lies in the folder under one name."""

    #: Unix seconds of its last use; of one on its way, of its last growth.
    used_at: float
    #: Bytes.
    size: int
    place: Path


class BucketFiles:
    """The fetched files in one folder. Thread-safe, and so are several processes."""

    def __init__(
        self, folder: Path, remote_of: Callable[[str], Remote] | None, limit: int | None = None
    ) -> None:
        """`remote_of` a name: the bucket. `limit`: bytes of the disk; None: chosen by what is free."""
        self._folder, self._remote_of = folder, remote_of
        self._limit, self._chosen = limit, ""
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._making_room = threading.Lock()
        self._stopped = False

    def limit(self) -> tuple[int, str]:
        """Bytes of the disk that fetched files take, at most, and why. A larger file is there alone."""
        if self._limit is not None:
            return self._limit, self._chosen or "SMALLCAT_FILE_DISK asks for it"
        there = next(each for each in (self._folder, *self._folder.absolute().parents) if each.exists())
        free = shutil.disk_usage(there).free + sum(each.size for each in self._all())
        self._limit = free // 2
        self._chosen = f"half of the {free / 2**30:.1f} GiB that are free; SMALLCAT_FILE_DISK sets it"
        return self._limit, self._chosen

    def remote(self, address: str) -> Remote:
        """The bucket of an address. Raises `SettingsError`."""
        if self._remote_of is None:
            raise SettingsError(f"{address} is in a bucket, and there is none here.")
        return self._remote_of(address.removeprefix(REMOTE).partition("/")[0])

    def path(self, sha256: str) -> Path | None:
        """Where the file with this content is, which is used now; None where it is not here."""
        place = self._folder / f"{sha256}{SUFFIX}"
        path: Path | None = place
        if not place.is_file():
            place = self._folder / sha256
            path = next(iter(sorted(place.glob(f"*{SUFFIX}"))), None)
        if path is not None:
            with suppress(OSError):
                _used(place)
        return path

    def fetch(self, found: Found, sha256: str) -> Path | None:
        """The file with this content, which should be the one that was found; None where that is another one.

        Whoever wants the same file meanwhile waits for it. Raises `StorageError`, `OSError`, and what
        `copied` raises.
        """
        with self._locks[sha256]:
            if (here := self.path(sha256)) is not None:
                return here
            self._make_room(found.size)
            begun_s = time.monotonic()
            with self.copied(found) as path:
                if KINDS[found.kind].sha256_of(path) != sha256:
                    return None
                kept = self._keep(path, sha256)
            taken_s = time.monotonic() - begun_s
            logger.info("%s: fetched, %d bytes in %.1f s", found.where, found.size, taken_s)
            return kept

    @contextmanager
    def copied(self, found: Found, on_piece: Callable[[], object] = lambda: None) -> Iterator[Path]:
        """A file of a bucket, with its config beside it, in a folder that is gone afterwards.

        `on_piece` is called while it is copied. Raises `StorageError`, `OSError`, `SettingsError` for one
        that is too large, `EngineStoppedError` after `stop`.
        """
        kind, folder = KINDS[found.kind], self._folder / f".{secrets.token_hex(8)}.part"
        folder.mkdir(parents=True)
        try:
            path = folder / f"{PurePosixPath(found.where).stem}{SUFFIX}"
            if found.config:
                beside = path.with_name(PurePosixPath(found.config).name)
                # One byte more than whoever reads it takes, who then names it and its limit.
                self._copy(found.config, beside, kind.most_config + 1, on_piece)
            self._copy(found.where, path, kind.most, on_piece)
            yield path
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def stop(self) -> None:
        """Let those who wait for a file wait no longer: the worker stops."""
        self._stopped = True

    def _copy(self, address: str, path: Path, most: int, on_piece: Callable[[], object]) -> None:
        size = 0
        with self.remote(address).open(address) as body, path.open("wb") as file:
            while data := body.read(_PIECE):
                if self._stopped:
                    raise EngineStoppedError("The worker is stopping: the job goes back to the queue.")
                size += len(data)
                if size > most:
                    raise SettingsError(f"it has more than {most:,} bytes, the limit of its kind")
                file.write(data)
                on_piece()

    def _keep(self, path: Path, sha256: str) -> Path:
        """Keep what `copied` made. Returns where it is. Raises `OSError`."""
        if len(list(path.parent.iterdir())) == 1:
            return path.replace(self._folder / f"{sha256}{SUFFIX}")
        folder = self._folder / sha256
        # Another worker of this machine may have been faster: then its folder has files.
        with suppress(OSError):
            path.parent.rename(folder)
        return folder / path.name

    def _make_room(self, size: int) -> None:
        """Let go of what was used least lately until there is room for so many bytes."""
        limit, _ = self.limit()
        with self._making_room:
            kept = sorted(self._all())
            total = sum(each.size for each in kept)
            for each in kept:
                is_part = not _KEPT.fullmatch(each.place.name)
                if is_part and each.used_at > time.time() - STALE_S:
                    continue
                if not is_part and total + size <= limit:
                    continue
                total -= each.size
                _remove(each.place)

    def _all(self) -> Iterator[_Kept]:
        """What lies in the folder."""
        with suppress(OSError):
            for place in self._folder.iterdir():
                if not (_KEPT.fullmatch(place.name) or place.suffix == ".part"):
                    continue
                with suppress(OSError):  # Another worker removes it.
                    stats = [each.stat() for each in (place, *(place.iterdir() if place.is_dir() else ()))]
                    is_part = place.suffix == ".part"
                    used_at = max(each.st_mtime for each in stats[: None if is_part else 1])
                    yield _Kept(used_at, sum(each.st_size for each in stats), place)


def _used(place: Path) -> None:
    now = time.time_ns()
    os.utime(place, ns=(now, now))


def _remove(place: Path) -> None:
    """Remove a file, or a folder as a whole."""
    with suppress(OSError):
        if not place.is_dir():
            place.unlink()
            return
        gone = place.with_name(f".{secrets.token_hex(8)}.part")
        place.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
