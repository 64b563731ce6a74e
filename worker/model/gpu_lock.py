"""One GPU for one worker: a second one on the same machine takes the next GPU, with nothing to set.

A worker holds a lock file for its GPU, named by the GPU's UUID in the system's folder for temporary files,
for as long as its process lives: however that ends, the kernel frees the lock. No torch here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from worker.contract.errors import SettingsError

#: What a user sets to choose by hand, as CUDA reads it.
CHOSEN_BY = "CUDA_VISIBLE_DEVICES"

#: UUIDs of the GPUs that this process holds. Their files stay open, and must not be opened a second time:
#: closing any descriptor of a file drops the process' locks on it.
_held: set[str] = set()
_guard = threading.Lock()


def take(
    count: int, uuid_of: Callable[[int], str], environment: Mapping[str, str] = os.environ
) -> tuple[int, str]:
    """The index of a GPU that no other worker uses, of the `count` >= 1 that this process sees, and why it.

    Taken for the life of the process; a later call gives the same one. `uuid_of` gives a GPU's UUID by its
    index. A GPU that CUDA_VISIBLE_DEVICES leaves as the only one is the user's choice, and taken in any case.
    Raises `SettingsError` when all are taken.
    """
    uuids = [uuid_of(index) for index in range(count)]
    with _guard:
        for index, uuid in enumerate(uuids):
            if uuid in _held:
                return index, "taken by this process before"
        holders: list[str] = []
        for index, uuid in enumerate(uuids):
            holder = _lock(lock_path(uuid))
            if not holder:
                _held.add(uuid)
                return index, _reason(count, holders, environment)
            holders.append(holder)
    if count == 1 and environment.get(CHOSEN_BY):
        return 0, f"{CHOSEN_BY} leaves no other, although {holders[0]} uses it"
    told = ", ".join(f"GPU {index} by {holder}" for index, holder in enumerate(holders))
    raise SettingsError(
        f"Every GPU that this worker sees is taken ({told}): stop one of them, start fewer workers on this "
        f"machine, or set {CHOSEN_BY} to one GPU to share it."
    )


def lock_path(uuid: str) -> Path:
    """The lock file of a GPU. It is left there: deleting it would let two workers hold one GPU."""
    return Path(tempfile.gettempdir()) / f"smallcat-gpu-{uuid}.lock"


def _reason(count: int, holders: list[str], environment: Mapping[str, str]) -> str:
    if count == 1:
        return f"{CHOSEN_BY} chooses it" if environment.get(CHOSEN_BY) else "the only GPU"
    others = (
        f"; {', '.join(holders)} {'has' if len(holders) == 1 else 'have'} the ones before" if holders else ""
    )
    return f"the first free one of {count} GPUs{others}"


def _lock(path: Path) -> str:
    """Lock the file for the life of this process. Returns who else has it, else ""."""
    with _explained(path):
        file = _open(path)
        try:
            # A lock of the process (POSIX), not of the open file (BSD): a child that was forked, such as a
            # compiler's, does not keep it when this process dies.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            pid = os.pread(file, 32, 0).decode("ascii", "replace").strip()
            os.close(file)
            return f"process {pid}" if pid else "another process"
        os.pwrite(file, f"{os.getpid():<20}\n".encode(), 0)
        return ""


def _open(path: Path) -> int:
    """The file's descriptor, for every user of the machine to open as well."""
    # Not both at once: where /tmp is protected, opening another user's file as if to create it is refused.
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
