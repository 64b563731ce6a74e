"""What is known of the files that were found, and how it becomes known: each file is read once, for its hash.

    remembered by this machine  ─►  of one in a bucket: known to another worker  ─►  read

A fleet reads each file in a bucket once: a worker claims it, and the others take what it found. What was read
is not kept: a job that needs the file has it fetched (`worker.model.beside.bucket_files`).
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from worker.contract.errors import MachineError, SettingsError, SmallcatError
from worker.contract.file_index import FileEntry
from worker.model.beside.bucket_files import BucketFiles
from worker.model.beside.file_entries import (
    DESCRIBED,
    entry_by_content,
    entry_by_name,
    remember,
    remembered,
    with_error,
)
from worker.model.beside.file_places import Found

logger = logging.getLogger("smallcat.files")

#: Files that are read at once when they are new: hashing one takes a core.
AT_ONCE = 4
#: Seconds until a file that another worker reads is asked for again; and between two signs that one is read.
ASK_AGAIN_S, STILL_READING_S = 1.0, 5.0


class Shared(Protocol):
    """What workers know together: `worker.state.known_files.KnownFiles`."""

    def get(self, stamps: Sequence[str]) -> Mapping[str, FileEntry]:
        """What is known of the files with these stamps."""

    def put(self, known: Mapping[str, FileEntry]) -> None:
        """Let all workers know of these files, by their stamps."""

    def keep(self) -> bool:
        """Keep it all for longer. False: there is nothing."""

    def forget(self, stamp: str) -> None:
        """Let no worker know of a file any more: what was known is wrong."""

    def claim(self, stamp: str) -> bool:
        """Whether this worker may read a file. False: another one reads it."""

    def go_on(self, stamp: str) -> None:
        """This worker still reads the file."""

    def release(self, stamp: str) -> None:
        """This worker reads the file no longer."""


class Alone:
    """A worker that shares with nobody what it knows."""

    def get(self, stamps: Sequence[str]) -> Mapping[str, FileEntry]:
        """Nothing."""
        return {}

    def put(self, known: Mapping[str, FileEntry]) -> None:
        """Nobody asks."""

    def keep(self) -> bool:
        """As if it was there."""
        return True

    def forget(self, stamp: str) -> None:
        """Nobody knows it."""

    def claim(self, stamp: str) -> bool:
        """Nobody else does."""
        return True

    def go_on(self, stamp: str) -> None:
        """Nobody asks."""

    def release(self, stamp: str) -> None:
        """Nobody asks."""


class FileKnowledge:
    """What is known of files. One thread at a time asks for it."""

    def __init__(self, cache: Path, copies: BucketFiles, shared: Shared | None = None) -> None:
        """`cache`: the folder in which it is remembered."""
        self._cache, self._copies, self._shared = cache, copies, shared or Alone()
        #: By the files' stamps.
        self._known: dict[str, FileEntry] = remembered(cache)

    def of(self, found: Iterable[Found]) -> Mapping[str, FileEntry]:
        """What is to be known of these files, by their stamps. Reads those that nobody knows.

        Raises `StorageError`; `SettingsError` where this machine has no room to read one.
        """
        by_stamp = {each.stamp: each for each in found}
        before = self._known
        known = {stamp: entry for stamp, entry in before.items() if stamp in by_stamp}
        far = [stamp for stamp, each in by_stamp.items() if each.path is None]
        if far and not self._shared.keep():
            self._shared.put({_own(stamp): known[stamp] for stamp in far if stamp in known})
        try:
            self._learn({stamp: each for stamp, each in by_stamp.items() if stamp not in known}, known)
        finally:
            # Also where the storage failed half-way: what was read is not read again.
            self._known = known
            if known != before:
                remember(self._cache, known)
        return known

    def forget(self, found: Found) -> None:
        """What was known of a file is wrong: it is read again."""
        self._known = {stamp: entry for stamp, entry in self._known.items() if stamp != found.stamp}
        self._shared.forget(_own(found.stamp))

    def _learn(self, left: dict[str, Found], known: dict[str, FileEntry]) -> None:
        """Add to `known` what is to be known of all that are left."""
        is_logged = False
        while left:
            asked = {_own(stamp): stamp for stamp, each in left.items() if each.path is None}
            for own, entry in self._shared.get(list(asked)).items():
                known[asked[own]] = entry
                del left[asked[own]]
            if len(left) > AT_ONCE and not is_logged:
                logger.info("%d new files are read, once: for their hashes", len(left))
                is_logged = True
            # In an order of its own, so that workers that start together share the work.
            todo = sorted(left.values(), key=lambda each: random.random())  # noqa: S311 - nothing secret
            # Hashing releases Python's lock.
            with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="files") as pool:
                for each, read in zip(todo, pool.map(self._read, todo), strict=True):
                    if read is not None:
                        known[each.stamp] = read
                        del left[each.stamp]
            if left:
                time.sleep(ASK_AGAIN_S)

    def _read(self, found: Found) -> FileEntry | None:
        """What a file says of itself; None while another worker reads it."""
        named = entry_by_name(found)
        if named.problem:
            return named
        if found.path is not None:
            return entry_by_content(found, found.path)
        own = _own(found.stamp)
        if not self._shared.claim(own):
            return None
        try:
            # It may have been read since this worker asked.
            entry = self._shared.get([own]).get(own) or self._read_far(found, named)
            self._shared.put({own: entry})
            return entry
        finally:
            self._shared.release(own)

    def _read_far(self, found: Found, named: FileEntry) -> FileEntry:
        said_s = time.monotonic()

        def still_reading() -> None:
            nonlocal said_s
            if time.monotonic() > said_s + STILL_READING_S:
                said_s = time.monotonic()
                self._shared.go_on(_own(found.stamp))

        try:
            with self._copies.copied(found, still_reading) as path:
                entry = entry_by_content(found, path)
        except OSError as error:
            raise SettingsError(
                f"{found.where} cannot be read, for which it is copied to {self._cache}: {error}. Make room, "
                "or set SMALLCAT_CACHE_DIR."
            ) from error
        except MachineError:
            raise
        except SmallcatError as error:
            return with_error(named, error)
        logger.info("%s: read for its hash, %d bytes", found.where, entry.size)
        return entry


def _own(stamp: str) -> str:
    """A stamp as this version shares it: another one may describe files otherwise."""
    return f"{DESCRIBED} {stamp}"
