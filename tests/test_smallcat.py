"""`import smallcat` and the command, beside other people's files that are called `worker` or `producer`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: What pip writes for a console script.
SCRIPT = "import sys\nfrom smallcat import main\nif __name__ == '__main__':\n    sys.exit(main())\n"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs Python in an empty folder, `here`, with smallcat installed behind what the test puts there."""
    here = tmp_path / "here"
    here.mkdir()
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*arguments: str, before: Path | None = None) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(str(each) for each in (before, ROOT) if each is not None)
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=here, env=plain | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60
        )

    return run


@pytest.fixture
def here(run: Run, tmp_path: Path) -> Path:
    return tmp_path / "here"


@pytest.fixture
def script(tmp_path: Path) -> str:
    """The console script, in a folder of its own as in an environment's `bin`."""
    path = tmp_path / "bin" / "smallcat"
    path.parent.mkdir()
    path.write_text(SCRIPT)
    return str(path)


def stranger(folder: Path, name: str) -> Path:
    """Somebody else's module or package; whoever runs it, sees it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("print('somebody else')\n")
    return path


def sentence(path: Path) -> str:
    name = path.parent.name if path.name == "__init__.py" else path.stem
    return f'{path} hides smallcat\'s own package "{name}": rename it, or start from another folder.'


STRANGERS = ["worker.py", "worker/__init__.py", "producer.py", "producer/__init__.py"]


@pytest.mark.parametrize("name", STRANGERS)
def test_importing_smallcat_says_what_hides_it(run: Run, here: Path, name: str) -> None:
    path = stranger(here, name)
    done = run("-c", "import smallcat")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {sentence(path)}"
    # Nothing of theirs has been run.
    assert done.stdout == ""


@pytest.mark.parametrize("name", ["worker.py", "worker/__init__.py"])
def test_importing_from_the_producer_says_what_hides_its_worker(run: Run, here: Path, name: str) -> None:
    path = stranger(here, name)
    done = run("-c", "from producer import submit_job")
    assert done.stderr.splitlines()[-1] == f"ImportError: {sentence(path)}"
    assert done.stdout == ""


def test_a_module_that_was_imported_before_is_named_too(run: Run, here: Path) -> None:
    path = stranger(here, "worker.py")
    done = run("-c", "import worker; import smallcat")
    assert done.stderr.splitlines()[-1] == f"ImportError: {sentence(path)}"


@pytest.mark.parametrize("name", STRANGERS)
def test_the_command_says_what_hides_it(run: Run, tmp_path: Path, script: str, name: str) -> None:
    """Its path does not begin with the current folder, but with that of site-packages, or what was set."""
    path = stranger(tmp_path / "elsewhere", name)
    done = run(script, "--version", before=tmp_path / "elsewhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"smallcat: {sentence(path)}\n"


@pytest.mark.parametrize("name", STRANGERS)
def test_the_command_works_beside_other_peoples_files(run: Run, here: Path, script: str, name: str) -> None:
    stranger(here, name)
    done = run(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "submit" in done.stdout


@pytest.mark.parametrize("name", ["worker.py", "worker/__init__.py"])
def test_the_producers_module_says_what_hides_its_worker(run: Run, here: Path, name: str) -> None:
    path = stranger(here, name)
    done = run("-m", "producer", "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"smallcat: {sentence(path)}\n"


@pytest.mark.parametrize("name", STRANGERS)
def test_smallcats_module_says_what_hides_it(run: Run, here: Path, name: str) -> None:
    path = stranger(here, name)
    done = run("-m", "smallcat", "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"smallcat: {sentence(path)}\n"


@pytest.mark.parametrize("name", STRANGERS)
def test_the_local_stack_says_what_hides_it(run: Run, here: Path, name: str) -> None:
    path = stranger(here, name)
    done = run("-m", "deploy.local", "--", "true")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"smallcat: {sentence(path)}\n"


def test_a_strangers_producer_runs_in_our_place(run: Run, here: Path) -> None:
    """None of our code runs then, so none of it can say so."""
    stranger(here, "producer.py")
    assert run("-m", "producer").stdout == "somebody else\n"


def test_a_program_of_ones_own_may_be_called_smallcat(run: Run, here: Path) -> None:
    (here / "smallcat.py").write_text("from producer import Job\nprint(Job(prompt='a cat').prompt)\n")
    done = run("smallcat.py")
    assert (done.stdout, done.stderr) == ("a cat\n", "")


@pytest.mark.parametrize("folder", ["worker", "producer"])
def test_a_folder_without_modules_hides_nothing(run: Run, here: Path, script: str, folder: str) -> None:
    (here / folder).mkdir()
    (here / folder / "notes.txt").write_text("notes")
    done = run("-c", "import smallcat; print(smallcat.Job(prompt='a cat').prompt)")
    assert (done.stdout, done.stderr) == ("a cat\n", "")


@pytest.mark.parametrize("module", ["smallcat", "producer"])
def test_without_strangers_the_modules_are_the_command(run: Run, module: str) -> None:
    done = run("-m", module, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Submit text-to-image jobs" in done.stdout


# --- types ------------------------------------------------------------------------------------------------


#: What a user's program may do, and the types that it gets.
RIGHT = """import typing
import MODULE

