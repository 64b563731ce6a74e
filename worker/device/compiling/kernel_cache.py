"""Compiled code that a fleet shares: a signed file for each function and lane, in a folder or a bucket.

    SETUP/NAME.kernels          SETUP: a hash of GPU, versions and architecture; NAME: of function and lane
    SETUP/NAME.kernels.claim    which machine compiles it at present (`worker.device.compiling.claims`)

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

import torch

from worker.contract.errors import SmallcatError, first_line
from worker.device.compiling.claims import Claims, Store

logger = logging.getLogger("smallcat.engine")

#: The beginning of a file, before the signature of 32 bytes.
MAGIC = b"smallcat-kernels-1\n"
_SIGNATURE_BYTES = 32
#: Packages whose versions compiled code depends on.
PACKAGES = ("smallcat", "torch", "triton", "diffusers", "xformers")


class Signed:
    """A `Store` whose files are signed. The first of `keys` signs; each of them is accepted."""

    def __init__(self, store: Store, keys: Sequence[bytes]) -> None:
        self._store, self._keys = store, keys

    def get(self, name: str) -> bytes | None:
        """See `Store`. A file that is not signed by one of the keys counts as none, and is logged."""
        content = self._store.get(name)
        if content is None:
            return None
        # Without a copy: it may be hundreds of megabytes.
        view = memoryview(content)[len(MAGIC) :]
        signature, body = view[:_SIGNATURE_BYTES], view[_SIGNATURE_BYTES:]
        is_ours = any(hmac.compare_digest(signature, _signature(key, name, body)) for key in self._keys)
        if content.startswith(MAGIC) and is_ours:
            return bytes(body)
        logger.warning(
            "The compiled code in %s is refused: none of the keys in SMALLCAT_KERNEL_CACHE_KEY signed it.",
            name,
        )
        return None

    def put(self, name: str, content: bytes) -> None:
        """See `Store`."""
        self._store.put(name, MAGIC + _signature(self._keys[0], name, content) + content)


def _signature(key: bytes, name: str, body: bytes | memoryview) -> bytes:
    # The name has no line end, so that no other name and body have the same text.
    made = hmac.new(key, MAGIC + name.encode() + b"\n", "sha256")
    made.update(body)
    return made.digest()


class KernelCache:
    """The compiled code of one setup: what this machine has, and what the fleet shares. For one thread.

    `here`: torch's own folder of kernels. `shared`: None where nothing is shared. Nothing raises: what cannot
    be read or kept is compiled again, and logged.
    """

    def __init__(self, here: Path, setup: Callable[[], str], shared: Store | None) -> None:
        self._here, self._setup_of, self._shared = here, setup, shared
        self._claims = Claims(shared) if shared is not None else None
        self._setup = ""

    def find(self, what: str, lane: str) -> str | None:
        """The trace of code that is on this machine, maybe only now: from the fleet's. None: there is none.

        Empty: it is there, and has no trace (`worker.device.compiling.traced`).
        """
        name = self._name(what, lane)
        with contextlib.suppress(OSError, UnicodeDecodeError):
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
        try:
            trace, artifacts = _unpacked(found)
            if torch.compiler.load_cache_artifacts(artifacts) is None:
                return None
        except Exception as error:  # noqa: BLE001 - whatever torch raises of it: it is compiled again
            logger.warning("The fleet's compiled %s for %s cannot be used: %r", what, lane, error)
            return None
        logger.info("found the compiled %s for %s: %.0f MB of the fleet's", what, lane, len(found) / 1e6)
        self._keep_mark(name, trace)
        return trace

    def is_shared(self, what: str, lane: str) -> bool:
        """Whether the fleet has the code, signed. Raises as its store."""
        return self._shared is not None and self._shared.get(self._name(what, lane)) is not None

    def lose(self, what: str, lane: str) -> None:
        """What was found does not load."""
        with contextlib.suppress(OSError):
            self._mark(self._name(what, lane)).unlink(missing_ok=True)

    def wait_for_others(self, what: str, lane: str) -> str | None:
        """Wait while another machine compiles it. Its trace; None: this machine is to compile it."""
        if self._claims is None:
            return None
        found: list[str] = []

        def is_there() -> bool:
            if (trace := self.find(what, lane)) is not None:
                found.append(trace)
            return bool(found)

        try:
            self._claims.take(self._name(what, lane), is_there)
        except (OSError, SmallcatError) as error:
            logger.warning("Whether another worker compiles cannot be told: %s", first_line(error))
        return found[0] if found else None

    def renew_claim(self, what: str, lane: str) -> None:
        """This machine still compiles it. Call it every few seconds."""
        if self._claims is not None:
            with contextlib.suppress(OSError, SmallcatError):
                self._claims.renew(self._name(what, lane))

    def end_claim(self, what: str, lane: str) -> None:
        """This machine compiles it no longer."""
        if self._claims is not None:
            with contextlib.suppress(OSError, SmallcatError):
                self._claims.end(self._name(what, lane))

    def keep(self, what: str, lane: str, artifacts: bytes, trace: str) -> str:
        """The code is on this machine now. `artifacts`: torch's portable form of it; empty: there is none.

        Returns why the fleet has not got it, in words; empty: it has, or nothing is shared.
        """
        name = self._name(what, lane)
        self._keep_mark(name, trace)
        if self._shared is None:
            return ""
        if not artifacts:
            return "torch gives no portable form of it"
        try:
            self._shared.put(name, _packed(trace, artifacts))
        except (OSError, SmallcatError) as error:
            logger.warning("Compiled code cannot be shared: %s", first_line(error))
            return first_line(error)
        logger.info("shared the compiled %s for %s: %.0f MB", what, lane, len(artifacts) / 1e6)
        return ""

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
