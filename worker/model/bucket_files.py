"""The files of buckets on this machine's disk, each kept under the SHA-256 of its content.

FOLDER/<sha256>.safetensors          a file
FOLDER/<sha256>/NAME.safetensors     one that has a config, and the config beside it
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from worker.contract.errors import SettingsError
from worker.contract.file_index import Kind
from worker.model import embedding_files, lora_header, lora_scales, vae_files
from worker.model.file_places import REMOTE, SUFFIX, Found, Remote

logger = logging.getLogger("smallcat.files")

#: Bytes of a file that is copied from a bucket, at most, by its kind.
_MOST: Mapping[Kind, int] = MappingProxyType(
    {
        Kind.EMBEDDING: embedding_files.MAX_BYTES,
        Kind.VAE: vae_files.MAX_BYTES,
        Kind.LORA: lora_header.MAX_BYTES,
    }
)
#: Bytes of a config, at most. Whoever reads one has a limit of its kind, and names it.
_MOST_CONFIG = max(lora_scales.MAX_CONFIG, vae_files.MAX_CONFIG) + 1
#: Bytes that are copied at a time.
_PIECE = 1 << 20


class BucketFiles:
    """Copies files of buckets into a folder of the cache. Thread-safe, and so are several processes."""

    def __init__(self, folder: Path, remote_of: Callable[[str], Remote] | None) -> None:
        """`remote_of` a name: the bucket."""
        self._folder, self._remote_of = folder, remote_of

    def remote(self, address: str) -> Remote:
        """The bucket of an address. Raises `SettingsError`."""
        if self._remote_of is None:
            raise SettingsError(f"{address} is in a bucket, and there is none here.")
        return self._remote_of(address.removeprefix(REMOTE).partition("/")[0])

    def path(self, sha256: str) -> Path | None:
        """Where the file with this content is; None where it is not here."""
        plain = self._folder / f"{sha256}{SUFFIX}"
        if plain.is_file():
            return plain
        return next(iter(sorted((self._folder / sha256).glob(f"*{SUFFIX}"))), None)

    @contextmanager
    def copied(self, found: Found) -> Iterator[Path]:
        """A file of a bucket, with its config beside it, in a folder that is gone afterwards.

        Raises `StorageError`, `OSError`, `SettingsError` for one that is too large.
        """
        folder = self._folder / f".{secrets.token_hex(8)}.part"
        folder.mkdir(parents=True)
        try:
            path = folder / f"{PurePosixPath(found.where).stem}{SUFFIX}"
            if found.config:
                self._copy(found.config, path.with_name(PurePosixPath(found.config).name), _MOST_CONFIG)
            size = self._copy(found.where, path, _MOST[found.kind])
            logger.info("%s: read from the bucket, %d bytes", found.where, size)
            yield path
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def keep(self, path: Path, sha256: str) -> Path:
        """Keep what `copied` made, whose content has this SHA-256. Returns where it is. Raises `OSError`."""
        is_alone = len(list(path.parent.iterdir())) == 1
        if is_alone:
            return path.replace(self._folder / f"{sha256}{SUFFIX}")
        folder = self._folder / sha256
        # Another worker of this machine may have been faster: then its folder has files.
        with suppress(OSError):
            path.parent.rename(folder)
        return folder / path.name

    def _copy(self, address: str, path: Path, most: int) -> int:
        """Copy an object, and say how many bytes it has."""
        size = 0
        with self.remote(address).open(address) as body, path.open("wb") as file:
            while data := body.read(_PIECE):
                size += len(data)
                if size > most:
                    raise SettingsError(f"it has more than {most:,} bytes, the limit of its kind")
                file.write(data)
        return size