async def main() -> None:
    handle = MODULE.submit_job("a cat", steps=3, seed=7, scheduler="ddim", metadata={"a": 1})
    handle = typing.assert_type(handle, MODULE.JobHandle)
    result = await handle
    result = typing.assert_type(result, MODULE.JobResult)
    print(handle.result(timeout=5).seed, result.uri, await handle.aresult(timeout=1.5), MODULE.State.DONE)
    MODULE.submit_file("p.txt", images=2, steps=3, grid={"steps": [20, 30]}).is_clean

    try:
        handle.image()
    except MODULE.JobError as error:
        print(error)
    handle = MODULE.submit_job(MODULE.Job(prompt="a cat"), steps=None)
    handles = MODULE.submit_job("a cat", images=2)
    handles = typing.assert_type(handles, list[MODULE.JobHandle])
"""
#: A mistake in each line but the first, and a part of what mypy says of it. With overloads it names the
#: argument where it is unknown, and the types where one is of another type.
WRONG = """import MODULE

MODULE.submit_job("a cat", stpes=3).id
MODULE.submit_job("a cat", seed="a").id
MODULE.submit_job(3).id
MODULE.submit_job("a cat").result(timout=3)
MODULE.submit_job("a cat").result("a")
MODULE.submit_file("p.txt", stpes=3)
MODULE.submit_jbo("a cat")
"""
SAID = ['"stpes"', '"str", "int"', '"str", "str"', 'type "int"', "timout", "result", "stpes", "submit_jbo"]


@pytest.fixture(scope="module")
def mypy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What mypy finds in users' programs, by their names. In one run, with the project's own cache."""
    folder = tmp_path_factory.mktemp("programs")
    for module in ("producer", "smallcat"):
        (folder / f"right_{module}.py").write_text(RIGHT.replace("MODULE", module))
        (folder / f"wrong_{module}.py").write_text(WRONG.replace("MODULE", module))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", *folder.glob("*.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stderr == ""
    found: dict[str, list[str]] = {}
    for name, text in re.findall(r"^[^:]*?(\w+)\.py:\d+: error: (.*)$", done.stdout, re.MULTILINE):
        found.setdefault(name, []).append(text)
    return found


@pytest.mark.timeout(320)
@pytest.mark.parametrize("module", ["producer", "smallcat"])
def test_a_type_checker_finds_what_is_wrong(module: str, mypy: dict[str, list[str]]) -> None:
    assert mypy.get(f"right_{module}", []) == []
    wrong = mypy[f"wrong_{module}"]
    assert len(wrong) == len(SAID), wrong
    assert all(any(pattern in line for line in wrong) for pattern in SAID), wrong


def test_its_version_is_that_of_the_package(run: Run) -> None:
    import importlib.metadata

    done = run("-c", "import smallcat; print(smallcat.__version__, '__version__' in dir(smallcat))")
    assert done.stdout.split() == [importlib.metadata.version("smallcat"), "True"], done.stderr
