"""How long attention takes by shape and backend, kept in a file from one start to the next."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path

import torch

from worker.contract.versions import versions


class Timings:
    """Milliseconds by shape and backend, kept in a file for the next start on the same GPU and libraries."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        xformers = (f"{name} {version}" for name, version in versions(["xformers"]).items())
        self._setup = " ".join([torch.cuda.get_device_name(device), torch.__version__, *xformers])
        self._all: dict[str, dict[str, dict[str, float]]] = {}
        # A file that cannot be read counts as none, and is written anew.
        with contextlib.suppress(OSError, ValueError):
            self._all = dict(json.loads(path.read_text("utf-8")))

    def of(self, shape: str) -> dict[str, float]:
        """The times of `shape` that are known, by backend."""
        return self._all.get(self._setup, {}).get(shape, {})

    def keep(self, shape: str, times: dict[str, float]) -> None:
        """Keep those of `times` that are finite."""
        finite = {name: time for name, time in times.items() if math.isfinite(time)}
        self._all.setdefault(self._setup, {})[shape] = finite

    def save(self) -> None:
        """Write the file. Where that fails, the next start measures again."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(self._all, indent=1), "utf-8")
            temporary.replace(self._path)
