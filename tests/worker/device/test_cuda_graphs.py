"""When a graph is captured and when it is dropped. Capturing itself needs a GPU: see tests/gpu."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from worker.device.cuda_graphs import Captured, GraphPool


@pytest.fixture
def compiler() -> Any:
    return SimpleNamespace(device_sync_lock=threading.Lock(), is_serving=False)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Numbers for pools, from 0."""
    numbers = itertools.count()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(numbers))
    return numbers


def doubling() -> tuple[Captured, Sequence[torch.Tensor]]:
    inputs = torch.zeros(4)
    return lambda: (inputs * 2,), [inputs]


def failing() -> tuple[Captured, Sequence[torch.Tensor]]:
    raise torch.OutOfMemoryError("not even its inputs fit")


def test_nothing_is_captured_while_a_compiler_may_wait_for_the_device(compiler: Any, pools: Any) -> None:
    """Such waiting would break the capture: then the function itself is run."""
    graphs = GraphPool(compiler)
    with compiler.device_sync_lock:
        assert graphs.run("a", doubling, [torch.ones(3)])[0].tolist() == [2, 2, 2, 0]
    assert graphs.peaks == {}


def test_after_a_failure_all_graphs_begin_anew_in_another_pool(compiler: Any, pools: Any) -> None:
    """What a capture had is found by none but captures, until no graph of its pool is left."""
    graphs = GraphPool(compiler)
    made = []

    def make() -> tuple[Captured, Sequence[torch.Tensor]]:
        made.append(next(pools))
        return doubling()

    with compiler.device_sync_lock:
        for _ in range(2):
            graphs.run("a", make, [torch.ones(3)])
        with pytest.raises(torch.OutOfMemoryError):
            graphs.run("b", failing, [torch.ones(3)])
        graphs.run("a", make, [torch.ones(3)])
    # Made once, and once more after the failure, which took the pool of the number between.
    assert made == [1, 3]
    assert graphs._pool.handle == 2
