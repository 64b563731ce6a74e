"""A process that ends as the one that compiles does: with its parent."""

from __future__ import annotations

import os
import time
from pathlib import Path

from worker.contract.child_process import end_with_parent


def main() -> None:
    end_with_parent()
    Path(os.environ["COMPILE_READY"]).touch()
    time.sleep(60)
