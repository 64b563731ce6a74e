"""When a lane is compiled, and what serves until then. The compiler itself is torch's: see tests/gpu."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

from worker.device.compiling.choices import Choices
from worker.device.compiling.compiler import CALLS_BEFORE_COMPILING, SWITCH_S, CompiledLanes, keep_kernels_in

Lanes = CompiledLanes[Callable[[torch.Tensor], torch.Tensor]]


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1


def example() -> tuple[torch.Tensor, list[torch.Tensor]]:
    tensor = torch.zeros(4, 3)
    return tensor, [tensor]


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


@pytest.fixture(autouse=True)
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was compiled, without a GPU and without waiting."""
    made: list[Any] = []

    def compiled(function: Any, **options: Any) -> Any:
        made.append(options)
        return lambda tensor: function(tensor)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made


def lanes_on(thread: ThreadPoolExecutor, function: Any = plain, *, in_background: bool = True) -> Lanes:
    compiler: Any = SimpleNamespace(
        submit=thread.submit,
        in_background=in_background,
        device_sync_lock=threading.Lock(),
        elsewhere=None,
    )
    return CompiledLanes("step", function, compiler)


def test_a_lane_is_compiled_beside_the_plain_function_once_it_is_used_often(
    thread: ThreadPoolExecutor, compiles: list[Any]
) -> None:
    lanes = lanes_on(thread)
    assert all(lanes.get("lane", example) is None for _ in range(CALLS_BEFORE_COMPILING))
    thread.submit(lambda: None).result(20)
    compiled = lanes.get("lane", example)
    assert compiled is not None
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    # One piece, fixed sizes; and each lane for itself, once.
    assert compiles == [{"fullgraph": True, "dynamic": False}]
    assert lanes.get("another", example) is None
    assert lanes.get("lane", example) is compiled


def test_a_lane_that_is_compiled_now_is_there_at_once(thread: ThreadPoolExecutor) -> None:
    lanes = lanes_on(thread)
    assert lanes.compile_now("lane", example)
    assert lanes.get("lane", example) is not None


def test_in_exact_mode_nothing_changes_under_way(thread: ThreadPoolExecutor, compiles: list[Any]) -> None:
    lanes = lanes_on(thread, in_background=False)
    for _ in range(2 * CALLS_BEFORE_COMPILING):
        assert lanes.get("lane", example) is None
    assert compiles == []


def test_what_does_not_compile_stays_plain_and_is_logged(
    thread: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")

    lanes = lanes_on(thread, fail)
    with caplog.at_level(logging.WARNING):
        assert not lanes.compile_now("lane", example)
    assert caplog.messages == ["The step for lane does not compile and stays uncompiled: no such kernel"]
    assert lanes.get("lane", example) is None


@pytest.mark.parametrize("fails", [False, True], ids=["compiles", "fails"])
def test_threads_give_python_up_sooner_while_something_compiles(
    thread: ThreadPoolExecutor, fails: bool
) -> None:
    seen: list[float] = []

    def function(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(sys.getswitchinterval())
        if fails:
            raise RuntimeError("no such kernel")
        return tensor

    before = sys.getswitchinterval()
    assert lanes_on(thread, function).compile_now("lane", example) is not fails
    assert seen == [pytest.approx(SWITCH_S)]
    assert sys.getswitchinterval() == before > SWITCH_S


def test_a_folder_for_kernels_that_the_user_has_chosen_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/the/users/own")
    keep_kernels_in(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/the/users/own"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_kernels_in(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


def test_programs_that_import_in_another_order_find_each_others_code() -> None:
    """Torch's keys are hashes of pickles, which name no module that happened to be imported first."""
    program = """
import pickle, sys, types
early = sys.modules["early"] = types.ModuleType("early")
import torch
early.torch = torch
assert b"early" in pickle.dumps(torch.channels_last)
from worker.device.compiling.compiler import Compiler
Compiler(torch.device("cpu"), exact=False)
written = pickle.dumps(torch.channels_last)
assert b"early" not in written
assert pickle.loads(written) is torch.channels_last
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)


@pytest.mark.parametrize(
    ("hint", "numbers", "is_kept"),
    [
        (ReductionHint.INNER, 640, True),
        (ReductionHint.INNER, 1280, True),
        (ReductionHint.INNER, 2049, False),
        (ReductionHint.OUTER, 1280, False),
    ],
)
def test_a_kernel_keeps_the_row_that_it_reduces(hint: ReductionHint, numbers: int, is_kept: bool) -> None:
    features = SimpleNamespace(get_reduction_hint=lambda: hint, reduction_numel=sympy.Integer(numbers))
    sizes = SimpleNamespace(statically_known_leq=lambda one, other: one <= other)
    with V.set_graph_handler(SimpleNamespace(sizevars=sizes)):
        assert Choices.should_use_persistent_reduction(features, False) == is_kept
