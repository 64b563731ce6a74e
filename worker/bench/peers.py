"""Experiment d: smallcat's engine beside what people would use instead, each in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from worker.bench.peer_report import Peer, PeerName, PeerReport, Task
from worker.bench.report import PACKAGES
from worker.contract.errors import SettingsError
from worker.contract.versions import versions

#: The one that the others' pictures are compared with, and their rates divided by.
REFERENCE: PeerName = "eager"
#: What is said of equal pictures, of which JSON has no infinity.
EQUAL_DB = 100.0


@dataclass(frozen=True)
class Scope:
    """How it is measured."""

    model: str
    steps: int
    #: Seconds to warm up and to measure, for each.
    warm_s: float
    seconds: float
    #: Seconds after which a peer is given up, loading and compiling included.
    limit_s: float
    #: torch.compile's mode.
    mode: str
    #: Pictures in a batch; 0: as usual for the model's size.
    batch: int
    #: Which ones; empty: all.
    names: Sequence[PeerName] = ()


#: Measures a task: what `worker.bench.peer` prints of it.
Measure = Callable[[Task], dict[str, Any]]


def report(scope: Scope, command: str, on_start: Callable[[str], None], measure: Measure) -> PeerReport:
    """All peers, one after the other. Raises `SettingsError` where none of them could be measured."""
    conditions: dict[str, Any] = {}
    peers: list[Peer] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in scope.names or get_args(PeerName):
            on_start(name)
            pictures = Path(folder) / f"{name}.npy"
            result = measure(_task(scope, name, pictures))
            conditions |= result.get("conditions", {})
            fields = result.get("peer", {"batch": 0, "left_out": result.get("left_out", "it ended")})
            peers.append(Peer(name, **fields))
        compared = list(_compared(peers, Path(folder)))
    if not conditions:
        raise SettingsError(f"No peer could be measured: {peers[0].left_out}")
    return PeerReport(
        versions={**versions(PACKAGES), "python": platform.python_version()},
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        command=command,
        model=Path(scope.model).name,
        steps=scope.steps,
        warm_s=scope.warm_s,
        seconds=scope.seconds,
        mode=scope.mode,
        peers=compared,
        **conditions,
    )


def in_a_process(limit_s: float) -> Measure:
    """Measures in a process of its own, which is ended with all that it started after `limit_s` seconds."""

    def measure(task: Task) -> dict[str, Any]:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker.bench.peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(json.dumps(dataclasses.asdict(task)).encode(), timeout=limit_s)
        except subprocess.TimeoutExpired:
            return {"left_out": f"it took longer than {limit_s:g} s"}
        finally:
            # Compilers run in processes of their own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode:
            return {"left_out": f"its process ended with {process.returncode}, see above"}
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        return result

    return measure


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures of 8 bits, in dB; `EQUAL_DB` where they are equal."""
    squared = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return EQUAL_DB if squared == 0 else float(10 * np.log10(255**2 / squared))


def _task(scope: Scope, name: PeerName, pictures: Path) -> Task:
    timing = (scope.warm_s, scope.seconds)
    return Task(name, scope.model, scope.steps, *timing, scope.mode, scope.batch, str(pictures))


def _compared(peers: Sequence[Peer], folder: Path) -> Iterator[Peer]:
    """The peers with how near their pictures are to those of the reference."""
    reference = folder / f"{REFERENCE}.npy"
    for peer in peers:
        own = folder / f"{peer.peer}.npy"
        if peer.left_out or not (reference.exists() and own.exists()):
            yield peer
            continue
        pairs = zip(np.load(reference), np.load(own), strict=True)
        yield dataclasses.replace(peer, psnr_db=min(psnr_db(*pair) for pair in pairs))
