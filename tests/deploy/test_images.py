"""The Dockerfile: clean by its linter, made from digests, and its RUN lines run in a clean folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import images
from tests.deploy.dockerfile import DOCKERFILE, instructions, stages
from tests.deploy.processes import BIN, ROOT
from worker.contract.settings import variables

DIGEST = "sha256:" + "0123456789abcdef" * 4


# What it says


@pytest.mark.parametrize("target", images.TARGETS)
def test_an_image_runs_as_a_user_without_rights_and_writes_to_volumes_alone(target: str) -> None:
    stage = stages()[target]
    assert stage.last("USER") == "1000:1000"
    assert stage.command, "exec form: SIGTERM reaches the program"
    folders = [argument for name, argument in stage.instructions if name == "VOLUME"]
    for name, value in stage.environment.items():
        if name in ("HF_HOME", "SMALLCAT_CACHE_DIR", "SMALLCAT_HTTP_DATA_DIR"):
            assert any(value.startswith(f"{folder}/") for folder in folders), name
    assert {name for name in stage.environment if name.startswith("SMALLCAT_")} <= set(variables())


def test_each_image_is_made_from_one_that_the_lock_can_name() -> None:
    bases = {argument.split()[0] for name, argument in instructions() if name == "FROM"} - set(stages())
    assert {base.strip("${}") for base in bases} < set(images.wanted())


@pytest.mark.services
def test_the_linter_of_dockerfiles_finds_nothing() -> None:
    done = subprocess.run([BIN / "hadolint", DOCKERFILE], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""


# The lock


def test_a_release_is_refused_while_a_digest_is_missing(tmp_path: Path) -> None:
    lock = tmp_path / "images.lock"
    with pytest.raises(images.ImagesError, match=r"python:3\.12"):
        images.needed(lock)
    lines = [f"{name}={image}@{DIGEST}" for name, image in images.wanted().items()]
    lock.write_text("\n".join(lines[1:]))
    with pytest.raises(images.ImagesError, match=re.escape(next(iter(images.wanted().values())))):
        images.needed(lock)
    lock.write_text("# made\n" + "\n".join(lines))
    assert set(images.needed(lock)) == set(images.wanted())
    lock.write_text("\n".join([*lines[1:], f"PYTHON_IMAGE=python:2.7@{DIGEST}"]))
    with pytest.raises(images.ImagesError, match=r"python:3\.12"):
        images.needed(lock)
    lock.write_text("PYTHON_IMAGE=python:3.12")
    with pytest.raises(images.ImagesError, match="make it anew"):
        images.needed(lock)


def test_the_lock_that_is_there_names_what_registries_said_or_nothing() -> None:
    locked = images.locked()
    assert locked == {} or set(locked) == set(images.wanted())


def test_a_registry_that_is_away_changes_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\necho 'dial tcp: no route to host' >&2\nexit 1\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    lock = tmp_path / "images.lock"
    with pytest.raises(images.ImagesError, match="no route to host"):
        images.write_lock(lock)
    assert not lock.exists()
    docker.write_text(f"#!/bin/sh\necho {DIGEST}\n")
    images.write_lock(lock)
    assert set(images.needed(lock)) == set(images.wanted())


# What its RUN lines do


def run_lines(stage: str) -> list[str]:
    """The RUN lines of a stage's own."""
    found: list[str] = []
    current = ""
    for name, argument in instructions():
        if name == "FROM":
            current = argument.rpartition(" ")[2]
        elif name == "RUN" and current == stage:
            found.append(re.sub(r"--mount=\S+ ", "", argument))
    return found


def copied(folder: Path) -> None:
    """What the COPY lines of a build stage bring: the files of the checkout that git knows."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    sources = [
        word
        for name, argument in instructions()
        if name == "COPY" and "--from" not in argument
        for word in argument.split()[:-1]
    ]
    for file in listed.split("\0"):
        if file and any(file == source or file.startswith(f"{source}/") for source in sources):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / file).exists():
                shutil.copy(ROOT / file, folder / file)


def test_each_run_line_is_run_by_a_test_or_is_debians() -> None:
    lines = [argument for name, argument in instructions() if name == "RUN"]
    ours = [line for stages_of in BUILDS.values() for stage in stages_of for line in run_lines(stage)]
    rest = [re.sub(r"--mount=\S+ ", "", line) for line in lines]
    assert [line for line in rest if line not in ours and not line.startswith("apt-get update")] == []


#: Images by the stages whose RUN lines make them, in one folder, in this order.
BUILDS = {
    "http": ("http-build", "http", "flower-build"),
    "worker": ("worker-build", "weights", "worker"),
}


@pytest.mark.services
@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("image", BUILDS)
def test_the_run_lines_make_what_the_image_runs(image: str, tmp_path: Path) -> None:
    """With the CPU's torch, which this machine's index has, and the bundled model for one of the hub."""
    source = tmp_path / "src"
    source.mkdir()
    copied(source)
    (tmp_path / "srv").mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "TMP"))},
        "PATH": f"{Path(sys.base_prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "WORKER_EXTRAS": "worker",
        "MODEL": str(ROOT / "worker" / "demo" / "model"),
        "MODEL_REVISION": "",
    }
    for stage in BUILDS[image]:
        for line in run_lines(stage):
            here = re.sub(r"(?<![\w.])/(srv|data|cache)\b", rf"{tmp_path}/\1", line)
            here = here if os.geteuid() == 0 else re.sub(r"&& chown \S+ \S+", "", here)
            done = subprocess.run(
                ["/bin/sh", "-ec", here], cwd=source, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{here}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    programs = tmp_path / "srv" / "smallcat" / "bin"
    for target in ("http", "flower") if image == "http" else ("worker",):
        words = " ".join(stages()[target].command)
        assert any((programs / name).exists() for name in re.findall(r"\b(?:smallcat|celery)\b", words))
    # A clean environment: what pip finds wrong is wrong in the image.
    python = programs / "python"
    checked = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0, checked.stdout

    # What is in it, by CycloneDX's own tool.
    listed = tmp_path / "sbom.json"
    command = [
        BIN / "cyclonedx-py",
        "environment",
        "--output-format",
        "JSON",
        "--output-file",
        listed,
        python,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    names = {each["name"] for each in json.loads(listed.read_text())["components"]}
    assert {"smallcat", "celery", "redis"} <= names
    assert ("torch" in names) is (image == "worker"), "the HTTP API needs no torch"
