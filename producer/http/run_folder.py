"""The folder of a server's runs: whose it is, and what in it may be deleted.

    DATA/.smallcat-http    says that the folder is ours
    DATA/queue-*           likewise such a folder, of one queue: see `run_queue`
    DATA/.upload-*         an upload that arrives; locked by the process that receives it
    DATA/RUN               a run: see `run_store`

Nothing else in it is touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from worker.contract.errors import SettingsError
from worker.contract.explain import short
from worker.contract.settings import ServerSettings

#: The file that says that a folder is ours.
MARKER: Final = ".smallcat-http"
_MARKER_TEXT: Final = "The runs of `smallcat serve`, which deletes those that have expired.\n"
#: Begins the names of folders of uploads.
UPLOAD: Final = ".upload-"
#: Begins the names of folders of queues.
QUEUE: Final = "queue-"
#: What file systems put into a volume's root.
_OF_VOLUMES: Final = frozenset(("lost+found",))
_REMEDY: Final = "set SMALLCAT_HTTP_DATA_DIR to a folder for runs alone, empty or not there yet"


def chosen(settings: ServerSettings) -> Path:
    """The folder that the settings name; where they name none, one among the system's temporary files."""
    return Path(settings.http_data_dir or Path(tempfile.gettempdir()) / f"smallcat-http-{os.getuid()}")


def claim(folder: Path) -> None:
    """Make the folder ours. Raises `SettingsError` where it is somebody else's, or has files of others."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    shown = f"The folder for runs, {short(str(folder))},"
    if not stat.S_ISDIR(found.st_mode):
        raise SettingsError(f"{shown} is a symbolic link: {_REMEDY}, by its own path.")
    if found.st_uid != os.getuid():
        raise SettingsError(f"{shown} is another user's: {_REMEDY}.")
    if (folder / MARKER).exists():
        return
    others = sorted(each.name for each in folder.iterdir() if not _is_known(each))
    if others:
        raise SettingsError(f"{shown} has files that are no runs, such as {short(others[0])}: {_REMEDY}.")
    (folder / MARKER).write_text(_MARKER_TEXT, encoding="utf-8")


def is_run(folder: Path) -> bool:
    """Whether this is a run, by its name and by what is in it."""
    return (
        re.fullmatch("[0-9a-f]{32}|[0-9a-f]{40}", folder.name) is not None
        and not folder.is_symlink()
        and (folder / "run.json").is_file()
    )


def is_queue(folder: Path) -> bool:
    """Whether this is the folder of a queue, by its name."""
    name = re.fullmatch(f"{QUEUE}[0-9a-f]{{16}}", folder.name)
    return name is not None and not folder.is_symlink() and folder.is_dir()


def manifest_of(folder: Path) -> Path | None:
    """The manifest of a run; None until it is written."""
    return next((path for path in folder.glob("manifest.*") if path.suffix in (".jsonl", ".csv")), None)


def is_over(folder: Path) -> bool:
    """Whether a run has ended, well or with an error that is kept."""
    return manifest_of(folder) is not None or (folder / "error.txt").exists()


def has_begun(folder: Path) -> bool:
    """Whether jobs of a run may have been sent: then it has a manifest, or the journal of one."""
    return next(folder.glob("manifest.*"), None) is not None


def _is_known(path: Path) -> bool:
    if path.name in _OF_VOLUMES or path.name == MARKER or path.name.startswith(UPLOAD):
        return True
    if is_run(path) or is_queue(path):
        return True
    # Earlier versions had neither marker nor prefix: an upload that broke off is known by its files.
    return (
        re.fullmatch(r"\.[a-z0-9_]{8}", path.name) is not None
        and path.is_dir()
        and all(re.fullmatch(r"prompts(\..*)?|run\.json", each.name) for each in path.iterdir())
    )


@contextlib.contextmanager
def uploading(folder: Path) -> Iterator[Path]:
    """A folder for one upload, deleted at the end if it is still there. No other process deletes it."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=UPLOAD, dir=folder))
        with locked(made) as is_mine:
            # Between the two lines above another process may have taken it for an upload that was broken off.
            if not is_mine or not made.exists():
                continue
            try:
                yield made
            finally:
                shutil.rmtree(made, ignore_errors=True)
            return


def delete_broken_uploads(folder: Path) -> None:
    """Delete the uploads that no process receives any more."""
    for each in folder.iterdir():
        if each.name.startswith(UPLOAD) and not each.is_symlink() and each.is_dir():
            delete_unlocked(each, each)


def lasting(folder: Path, ttl_s: float) -> Iterator[Path]:
    """The runs in a folder that have not expired; the others are deleted."""
    for run in sorted(filter(is_run, folder.iterdir())):
        with contextlib.suppress(FileNotFoundError):  # Another process took it first.
            if time.time() - run.stat().st_mtime > ttl_s:
                delete_unlocked(run, run / "lock")
            else:
                yield run


def delete_unlocked(folder: Path, lock: Path) -> None:
    """Delete a folder unless a process holds its lock."""
    with contextlib.suppress(OSError), locked(lock) as is_mine:
        if is_mine:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether this caller alone holds the lock of a file or folder, within the context.

    A file is made where there is none. The lock ends with the process that holds it.
    """
    try:
        how = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        lock = os.open(path, how | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:  # Deleted meanwhile, with its folder.
        yield False
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(lock)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also after a loss of power."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as target:
        target.write(text)
        target.flush()
        os.fsync(target.fileno())
    part.replace(path)
