"""Downloads the two npm packages with the training data, and checks their published digests.

Microsoft's Fluent emoji, 3D style (MIT), as `@lobehub/fluent-emoji-3d`; names and tags from
`emojibase-data` (MIT).
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One npm package at one version."""

    #: File name of the tarball, as `npm pack` writes it.
    filename: str
    #: npm's name of it, with its version.
    name: str
    #: SHA-512 digest, base64, as the registry publishes it (`npm view NAME dist.integrity`).
    sha512: str


PICTURES = Package(
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "@lobehub/fluent-emoji-3d@1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
NAMES = Package(
    "emojibase-data-17.0.0.tgz",
    "emojibase-data@17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)


def fetch(package: Package, folder: Path) -> Path:
    """The package's tarball in `folder`, downloaded with `npm pack` if it is not there.

    Raises `ValueError` when the file is not the published one, and `OSError` or
    `subprocess.CalledProcessError` when npm is missing or fails.
    """
    path = folder / package.filename
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", package.name, "--pack-destination", str(folder)], check=True)
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != package.sha512:
        raise ValueError(f"{path} is not {package.name}: its SHA-512 is {digest}. Delete it and run again.")
    return path


def members(path: Path, suffix: str) -> dict[str, bytes]:
    """The tarball's files whose path ends in `suffix`: path inside the package -> content."""
    found: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.name.endswith(suffix) else None
            if stream is not None:
                found[member.name.removeprefix("package/")] = stream.read()
    return found
