"""CONTRIBUTING's recipe "Add a job parameter", followed to the letter in a copy of the tree: three files."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("worker", "producer", "deploy", "tests", "docs", ".ci")
FILES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile", "Procfile", "pyproject.toml"),
    *("constraints.txt", "smallcat.py", "SECURITY.md"),
)

#: What a newcomer writes in each file that the recipe names: a place in it, and what comes before that.
EDITS: dict[str, list[tuple[str, str]]] = {
    "worker/contract/job_parameters.py": [
        (
            "    #: diffusers' noise scheduler;",
            (
                "    #: What the first noise is multiplied with, 0 to 2.\n"
                "    noise_multiplier: Annotated[float, Field(ge=0, le=2, strict=True), JobField()] = 1.0\n"
            ),
        ),
        ("    scheduler: Scheduler | str\n", "    noise_multiplier: float\n"),
    ],
    "worker/device/preparation.py": [
        (
            '        with mapped("load the LoRAs"), self._beside():\n',
            "        beginning.latents.mul_(job.noise_multiplier)\n",
        )
    ],
    "tests/worker/contract/test_job.py": [('    "guidance_stop": 0.75,\n', '    "noise_multiplier": 0.5,\n')],
}

#: Renews the documents, renders the same job without and with the parameter, and says what else became of it.
#: In one process, because each of the two needs torch.
TRY = """
import json
import runpy
runpy.run_module("tests.docs", run_name="__main__")
from click.testing import CliRunner
from producer.cli.main import cli
from worker.contract import infotext
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.model_runner import ModelRunner
runner = ModelRunner(WorkerSettings(device="cpu", max_batch=2))
def pixels(job):
    state = runner.prepare(job)
    while state.step < state.steps:
        assert runner.step([state]) == [None]
    (picture,) = runner.decode([state])
    return picture.pixels.tolist()
plain, other = (Job.parse({"prompt": "a small cat", "seed": 1, "steps": 2, **more})
                for more in ({}, {"noise_multiplier": 0.5}))
again = infotext.read(infotext.write(other.resolved(runner.served)))
print(json.dumps({
    "another picture": pixels(plain) != pixels(other),
    "another id": plain.id != other.id,
    "in the infotext": again.noise_multiplier == 0.5,
    "an option": "--noise-multiplier" in CliRunner().invoke(cli, ["submit", "--help"]).output,
    "checked": str(CliRunner().invoke(cli, ["submit", "x", "--noise-multiplier", "3"]).exception),
}))
"""

pytestmark = pytest.mark.timeout(240)


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "SMALLCAT"))}
    return subprocess.run(
        [sys.executable, *command], cwd=copy, env=own, capture_output=True, text=True, timeout=200
    )


@dataclass(frozen=True)
class Followed:
    """The tree after the recipe, and what `TRY` printed there."""

    tree: Path
    printed: str


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Followed]:
    tree = tmp_path_factory.mktemp("tree")
    for part in PARTS:
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    for name, edits in EDITS.items():
        text = (tree / name).read_text()
        for place, added in edits:
            assert text.count(place) == 1, f"{name} has changed: {place!r}"
            text = text.replace(place, added + place)
        (tree / name).write_text(text)
    tried = run(tree, "-c", TRY)
    assert tried.returncode == 0, tried.stderr
    yield Followed(tree, tried.stdout)
    shutil.rmtree(tree)


def changed(copy: Path) -> set[str]:
    files = [path for part in PARTS for path in (copy / part).rglob("*") if path.is_file()]
    files += [copy / name for name in FILES]
    return {
        str(path.relative_to(copy))
        for path in files
        if "__pycache__" not in path.parts
        and not filecmp.cmp(path, ROOT / path.relative_to(copy), shallow=False)
    }


def test_a_new_job_parameter_takes_the_three_files_of_the_recipe(followed: Followed) -> None:
    recipe = re.search(
        r"\*\*Add a job parameter\.\*\* Three files:\n(.*?)\nAll else",
        (ROOT / "CONTRIBUTING.md").read_text(),
        re.DOTALL,
    )
    assert recipe is not None
    assert re.findall(r"^\d\. `([\w./]+)`", recipe[1], re.MULTILINE) == list(EDITS)
    # The documents that name every job field are made from the code.
    assert {name for name in changed(followed.tree) if not name.startswith("docs/")} == set(EDITS)


def test_the_new_parameter_makes_another_picture_and_is_everywhere(followed: Followed) -> None:
    found: dict[str, Any] = json.loads(followed.printed.splitlines()[-1])
    said = found.pop("checked")
    assert found == dict.fromkeys(found, True)
    assert said == "noise_multiplier is 3.0: it must be 0 to 2."


@pytest.mark.services
def test_the_tests_of_the_contract_and_of_the_documents_pass_in_the_new_tree(followed: Followed) -> None:
    tests = [
        *("tests/worker/contract/test_job.py", "tests/worker/contract/test_infotext.py"),
        *("tests/worker/contract/test_message.py", "tests/test_architecture.py", "tests/test_docs.py"),
        *("tests/producer/ingest/test_earlier_version.py", "tests/producer/gallery/test_gallery.py"),
    ]
    done = run(followed.tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, done.stdout[-3000:]
