"""What is installed, pinned and run is what the files say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from worker.contract.settings import WorkerSettings, variables

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
#: What made the bundled model: for a checkout only.
TRAINING = ROOT / "worker" / "demo" / "training"
#: Every pin of constraints.txt, by canonical name.
PINS = {
    canonicalize_name(name): Version(version)
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is installed, so that nothing is left in the checkout. It is called as a clone is."""
    if find_spec("setuptools") is None:
        pytest.skip("needs setuptools, which comes with torch")
    source = tmp_path_factory.mktemp("source") / "smallcat"
    source.mkdir()
    for name in ("worker", "producer", "deploy", "smallcat.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    return source


def pip(command: str, *arguments: str | Path) -> None:
    """Run pip without a network: what builds is installed."""
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", command, *options, *arguments], check=True)


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The built wheel."""
    built = tmp_path_factory.mktemp("built")
    pip("wheel", "-w", built, source)
    with zipfile.ZipFile(next(built.glob("smallcat-*.whl"))) as wheel:
        yield wheel


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(each).name) for each in requirements}


# What is installed


def test_the_wheel_holds_all_of_its_packages_and_its_module_and_nothing_else(
    wheel: zipfile.ZipFile,
) -> None:
    files = set(wheel.namelist())
    modules = {
        str(path.relative_to(ROOT))
        for package in ("worker", "producer", "deploy")
        for path in (ROOT / package).rglob("*.py")
        if TRAINING not in path.parents
    }

    assert modules <= files
    assert not [name for name in files if name.startswith(str(TRAINING.relative_to(ROOT)))]
    assert {"worker/py.typed", "producer/py.typed", "deploy/py.typed"} <= files
    assert {name.split("/")[0] for name in files if ".dist-info/" not in name} == {
        "worker",
        "producer",
        "deploy",
        "smallcat.py",
    }


def test_an_editable_install_is_imported_beside_its_own_checkout(source: Path, tmp_path: Path) -> None:
    # As from a script in the folder where the project was cloned: Python looks there first, and finds a
    # folder of that name.
    pip("install", "--target", tmp_path, "--editable", source)
    program = "import site, sys; site.addsitedir(sys.argv[1]); import smallcat; print(smallcat.submit_job)"
    ran = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        cwd=source.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout.startswith("<function submit_job")) == (0, True), ran.stderr


def test_the_wheel_holds_the_bundled_model(wheel: zipfile.ZipFile) -> None:
    data = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "worker" / "demo").rglob("*")
        if path.suffix in (".safetensors", ".json", ".txt", ".md") and TRAINING not in path.parents
    }

    assert data <= set(wheel.namelist())


def test_the_wheel_holds_the_configs_of_single_files_and_clips_licence(wheel: zipfile.ZipFile) -> None:
    configs = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "worker" / "model" / "configs").rglob("*")
        if path.is_file()
    }

    assert "worker/model/configs/clip/LICENSE.txt" in configs
    assert configs <= set(wheel.namelist())


def test_the_wheel_holds_the_lua_scripts(wheel: zipfile.ZipFile) -> None:
    scripts = {
        str(path.relative_to(ROOT))
        for package in ("worker", "producer")
        for path in (ROOT / package).rglob("*.lua")
    }

    assert scripts
    assert scripts <= set(wheel.namelist())


@pytest.mark.parametrize("package", ["gallery", "http"])
def test_the_wheel_holds_the_parts_of_a_page(wheel: zipfile.ZipFile, package: str) -> None:
    parts = [path for path in (ROOT / "producer" / package / "static").iterdir() if path.is_file()]

    assert {path.suffix for path in parts} >= {".html", ".css", ".js"}
    assert {str(path.relative_to(ROOT)) for path in parts} <= set(wheel.namelist())


def test_the_wheel_has_its_licence_and_its_command(wheel: zipfile.ZipFile, metadata: Message) -> None:
    licence = next(name for name in wheel.namelist() if name.endswith("/LICENSE"))
    commands = next(name for name in wheel.namelist() if name.endswith("/entry_points.txt"))

    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in wheel.read(licence).decode()
    assert wheel.read(commands).decode().split() == ["[console_scripts]", "smallcat", "=", "smallcat:main"]


def test_what_is_installed_from_the_wheel_runs(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Its command and its module, in a folder with other people's `worker.py` and `producer.py`."""
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site]
    subprocess.run([*install, str(wheel.filename)], check=True)
    for name in ("worker.py", "producer.py"):
        (tmp_path / name).write_text("print('somebody else')")

    def run(*command: str | Path, path: str = "") -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": f"{path}{site}"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    code = "import smallcat; print(smallcat.__file__, smallcat.Job(prompt='x').prompt)"
    # -P: without the current folder.
    assert run(sys.executable, "-P", "-c", code).stdout == f"{site / 'smallcat.py'} x\n"
    assert "Submit text-to-image jobs" in run(site / "bin" / "smallcat", "--help").stdout
    hidden = run(site / "bin" / "smallcat", "--help", path=f"{tmp_path}{os.pathsep}")
    assert (hidden.returncode, hidden.stdout) == (2, "")
    assert hidden.stderr.startswith(f"smallcat: {tmp_path / 'producer.py'} hides smallcat's own package")


