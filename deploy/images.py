"""The images that the containers are made from, by digest: `make images-lock` and `make images`.

    python -m deploy.images lock      ask the registries for each image's digest, and write deploy/images.lock
    python -m deploy.images build     build smallcat's images for a release, from these digests alone

The images are the defaults of deploy/Dockerfile (`ARG X_IMAGE=`) and deploy/compose.yaml (`${X_IMAGE:-}`).
The lock is a file of variables, for `--build-arg` and for Compose's `--env-file`. A digest is what a registry
has said: where one cannot be reached, the lock stays as it is, and a release is refused while one is missing.
Only the standard library and Docker are needed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FOLDER = Path(__file__).parent
LOCK = FOLDER / "images.lock"
#: What is built, and what each image is called.
TARGETS = {"worker": "smallcat-worker", "http": "smallcat-http", "flower": "smallcat-flower"}
_HEAD = "# Made by `make images-lock`: the images that a release is made from, as registries named them.\n"


class ImagesError(Exception):
    """Raised when a digest cannot be had, or when one that is needed is missing."""


def wanted() -> dict[str, str]:
    """Every image by its variable: name and tag."""
    dockerfile = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    compose = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
    return dict(
        [
            *re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", dockerfile, re.MULTILINE),
            *re.findall(r"\$\{(\w+_IMAGE):-([^}]+)\}", compose),
        ]
    )


def locked(lock: Path = LOCK) -> dict[str, str]:
    """Every image that has a digest, by its variable. Raises `ImagesError` for another line."""
    found = {}
    for line in lock.read_text(encoding="utf-8").splitlines() if lock.exists() else ():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"(\w+_IMAGE)=(\S+@sha256:[0-9a-f]{64})", line)
            if match is None:
                raise ImagesError(f"{lock} has the line {line!r}: make it anew by `make images-lock`.")
            found[match[1]] = match[2]
    return found


def needed(lock: Path = LOCK) -> dict[str, str]:
    """As `locked`; raises `ImagesError` unless each wanted image is there, in the wanted version."""
    found = locked(lock)
    missing = [
        image for name, image in wanted().items() if not found.get(name, "").startswith(f"{image}@sha256:")
    ]
    if missing:
        raise ImagesError(
            f"{lock} has no digest of {', '.join(missing)}: a release is made from digests alone. Run "
            "`make images-lock` where the registries can be reached."
        )
    return found


def digest_of(image: str) -> str:
    """What the image's registry says its digest is. Raises `ImagesError`."""
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", image]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImagesError(f"Docker cannot be asked for {image}: {error}.") from None
    if done.returncode or not re.fullmatch(r"sha256:[0-9a-f]{64}", done.stdout.strip()):
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ImagesError(f"There is no digest of {image}: {said[-1] if said else 'Docker says nothing'}.")
    return done.stdout.strip()


def write_lock(lock: Path = LOCK) -> None:
    """Write the lock, whole or not at all. Raises `ImagesError`."""
    lines = [f"{name}={image}@{digest_of(image)}" for name, image in sorted(wanted().items())]
    lock.write_text(_HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{lock} has {len(lines)} digests.")


def build() -> None:
    """Build the images of a release, with a list of what is in each. Raises `ImagesError`."""
    arguments = [word for name, image in needed().items() for word in ("--build-arg", f"{name}={image}")]
    try:
        tag = version("smallcat")
    except PackageNotFoundError:
        raise ImagesError("smallcat is not installed, so its version is not known: make setup.") from None
    for target, name in TARGETS.items():
        command = ["docker", "buildx", "build", "--file", str(FOLDER / "Dockerfile"), "--target", target]
        command += [*arguments, "--sbom=true", "--provenance=true", "--load", "--tag", f"{name}:{tag}"]
        if subprocess.run([*command, str(FOLDER.parent)], check=False).returncode:
            raise ImagesError(f"The image {name} could not be built.")


def main(arguments: list[str]) -> int:
    """Carry out a command, and return the exit code."""
    commands = {"lock": write_lock, "build": build}
    if len(arguments) != 1 or arguments[0] not in commands:
        print("usage: python -m deploy.images lock|build", file=sys.stderr)
        return 2
    try:
        commands[arguments[0]]()
    except ImagesError as error:
        print(f"smallcat: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
