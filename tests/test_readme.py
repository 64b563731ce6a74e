"""What the README says is what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from producer.cli.main import cli
from tests.readme import README, renewed
from worker.contract.settings import variables

ROOT = README.parent


def test_the_settings_table_is_the_settings() -> None:
    text = README.read_text()
    assert renewed(text) == text, "run: python -m tests.readme"
    for name in variables():
        assert f"| `{name}` |" in text


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_are_there(document: str) -> None:
    text = (ROOT / document).read_text()
    for name in re.findall(r"`((?:worker|producer|deploy|tests)/[\w./]*)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (ROOT / name).exists(), name


def test_make_targets_that_are_named_are_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        used = re.findall(r"(?:^    |`)make ([a-z]+)", (ROOT / document).read_text(), re.MULTILINE)
        assert used
        assert set(used) <= targets


def test_commands_that_are_named_are_there() -> None:
    used = re.findall(r"^ *smallcat ([a-z]+)", README.read_text(), re.MULTILINE)
    assert used
    assert set(used) <= set(cli.commands)


def test_the_command_line_s_help_names_its_exit_codes_in_the_readme() -> None:
    assert re.search(r"exits with 0, 1 \(a job failed\), 2 \(usage\) or 3", README.read_text())
    assert Path(ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