def test_the_base_installation_renders_nothing() -> None:
    heavy = {"torch", "diffusers", "transformers", "accelerate", "xformers", "safetensors", "numpy"}

    assert not heavy & names(PROJECT["dependencies"])
    assert heavy - {"xformers"} <= names(EXTRAS["worker"]), (
        "xformers' wheels would pull CUDA into a CPU machine"
    )
    assert "xformers" in names(EXTRAS["cuda"])


# What is pinned


def test_each_dependency_is_pinned_within_its_own_bounds() -> None:
    required = [
        *PROJECT["dependencies"],
        *(each for name in ("worker", "local", "dev", "services") for each in EXTRAS[name]),
    ]
    for requirement in map(Requirement, required):
        if requirement.name == PROJECT["name"]:  # an extra that includes another one
            continue
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt does not pin {requirement.name}"
        assert pin in requirement.specifier, f"{requirement} does not allow {pin} of constraints.txt"


def test_constraints_say_what_and_never_where_from() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]

    assert len(lines) == len(PINS), "each line is a pin"
    assert not [name for name, version in PINS.items() if version.local], "a build suffix ties to one index"


def test_each_installation_of_the_makefile_is_constrained() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")

    assert all("--constraint constraints.txt" in line for line in re.findall(r".*pip install.*", makefile))


# What is run


def test_make_explains_itself_and_each_of_its_commands() -> None:
    commands = re.findall(r"^([a-z-]+):.*$", (ROOT / "Makefile").read_text(), re.MULTILINE)

    # As a person calls it, not as a make below the one that may run these tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    shown = subprocess.run(
        ["make"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout

    assert [line.split()[1] for line in shown.splitlines()] == commands


def test_ci_runs_the_commands_that_people_run() -> None:
    script = ROOT / ".ci" / "run"

    assert script.stat().st_mode & 0o111
    assert re.findall(r"^make .*", script.read_text(), re.MULTILINE) == [
        "make test",
        "make demo",
        "make test-services",
    ]
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_the_procfile_is_what_honcho_and_foreman_read() -> None:
    lines = (ROOT / "Procfile").read_text().splitlines()

    assert dict(re.fullmatch(r"(\w+): (.+)", line).groups() for line in lines) == {  # type: ignore[union-attr]
        "worker": "celery -A worker worker",
        "api": "smallcat serve",
        "webhooks": "smallcat webhooks run",
        # Flower knows Redis by its own URL only, not by our transport's. It can stop workers: loopback.
        "flower": 'BROKER_URL="${REDIS_URL:-redis://localhost:6379/0}" celery -A worker flower '
        "--address=127.0.0.1",
    }


# What is deployed


def test_deployments_set_only_what_there_is_to_set() -> None:
    files = [ROOT / "deploy" / "Dockerfile", *(ROOT / "deploy").rglob("*.yaml")]
    text = "\n".join(file.read_text() for file in files)

    used = set(re.findall(r"\bSMALLCAT_[A-Z_]+", text))

    assert used
    assert used <= set(variables())


def test_deployed_workers_get_the_time_they_need_to_drain() -> None:
    """Those of Kubernetes: tests/deploy/test_kubernetes.py; of systemd: tests/deploy/test_systemd.py."""
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    drain_s = WorkerSettings.model_fields["drain_s"].default

    assert int(compose["services"]["worker"]["stop_grace_period"].removesuffix("s")) > drain_s


def test_flower_gets_redis_own_address_wherever_it_is_started() -> None:
    """The app's broker URL names a transport of ours, by whose scheme Flower 2.2 knows no queues."""
    units = (ROOT / "deploy" / "systemd").glob("*.service")
    places = [ROOT / "deploy" / "Dockerfile", ROOT / "Procfile", *units, *(ROOT / "docs").glob("*.md")]
    starts = [
        line
        for place in places
        for line in place.read_text().splitlines()
        if re.search(r"celery .*\bflower\b", line.replace('", "', " "))
    ]
    assert len(starts) >= 4
    assert [line for line in starts if "BROKER_URL=" not in line] == []
    assert [line for line in starts if "--broker" in line] == [], "every user can read a process' arguments"
