"""Models of full size on a GPU of which only a part may be used: planned, served, within the limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks.mates import psnr
from worker.bench import shapes
from worker.model import gpu_lock
from worker.model.gpu_memory import OUTSIDE
from worker.model.memory_plan import GIB

# Each process loads a model of full size. SMALLCAT_TEST_COMPILED=1 waits for compiled steps, too.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

COMPILED = os.environ.get("SMALLCAT_TEST_COMPILED") == "1"
#: Least PSNR in decibels of a picture beside that of a worker without a limit.
TOLERANCE_DB = 40.0
#: Draws six guided jobs of the default size and two of another, which come one after the other, and says how.
WORKER = """
import json, os, sys
import numpy as np
import pynvml
import torch
from worker.contract.errors import SettingsError
from worker.contract.job import Job
from worker.contract.settings import worker_settings
from worker.device import start
from worker.device.errors import times
from worker.engine.engine import Engine

settings, out = worker_settings(), sys.argv[1]
try:
    runner = start.load(settings, None)
    choices = [*runner.choices, *runner.warm_up()]
except SettingsError as error:
    print(json.dumps({"refused": str(error)}), flush=True)
    sys.exit()
engine = Engine(runner, job_timeout_s=300, on_failure=lambda error: None)
engine.start()
jobs = [Job(prompt=f"a cat, {seed}", negative_prompt="a dog", seed=seed, steps=8) for seed in range(6)]
side = runner.served.defaults.width // 2
jobs += [Job(prompt="a small cat", seed=seed, steps=8, width=side, height=side) for seed in range(2)]
futures = [engine.submit(str(number), job.resolved(runner.served)) for number, job in enumerate(jobs)]
pictures = [future.result(400).picture for future in futures]
engine.stop()
np.savez(out, **{str(number): picture.pixels for number, picture in enumerate(pictures)})

def used():
    # Bytes that this process takes of the GPU; those of all where the driver does not say.
    pynvml.nvmlInit()
    each = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
    free, total = torch.cuda.mem_get_info()
    return next((one.usedGpuMemory for one in each if one.pid == os.getpid()), None) or total - free


print(json.dumps({
    "choices": {choice.what: f"{choice.choice} ({choice.reason})" for choice in choices},
    "reserved": torch.cuda.max_memory_reserved(), "used": used(),
    "rows": runner.max_rows, "out of memory": times["out of memory"],
    "warnings": sorted({each for picture in pictures for each in picture.warnings}),
}), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """Made once on a machine where SMALLCAT_TEST_SHAPES is a folder that stays."""
    place = Path(os.environ.get("SMALLCAT_TEST_SHAPES") or tmp_path_factory.mktemp("shapes"))
    return lambda name: shapes.make(name, place / name)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts workers on one GPU, which end with the test."""
    with ExitStack() as cleanup:
        own = {name: value for name, value in os.environ.items() if name != gpu_lock.CHOSEN_BY}

        def one(model: Path, out: str, **environment: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", WORKER, str(tmp_path / f"{out}.npz")],
                env={
                    **own,
                    "TMPDIR": str(tmp_path),
                    "SMALLCAT_MODEL": str(model),
                    "SMALLCAT_ATTENTION": "sdpa",
                    "SMALLCAT_COMPILE": str(int(COMPILED)),
                    "SMALLCAT_COMPILE_FIRST": str(int(COMPILED)),
                    **environment,
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            cleanup.enter_context(process)
            cleanup.callback(process.kill)
            return process

        yield one


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(process.stdout.readline())
    print(json.dumps(found, indent=1))
    return found


@pytest.mark.parametrize(
    ("shape", "gib", "texts"),
    [("sd15", 5.2, "all on the GPU"), ("sdxl", 11.0, ""), ("sdxl", 7.2, "text encoders")],
)
def test_it_is_served_within_its_limit_and_draws_the_same(
    start: Callable[..., subprocess.Popen[str]],
    models: Callable[[Any], Path],
    tmp_path: Path,
    shape: str,
    gib: float,
    texts: str,
) -> None:
    """`gib`: of torch, which leaves out CUDA and its libraries."""
    model = models(shape)
    limit = int(gib * GIB) + OUTSIDE
    small = start(model, "small", SMALLCAT_GPU_MEMORY=f"{limit}B")
    found = said(small)
    small.kill()
    assert "refused" not in found
    assert texts in found["choices"]["memory"]
    assert found["reserved"] <= gib * GIB
    assert found["out of memory"] == 0, "the plan was too generous"
    assert found["used"] <= limit, "CUDA and its libraries take more than was allowed for"
    large = start(model, "large")
    assert said(large)["warnings"] == []
    one, other = (np.load(tmp_path / f"{name}.npz") for name in ("small", "large"))
    assert min(psnr(one[name], other[name]) for name in one.files) >= TOLERANCE_DB


def test_two_models_share_a_gpu_and_a_third_is_refused(
    start: Callable[..., subprocess.Popen[str]], models: Callable[[Any], Path]
) -> None:
    tiny, large = models("sd15"), models("sdxl")
    first = start(tiny, "first", SMALLCAT_GPU_MEMORY="0.4")
    second = start(large, "second", SMALLCAT_GPU_MEMORY="0.6")
    found = [said(each) for each in (first, second)]
    assert not any("refused" in each or each["out of memory"] for each in found)
    if "the only GPU" in "".join(each["choices"]["device"] for each in found):
        third = said(start(tiny, "third", SMALLCAT_GPU_MEMORY="0.01"))
        assert "let SMALLCAT_GPU_MEMORY of all workers" in third["refused"]


def test_too_small_is_one_sentence(
    start: Callable[..., subprocess.Popen[str]], models: Callable[[Any], Path]
) -> None:
    refused = said(start(models("sdxl"), "none", SMALLCAT_GPU_MEMORY="6GiB"))["refused"]
    assert "SMALLCAT_GPU_MEMORY=6GiB leaves 5.2" in refused
