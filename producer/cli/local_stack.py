"""A stack that `make local` runs on this machine, for shells in which its variables are not set."""

from __future__ import annotations

import os
import re
import shlex
import socket
from pathlib import Path

#: Where `make local` writes the stack's environment, below the project's folder.
ENV_FILE = Path(".smallcat", "env")
#: Seconds that its Redis has to accept a connection.
_CONNECT_S = 0.3


def hint() -> str | None:
    """How to use the stack of this folder or one above it; None where none runs, or `REDIS_URL` is set."""
    if os.environ.get("REDIS_URL"):
        return None
    here = Path.cwd()
    for folder in (here, *here.parents):
        file = folder / ENV_FILE
        try:
            text = file.read_text(encoding="utf-8")
        except OSError:
            continue
        if not _answers(text):
            return None
        shown = file.relative_to(here) if folder == here else file
        return f"A stack runs on this machine; to use it: source {shlex.quote(str(shown))}"
    return None


def _answers(text: str) -> bool:
    """Whether something listens where the file says that Redis is."""
    found = re.search(r"^export REDIS_URL=\S*@([\w.]+):([0-9]+)/", text, re.MULTILINE)
    if found is None:
        return False
    try:
        with socket.create_connection((found[1], int(found[2])), timeout=_CONNECT_S):
            return True
    except (OSError, OverflowError):
        return False
