"""Prints the jobs that the first version makes of the files in a folder: run with its tree first in the path.

For each file: the plan's digest, and [line, cursor, id] of each job and [line, cursor] of each bad line.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

#: Jobs of a file that are looked at.
MOST = 1_000


class CaughtError(Exception):
    """Carries the plan that the command made."""


def plan_of(name: str, words: list[str]) -> Any:
    """The plan of `ingest NAME WORDS...`."""
    command = importlib.import_module("producer.ingest_command")

    def caught(plan: Any, **_: object) -> None:
        raise CaughtError(plan)

    command._check = caught
    try:
        importlib.import_module("producer.cli").cli.main(
            ["ingest", name, "--check", *words], standalone_mode=False
        )
    except CaughtError as found:
        return found.args[0]
    raise AssertionError


def items_of(plan: Any) -> list[list[Any]]:
    """What a plan has, up to an error of the whole file."""
    module = importlib.import_module("producer.plan")
    found: list[list[Any]] = []
    try:
        for each in plan.items(module.unresolved):
            place = [each.line, str(each.cursor)]
            found.append([*place, each.composed.id] if isinstance(each, module.Planned) else place)
            if len(found) == MOST:
                break
    except importlib.import_module("worker.errors").PromptFileError:
        found.append(["refused"])
    return found


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    plans = {name: plan_of(name, words) for name, words in json.loads(Path("words.json").read_text()).items()}
    print(json.dumps({name: [plan.digest, items_of(plan)] for name, plan in plans.items()}))
