"""The commands of a page of docs/, run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.faults.harness import ROOT
from tests.markdown import codes


def block(page: str, beginning: str) -> str:
    """The one block of shell commands in `docs/PAGE` that begins so."""
    found = [code.text for code in codes(ROOT / "docs" / page) if code.language == "sh"]
    (text,) = [each for each in found if each.startswith(beginning)]
    return text


def run(
    commands: str,
    environment: Mapping[str, str],
    folder: Path,
    instead: Mapping[str, str] | None = None,
    code: int = 0,
) -> str:
    """Run `commands` in `folder`, with what stands `instead` of some words; what they print.

    Fails with what they said where one of them ends with another exit code than `code`.
    """
    for word, own in (instead or {}).items():
        assert word in commands, f"{word} is not in: {commands}"
        commands = re.sub(rf"(?<![\w.-]){re.escape(word)}(?![\w-])", own, commands)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env={**environment, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, f"{commands}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
