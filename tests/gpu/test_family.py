"""Another family of models on a real GPU: compiled, as CUDA graphs, in mixed batches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from tests import toy_flow_jobs
from tests.toy_flow import ToyFlow
from tests.toy_flow_jobs import JOBS, SIZES, RecordingRunner
from worker.contract.settings import WorkerSettings

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    """Without TF32, whose rounding is coarser than what is compared."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.usefixtures("exact_convolutions")
def test_a_flow_matching_transformer_compiled_and_captured_renders_as_its_own_plain_loop(
    tmp_path_factory: pytest.TempPathFactory, exact: bool
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    settings = WorkerSettings(
        cache_dir=str(tmp_path_factory.mktemp("cache")), attention="sdpa", max_batch=8, exact=exact
    )
    runner = RecordingRunner(settings, device)
    for job in JOBS[: len(SIZES)]:
        assert runner.compile(job)
    before = counters["stats"]["unique_graphs"]
    pictures = toy_flow_jobs.render(runner)
    assert counters["stats"]["unique_graphs"] == before
    # Every lane's steps were replayed from graphs, those of equally many tokens from graphs of their own.
    names = {name.rpartition(", ")[2] for name in runner.memory() if " rows of " in name}
    assert names == {"4x8x8", "4x8x12", "4x12x8"}
    toy_flow_jobs.check(runner, pictures, ToyFlow(device))
