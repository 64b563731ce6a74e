"""Gives each worker of a machine a GPU of its own, without any setting.

A worker locks a file in the system's temporary folder that is named by its GPU's UUID. It holds the lock for
the life of its process. However the process ends, the kernel releases the lock. No torch here.

A worker that uses a share of its GPU's memory locks a range of that file: a byte for each thousandth. So the
kernel sees to it that shares fit together, and a worker without a share, which locks the whole file, fits
beside none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from worker.contract.errors import SettingsError

#: The variable with which a user chooses GPUs; CUDA reads it.
CHOSEN_BY = "CUDA_VISIBLE_DEVICES"

#: UUIDs of the GPUs that this process has locked. Their files stay open, and must not be opened again:
#: closing any descriptor of a file releases the process' locks on it.
_held: set[str] = set()
_guard = threading.Lock()

#: Parts of a GPU's memory that shares are counted in.
PARTS = 1_000
#: How often a worker with a share looks for room on GPUs that others use, and seconds in between: one that
#: starts at the same moment holds a whole GPU for an instant.
_LOOKS, _PAUSE_S = 5, 0.05


def take(
    count: int,
    uuid_of: Callable[[int], str],
    environment: Mapping[str, str] = os.environ,
    share_of: Callable[[int], int] | None = None,
) -> tuple[int, str]:
    """The index of a GPU that no other worker uses, of the `count` >= 1 that this process sees, and why.

    It is locked for the life of the process; a later call returns the same one. `uuid_of` returns a GPU's
    UUID by its index. If CUDA_VISIBLE_DEVICES names a single GPU, that one is taken even if another worker
    uses it. `share_of` returns how many of a GPU's `PARTS` the worker uses; then it may also have one beside
    other workers with shares that leave room. Raises `SettingsError` if all GPUs are taken.
    """
    uuids = [uuid_of(index) for index in range(count)]
    with _guard:
        for index, uuid in enumerate(uuids):
            if uuid in _held:
                return index, "this process took it before"
        holders: list[str] = []
        for index, uuid in enumerate(uuids):
            holder = _lock(lock_path(uuid), PARTS if share_of is None else share_of(index))
            if not holder:
                _held.add(uuid)
                return index, _reason(count, holders, environment)
            holders.append(holder)
        for look in range(_LOOKS if share_of is not None else 0):
            time.sleep(_PAUSE_S if look else 0)
            for index, uuid in enumerate(uuids):
                if share_of is not None and _lock_beside(lock_path(uuid), share_of(index)):
                    _held.add(uuid)
                    return index, f"shared: {holders[index]} uses a part of its memory"
    if count == 1 and environment.get(CHOSEN_BY):
        return 0, f"the only GPU in {CHOSEN_BY}, although {holders[0]} uses it"
    taken = ", ".join(f"GPU {index} by {holder}" for index, holder in enumerate(holders))
    remedy = f"set {CHOSEN_BY} to one GPU to share it"
    if share_of is not None:
        remedy = "let SMALLCAT_GPU_MEMORY of all workers on a GPU add up to no more than it has"
    raise SettingsError(
        f"Every GPU that this worker sees is taken ({taken}): stop one of them, start fewer workers on this "
        f"machine, or {remedy}."
    )


def lock_path(uuid: str) -> Path:
    """The lock file of a GPU. It is never deleted: otherwise two workers could lock one GPU."""
    return Path(tempfile.gettempdir()) / f"smallcat-gpu-{uuid}.lock"


def _reason(count: int, holders: list[str], environment: Mapping[str, str]) -> str:
    if count == 1:
        return f"the only GPU in {CHOSEN_BY}" if environment.get(CHOSEN_BY) else "the only GPU"
    others = "".join(f"; {holder} uses GPU {index}" for index, holder in enumerate(holders))
    return f"the first free one of {count} GPUs{others}"


def _lock(path: Path, parts: int) -> str:
    """Lock the file for the life of this process, if nobody has locked anything of it.

    Of fewer than `PARTS` it keeps so many. Returns "", or the process that has locked it.
    """
    with _explained(path):
        file = _open(path)
        try:
            # A lock of the process (POSIX), not of the open file (BSD): a forked child, such as a compiler's,
            # does not keep it after this process.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            pid = os.pread(file, 32, 0).decode("ascii", "replace").strip()
            os.close(file)
            return f"process {pid}" if pid else "another process"
        if parts < PARTS:
            fcntl.lockf(file, fcntl.LOCK_UN, 0, parts)
        os.pwrite(file, f"{os.getpid():<20}\n".encode(), 0)
        return ""


def _lock_beside(path: Path, parts: int) -> bool:
    """Lock so many parts of the file for the life of this process, where they are free. Returns whether."""
    with _explained(path):
        file = _open(path)
        for start in range(PARTS - parts + 1):
            with contextlib.suppress(BlockingIOError, PermissionError):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, parts, start)
                os.pwrite(file, f"{os.getpid():<20}\n".encode(), 0)
                return True
        os.close(file)
        return False


def _open(path: Path) -> int:
    """Open the file so that every user of the machine can open it too. Returns its descriptor."""
    # Create, then open: where /tmp is protected, one call for both fails on another user's file.
    with contextlib.suppress(FileExistsError):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
        os.fchmod(file, 0o666)
        return file
    return os.open(path, os.O_RDWR | os.O_NOFOLLOW)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "OSError")
        raise SettingsError(
            f"The lock file {path} cannot be used ({code}): delete it while no worker runs on this machine."
        ) from error
