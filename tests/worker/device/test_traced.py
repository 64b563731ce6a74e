"""Compiled code without its trace, by torch's compiler on the CPU: made in one process, loaded in another.

It stands in for the GPU's: the same caches, artifacts, keys and expressions, with C++ in place of kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging, sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
import threading
import torch
from worker.device.compiling.compiler import CompiledLanes
from worker.device.compiling.kernel_cache import KernelCache, Signed
from worker.device.compiling.traced import Recorder, carried
from worker.storage.shared_code import Folder

torch.cuda.synchronize = lambda: None
logging.basicConfig(level=20, stream=sys.stdout, format="%(message)s")


@dataclass
class Argument:
    x: torch.Tensor
    scale: torch.Tensor


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, argument):
        y = torch.nn.functional.silu(self.layer(argument.x)) * argument.scale[:, None]
        return y, argument.x + 1, y.sum(1)


def argument(rows):
    generator = torch.Generator().manual_seed(rows)
    return Argument(torch.randn(rows, 8, generator=generator), torch.randn(rows, generator=generator))


def example():
    made = argument(4)
    return made, [made.x, made.scale]


mode, shared, here = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
cache = KernelCache(here, lambda: "setup", Signed(Folder(shared), [b"k" * 32]))
elsewhere = SimpleNamespace(find=cache.find, lose=cache.lose, compile=None, rest=lambda: None)
thread = ThreadPoolExecutor(1)
compiler = SimpleNamespace(
    submit=thread.submit, in_background=True, device_sync_lock=threading.Lock(), elsewhere=elsewhere
)
model = Model().eval()
lanes = CompiledLanes("step", model, compiler)
with torch.no_grad():
    if mode == "make":
        assert cache.keep("step", "lane", *carried(lanes.record("lane", *example()))) == ""
        assert cache.find("step", "lane"), "there is a trace"
    else:
        torch.compile = None
        trace = lanes.seek("lane").result()
        assert trace, "the fleet has it"
        assert lanes.load("lane", example, trace).result()
        compiled = lanes.get("lane", example)
        for rows in (2, 3, 7):
            given = argument(rows)
            for one, other in zip(compiled(given), model(given), strict=True):
                torch.testing.assert_close(one, other)
print("done")
"""


def run(tmp_path: Path, mode: str, machine: str) -> str:
    here = tmp_path / machine
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode, str(tmp_path / "shared"), str(here)],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(here)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.services
@pytest.mark.timeout(600)
def test_code_of_one_machine_runs_on_another_without_being_traced(tmp_path: Path) -> None:
    run(tmp_path, "make", "one")
    said = run(tmp_path, "load", "other")
    assert "of the fleet's" in said
    assert "loaded the compiled step for lane" in said
