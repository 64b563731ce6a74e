"""Where the files beside a model are: folders, files, places on the hub and s3:// prefixes, listed.

A file's name is its own without the suffix; that of a folder where the file has diffusers' or PEFT's general
name. A file of some kinds has a config beside it that is part of its content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, NamedTuple, Protocol, TypeVar

from worker.contract.errors import SettingsError
from worker.contract.file_index import Kind
from worker.contract.given_file import at_home
from worker.model.beside import lora_hub, vae_files
from worker.model.beside.file_kinds import KINDS
from worker.model.index import PICKLED

SUFFIX, REMOTE = ".safetensors", "s3://"
#: Names of files that say nothing: their folder's name counts.
_GENERAL = ("learned_embeds", "diffusion_pytorch_model", "model", *lora_hub.GENERAL)

_Path = TypeVar("_Path", bound=PurePath)


class Listed(Protocol):
    """An object of a bucket, as a listing has it: `worker.storage.bucket.StoredObject`."""

    @property
    def uri(self) -> str:
        """Its address."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def version(self) -> str:
        """Another one when its content is another one."""


class Remote(Protocol):
    """A bucket that files lie in: `worker.storage.bucket.Bucket`."""

    def listed(self, address: str) -> Iterator[Listed]:
        """The objects under an address."""

    def open(self, uri: str) -> AbstractContextManager[IO[bytes]]:
        """The bytes at an address."""


class Place(NamedTuple):
    """Where files of a kind are."""

    kind: Kind
    #: A folder, a file or an s3:// prefix.
    where: str
    #: What a file of a general name is called that lies at its root.
    name: str = ""

    @property
    def is_far(self) -> bool:
        """Whether it is in a bucket."""
        return self.where.startswith(REMOTE)


@dataclass(frozen=True)
class Found:
    """A file where it lies."""

    kind: Kind
    #: Path or address.
    where: str
    #: Another one when the file is another one, or its config is.
    stamp: str
    #: What it is called.
    name: str
    #: Where it is on this machine; None: in a bucket.
    path: Path | None
    #: The address of its config in the bucket; empty where it has none.
    config: str = ""
    #: Bytes, of one in a bucket.
    size: int = 0

    @property
    def is_pickled(self) -> bool:
        """Whether its name says that it is a pickle."""
        return PurePosixPath(self.where).suffix.lower() in PICKLED


def place_of(kind: Kind, place: str) -> Place:
    """A place as a setting names it. Raises `SettingsError` for one that is not there."""
    if place.startswith(REMOTE):
        return Place(kind, place.rstrip("/"), PurePosixPath(place).parent.name)
    path = at_home(Path(place))
    if path.exists():
        return Place(kind, str(path), path.parent.name if path.is_file() else path.name)
    if kind is Kind.VAE and vae_files.HUB_ID.fullmatch(place) and not place.startswith("."):
        return Place(kind, str(vae_files.from_hub(place)), place.partition("/")[2])
    if kind is Kind.LORA and lora_hub.PLACE.fullmatch(place):
        return Place(kind, str(lora_hub.fetch(place)), place.split("/")[1])
    raise SettingsError(
        f"The folder {place}, which {kind.setting} names, is not there: make it, or correct {kind.setting}."
    )


def on_disk(place: Place) -> Iterator[Found]:
    """The files of a place on this machine. Raises `SettingsError` where it is gone."""
    root = Path(place.where)
    if not root.exists():
        raise SettingsError(f"{root} is no longer there.")
    paths = [root] if root.is_file() else sorted(each for each in root.rglob("*") if each.is_file())
    for path in _chosen(paths):
        config = KINDS[place.kind].config_name(path)
        beside = [path.with_name(config)] if config else []
        stats = [each.stat() for each in (path, *beside) if each.is_file()]
        # The last one changes with every write, also where `cp -p` sets the time of another file.
        found = [(each.st_size, each.st_mtime_ns, each.st_ino, each.st_ctime_ns) for each in stats]
        stamp = f"{place.kind} {place.name} {path} {found}"
        own = place.name if root in (path, path.parent) else path.parent.name
        yield Found(place.kind, path.as_posix(), stamp, _name(path, own), path)


def in_bucket(place: Place, remote: Remote) -> Iterator[Found]:
    """The files of an s3:// prefix, or of the address of one file. Raises `StorageError`."""
    is_one = PurePosixPath(place.where).suffix.lower() == SUFFIX
    root = place.where.rpartition("/")[0] if is_one else place.where
    listed = {each.uri: each for each in remote.listed(root)}
    paths = {PurePosixPath(uri.removeprefix(REMOTE)): uri for uri in listed}
    for path in _chosen(paths):
        uri, config = paths[path], KINDS[place.kind].config_name(path)
        if is_one and uri != place.where:
            continue
        beside = paths.get(path.with_name(config), "") if config else ""
        stamp = f"{place.kind} {uri} {[listed[each].version for each in (uri, beside) if each]}"
        yield Found(place.kind, uri, stamp, _name(path, path.parent.name), None, beside, listed[uri].size)


def _chosen(paths: Iterable[_Path]) -> Iterator[_Path]:
    """Those with weights, the better one where a folder has the same in several formats."""
    paths = [path for path in paths if path.suffix.lower() in (SUFFIX, *PICKLED)]
    known = {path.as_posix().lower() for path in paths}
    for path in paths:
        plain = path.with_name(path.stem.removesuffix(".fp16"))
        is_other = path.suffix.lower() in PICKLED or path.stem.endswith(".fp16")
        if not is_other or f"{plain.as_posix()}{SUFFIX}".lower() not in known:
            yield path


def _name(path: PurePath, folder: str) -> str:
    """What a file in a folder of that name is called."""
    return folder if path.stem.removesuffix(".fp16") in _GENERAL else path.stem
