"""What a GPU draws, and how fast it runs, at this moment."""

from __future__ import annotations

import subprocess


def line() -> str:
    """Clock and power of the first GPU as nvidia-smi says them; empty where it cannot."""
    asked = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader", "-i", "0"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
