"""The examples of the documents, run as they stand on the stack that `make local` keeps running."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from producer.cli.main import cli
from tests.docs import ROOT
from tests.markdown import codes
from worker.demo.training.captions import BACKGROUNDS
from worker.demo.training.classifier import recognise

pytestmark = [pytest.mark.usefixtures("servers"), pytest.mark.timeout(240)]

#: Where the documents have `.venv/bin`.
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def exports() -> Iterator[str]:
    """What `make local` prints, for pasting into another terminal. Nothing is kept between runs here."""
    with subprocess.Popen(
        [sys.executable, "-m", "deploy.local"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as stack:
        assert stack.stdout is not None
        # It is printed at once, when the worker is ready.
        printed = stack.stdout.read(65_536).decode()
        yield printed
        stack.terminate()


def run(commands: str, folder: Path) -> str:
    """What a new shell in `folder` prints for `commands`. Fails where one of them does."""
    # The other terminal has nothing of the stack, and finds smallcat as if it were installed.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_", "REDIS_"))
    }
    environment |= {"PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands.replace(".venv/bin/", f"{BIN}/")],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(document: str) -> list[str]:
    """The Python examples of a document, before what is made from the code, without their prompts."""
    return [
        re.sub(r"^(>>>|\.\.\.) ?", "", code.text, flags=re.MULTILINE)
        for code in codes(ROOT / document)
        if code.language == "python" and "import" in code.text
    ]


def test_the_readme_s_own_first_job(exports: str, tmp_path: Path) -> None:
    """With what `make local` leaves for other terminals, type what the README says."""
    [shell] = [
        code.text for code in codes(ROOT / "README.md") if code.language == "sh" and "--show" in code.text
    ]
    assert shell.rstrip().endswith(".venv/bin/python")
    [typed] = python("README.md")
    # What `make local` leaves in its folder; its own test compares that with what it prints.
    (tmp_path / ".smallcat").mkdir()
    (tmp_path / ".smallcat" / "env").write_text(exports)
    printed = run(f"{shell.rstrip()} -i -q - <<'END'\n{typed}\nEND", tmp_path)

    assert re.search(r'^"a rocket", 128x128, seed \d+, 20 steps$', printed, re.MULTILINE)
    assert re.search(r"^'http://127\.0\.0\.1:\d+/smallcat/images/.*'$", printed, re.MULTILINE)


def test_the_python_examples(exports: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("prompt\na small cat\n")
    examples = "\n".join(python("docs/python-api.md") + python("docs/errors.md"))
    # An id that is there.
    examples = re.sub(r'JobHandle\("[0-9a-f]{32}"\)', "JobHandle(handle.id)", examples)
    # Words to see that each was run, and the one that is only defined.
    examples += "\nimport asyncio\nprint('drawn', asyncio.run(draw('a fox')).state)\n"
    printed = run(f"{exports}\npython - <<'END'\n{examples}\nEND", tmp_path)

    assert "finished 8 0 prompts.csv.manifest.jsonl" in printed
    assert "drawn done" in printed
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 8


def test_the_prompt_files_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to get several pictures of a prompt gives as many as its row says."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards" / "colours.txt").write_text("red\ngreen\n")
    for line, options, jobs in (
        ("a {red|green|blue} car", "", 3),
        ("a car, {2$$a|b|c}", "", 6),
        ("a __colours__ car", "", 2),
        ("a {3::red|blue} car", "", 2),
        ("a {1|2|3|4|5|6|7|8|9|10|11|12} car", "--sample 10", 10),
        ("a car", "--images 4", 4),
        ("a car", "--grid steps=20,30 guidance_scale=2,4", 4),
        (r"a \{red|blue} \__car__", "", 1),
        ("a {red|blue} car", "--literal", 1),
        ('--prompt "a small cat" --negative_prompt "blurry" --steps 30 --cfg_scale 7 --n_iter 2', "", 2),
    ):
        (tmp_path / "prompts.txt").write_text(line)
        done = CliRunner().invoke(cli, ["ingest", "prompts.txt", *options.split(), "--check"])
        # Without Redis the line goes on with what was not checked.
        said = f"\n{jobs} job{'s' * (jobs > 1)}, 0 bad lines; nothing was sent"
        assert said in done.output, (line, done.output)


def test_a_shell_inside_a_stack(tmp_path: Path) -> None:
    """The FAQ's other way: a shell is a command, and has the environment of the stack."""
    [command] = {
        code.text
        for code in codes(ROOT / "docs" / "faq.md")
        if code.language == "inline" and code.text.endswith("-- bash")
    }
    printed = run(
        f"{command.replace('deploy.local', 'deploy.local --no-worker')} -c 'echo $S3_BUCKET'", tmp_path
    )
    assert printed == "smallcat\n"


def test_the_pictures_that_begin_with_pictures(exports: str, tmp_path: Path) -> None:
    """A cat is made a dog, and a sneaker keeps its pixels before a blue background."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    [commands] = [code.text for code in codes(ROOT / "docs" / "pictures-in.md") if code.language == "sh"]
    run(f"{exports}\n{commands}", tmp_path)

    for folder in (tmp_path, ROOT / "docs" / "pictures-in"):
        cat, dog, blue = (Image.open(folder / f"{name}.png") for name in ("cat", "dog", "blue"))
        assert (recognise(cat), recognise(dog)) == ("cat", "dog")
        cut_out = np.asarray(Image.open(ROOT / "docs" / "cut-outs" / "sneaker.png"))
        opaque, clear = cut_out[..., 3] == 255, cut_out[..., 3] == 0
        pixels = np.asarray(blue, np.int16)
        assert np.array_equal(pixels[opaque], cut_out[opaque][:, :3])
        assert (np.abs(pixels[clear] - BACKGROUNDS["blue"]).max(axis=1) < 64).mean() > 0.95
