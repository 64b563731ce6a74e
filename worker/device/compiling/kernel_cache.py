"""Compiled code that a fleet shares: a signed file for each function and lane, in a folder or a bucket.

    SETUP/NAME.kernels      SETUP: a hash of GPU, versions and architecture; NAME: of function and lane

What is in such a file runs on every worker that reads it. So it is signed with a key that only workers have,
and refused without a valid signature. The signature covers the file's name too, so that no file can stand for
another one. Torch's own cache has a hash of everything that the code depends on: a file that does not fit, in
spite of its name, is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from worker.contract.errors import SmallcatError, first_line

logger = logging.getLogger("smallcat.engine")

#: The beginning of a file, before the signature of 32 bytes.
MAGIC = b"smallcat-kernels-1\n"
_SIGNATURE_BYTES = 32
#: Packages whose versions compiled code depends on.
PACKAGES = ("smallcat", "torch", "triton", "diffusers", "xformers")


class Store(Protocol):
    """Where the files are: a folder, or a prefix of a bucket."""

    def get(self, name: str) -> bytes | None:
        """The file; None: there is none. Raises `OSError` or `SmallcatError`."""

    def put(self, name: str, content: bytes) -> None:
        """Keep a file, in the place of another one of this name. Raises alike."""


class Folder:
    """A `Store` in a folder, which several machines may share."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, name: str) -> bytes | None:
        """See `Store`."""
        try:
            return (self._path / name).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, name: str, content: bytes) -> None:
        """See `Store`. A reader finds all of it or nothing."""
        path = self._path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_bytes(content)
        unfinished.replace(path)


class Signed:
    """A `Store` whose files are signed. The first of `keys` signs; each of them is accepted."""

    def __init__(self, store: Store, keys: Sequence[bytes]) -> None:
        self._store, self._keys = store, keys

    def get(self, name: str) -> bytes | None:
        """See `Store`. A file that is not signed by one of the keys counts as none, and is logged."""
        content = self._store.get(name)
        if content is None:
            return None
        signature, body = content[len(MAGIC) :][:_SIGNATURE_BYTES], content[len(MAGIC) + _SIGNATURE_BYTES :]
        is_ours = any(hmac.compare_digest(signature, _signature(key, name, body)) for key in self._keys)
        if content.startswith(MAGIC) and is_ours:
            return body
        logger.warning(
            "The compiled code in %s is refused: none of the keys in SMALLCAT_KERNEL_CACHE_KEY signed it.",
            name,
        )
        return None

    def put(self, name: str, content: bytes) -> None:
        """See `Store`."""
        self._store.put(name, MAGIC + _signature(self._keys[0], name, content) + content)


def _signature(key: bytes, name: str, body: bytes) -> bytes:
    # The name has no line end, so that no other name and body have the same text.
    return hmac.digest(key, MAGIC + name.encode() + b"\n" + body, "sha256")


class KernelCache:
    """The compiled code of one setup: what this machine has, and what the fleet shares. For one thread.

    `here`: torch's own folder of kernels. `shared`: None where nothing is shared. Nothing raises: what cannot
    be read or kept is compiled again, and logged.
    """

    def __init__(self, here: Path, setup: Callable[[], str], shared: Store | None) -> None:
        self._here, self._setup_of, self._shared = here, setup, shared
        self._setup = ""

    def find(self, what: str, lane: str) -> str | None:
        """The trace of code that is on this machine, maybe only now: from the fleet's. None: there is none.

        Empty: it is there, and has no trace (`worker.device.compiling.traced`).
        """
        name = self._name(what, lane)
        with contextlib.suppress(OSError):
            return self._mark(name).read_text("utf-8")
        if self._shared is None:
            return None
        try:
            found = self._shared.get(name)
        except (OSError, SmallcatError) as error:
            logger.warning("Shared compiled code cannot be read: %s", first_line(error))
            return None
        if found is None:
            return None
        trace, artifacts = _unpacked(found)
        if torch.compiler.load_cache_artifacts(artifacts) is None:
            return None
        logger.info("found the compiled %s for %s: %.0f MB of the fleet's", what, lane, len(found) / 1e6)
        self._keep_mark(name, trace)
        return trace

    def keep(self, what: str, lane: str, artifacts: bytes, trace: str) -> None:
        """The code is on this machine now. `artifacts`: torch's portable form of it; empty: there is none."""
        name = self._name(what, lane)
        self._keep_mark(name, trace)
        if self._shared is None or not artifacts:
            return
        try:
            self._shared.put(name, _packed(trace, artifacts))
        except (OSError, SmallcatError) as error:
            logger.warning("Compiled code cannot be shared: %s", first_line(error))
        else:
            logger.info("shared the compiled %s for %s: %.0f MB", what, lane, len(artifacts) / 1e6)

    def _name(self, what: str, lane: str) -> str:
        self._setup = self._setup or self._setup_of()
        digest = hashlib.sha256(f"{what} for {lane}".encode()).hexdigest()
        return f"{self._setup}/{digest[:16]}.kernels"

    def _mark(self, name: str) -> Path:
        # In torch's folder: whoever empties that has no code any more.
        return self._here / "smallcat" / name

    def _keep_mark(self, name: str, trace: str) -> None:
        mark = self._mark(name)
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            unfinished = mark.with_suffix(f".{os.getpid()}")
            unfinished.write_text(trace, "utf-8")
            unfinished.replace(mark)
        except OSError as error:
            logger.debug("no mark for compiled code: %s", error)


def _packed(trace: str, artifacts: bytes) -> bytes:
    text = trace.encode()
    return len(text).to_bytes(8, "little") + text + artifacts


def _unpacked(content: bytes) -> tuple[str, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end].decode(), content[end:]


def setup_name(device: torch.device, components: Mapping[str, object], *more: object) -> str:
    """20 hexadecimal digits of a hash of what compiled code depends on.

    `components`: the model's modules by name, whose text lists all layers and their sizes. `more`: choices.
    """
    import platform

    from worker.contract.versions import versions

    properties = torch.cuda.get_device_properties(device)
    parts = [
        properties.name,
        f"{properties.major}.{properties.minor}",
        # Compiled code names its GPU.
        str(device.index or 0),
        str(torch.version.cuda),
        platform.python_version(),
        str(versions(PACKAGES)),
        *(
            f"{name}: {module}"
            for name, module in sorted(components.items())
            if isinstance(module, torch.nn.Module)
        ),
        *map(str, more),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
