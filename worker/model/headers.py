"""The bytes of a model's files: what a .safetensors file declares, and a digest of several files."""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.contract.errors import SettingsError
from worker.model.index import PICKLE_REASON

#: The sides of a tensor.
Shape = tuple[int, ...]
#: Bytes of a header, at most: the format's own limit.
MAX_HEADER = 100_000_000
#: Bytes of a file that are read and hashed at a time, and files that are hashed at once.
PIECE, HASHED_AT_ONCE = 64 << 20, 8


@dataclass(frozen=True)
class Tensor:
    """A tensor as a header declares it."""

    #: safetensors' name of the dtype: F32, F16, BF16, F8_E4M3, ...
    dtype: str
    shape: Shape

    @property
    def values(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a .safetensors file declares: its tensors by name, and what its author wrote besides."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def read_header(path: Path, data: bytes | None = None) -> Header:
    """The header of a .safetensors file. Reads no weights. `data`: its bytes, where they were read.

    The format is 8 bytes of length, JSON, then the data (huggingface/safetensors). Raises `SettingsError` if
    the file is truncated or of another format.
    """
    size = path.stat().st_size if data is None else len(data)
    with path.open("rb") if data is None else io.BytesIO(data) as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        # torch.save writes a zip archive; the other bytes start a plain pickle of protocol 2 to 5. A header's
        # length may begin with these bytes too, but then it fits the file.
        if length > size - 8 and start.startswith(
            (b"PK\x03\x04", *(b"\x80%c" % each for each in range(2, 6)))
        ):
            raise SettingsError(f"{path} is a pickle with the name of a .safetensors file: {PICKLE_REASON}.")
        if length > size - 8:
            raise SettingsError(
                f"{path} is truncated or not a safetensors file ({size:,} bytes): download it again, with "
                "git-lfs if it came from a git clone."
            )
        if length > MAX_HEADER:
            raise SettingsError(
                f"{path} has a header of {length:,} bytes, the limit of the format is {MAX_HEADER:,}."
            )
        text = file.read(length)
    try:
        entries: dict[str, Any] = json.loads(text)
        metadata = dict(entries.pop("__metadata__", None) or {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("The format's metadata are texts.")
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        tensors = {
            name: Tensor(str(entry["dtype"]), tuple(int(side) for side in entry["shape"]))
            for name, entry in entries.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError):
        raise SettingsError(f"{path} is not a safetensors file: download it again.") from None
    if 8 + length + end != size:
        raise SettingsError(f"{path} has {size:,} of {8 + length + end:,} bytes: download it again.")
    return Header(tensors, metadata)


def digesting(files: Mapping[str, Path]) -> Callable[[], str]:
    """Begin `digest` on a thread of its own. Returns what waits for it, and raises what it raises."""
    thread = ThreadPoolExecutor(1, "hash the model")
    found = thread.submit(digest, files)
    thread.shutdown(wait=False)
    return found.result


def digest(files: Mapping[str, Path]) -> str:
    """16 hexadecimal digits of a SHA-256 over the names and contents of `files`, in the order of names."""

    names = sorted(files)
    # Reading and hashing release Python's lock, so that several large files are hashed at once.
    with ThreadPoolExecutor(max_workers=HASHED_AT_ONCE) as pool:
        sums = list(pool.map(_sha256, (files[name] for name in names)))
    return hashlib.sha256(json.dumps([names, sums]).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    """The SHA-256 of a file.

    In large pieces: each piece asks for Python's lock twice, which takes as long as hashing some megabytes
    while another thread imports torch.
    """
    digested = hashlib.sha256()
    piece = memoryview(bytearray(min(PIECE, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digested.update(piece[:count])
    return digested.hexdigest()
