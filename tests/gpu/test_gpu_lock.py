"""A GPU a worker, with real GPUs: processes that load a model as a worker does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import tiny_models
from worker.model import gpu_lock

# Each process loads torch, and a model.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

LOADER = """
import sys
import torch
from worker.device import attention
from worker.model import loader
from worker.contract.errors import SettingsError
from worker.contract.settings import WorkerSettings
try:
    loaded = loader.load(WorkerSettings(model=sys.argv[1]))
    device = loaded.pipeline.unet.device
    assert device == loaded.pipeline.vae.device == loaded.device, "all of the model is on one device"
    print(device, torch.cuda.current_device(), torch.cuda.get_device_properties(device).uuid, flush=True)
except SettingsError as error:
    print(error, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that load a model and live on; they end with the test."""
    model = tiny_models.tiny_sd1(tmp_path / "tiny")
    own = {name: value for name, value in os.environ.items() if name != gpu_lock.CHOSEN_BY}
    with ExitStack() as cleanup:

        def one(**environment: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", LOADER, str(model)],
                env={**own, "TMPDIR": str(tmp_path), **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            cleanup.enter_context(process)
            cleanup.callback(process.kill)
            return process

        yield one


def line(process: subprocess.Popen[str]) -> str:
    """The next line of its output."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


@pytest.fixture(scope="module")
def gpus() -> int:
    """How many the machine has, also where this process is shown fewer."""
    environment = {name: value for name, value in os.environ.items() if name != gpu_lock.CHOSEN_BY}
    count = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.check_output([sys.executable, "-c", count], env=environment))


def test_each_process_has_a_gpu_of_its_own_and_one_too_many_is_refused(
    start: Callable[..., subprocess.Popen[str]], gpus: int
) -> None:
    holders = []
    uuids = set()
    for index in range(gpus):
        holders.append(start())
        device, current, uuid = line(holders[-1]).split()
        assert (device, current) == (f"cuda:{index}", str(index))
        uuids.add(uuid)
    assert len(uuids) == len(holders)
    refused = line(start())
    assert refused.startswith("Every GPU that this worker sees is taken")
    for index, holder in enumerate(holders):
        assert f"GPU {index} by process {holder.pid}" in refused

    holders[-1].kill()
    holders[-1].wait()
    assert line(start()).startswith(f"cuda:{len(holders) - 1} ")


def test_the_users_choice_is_shared(start: Callable[..., subprocess.Popen[str]], gpus: int) -> None:
    last = str(gpus - 1)
    first, second = (line(start(CUDA_VISIBLE_DEVICES=last)) for _ in range(2))
    assert first == second
    assert first.startswith("cuda:0 0 ")
