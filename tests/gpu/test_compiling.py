"""What the compiler makes of layers on a real GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from worker.device.compiling.compiler import CompiledLanes, Compiler, keep_kernels_in

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]


def test_rows_of_sdxls_norms_are_reduced_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    keep_kernels_in(tmp_path)
    torch.manual_seed(1)
    norm = torch.nn.LayerNorm(1280).half().cuda().requires_grad_(False)
    x = torch.randn(4, 1024, 1280, device="cuda").half()
    lanes = CompiledLanes("norm", lambda tensor: norm(tensor) + 1, Compiler(x.device, exact=False))
    assert lanes.compile_now("lane", lambda: (x, [x]))
    compiled = lanes.get("lane", lambda: (x, [x]))
    assert compiled is not None
    with (
        torch.no_grad(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler,
    ):
        found = compiled(x)
        torch.cuda.synchronize()
    assert torch.allclose(found, norm(x) + 1, atol=2e-2)
    kernels = [
        event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    # "per" for persistent: Inductor's kernels that keep what they reduce.
    assert any(name.startswith("triton_per") for name in kernels), kernels
