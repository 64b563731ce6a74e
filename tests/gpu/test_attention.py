"""Attention on a real GPU: every backend that works there is exact, and all but naive take linear memory."""

from __future__ import annotations

import pytest
import torch

from worker.bench import kernels
from worker.bench.report import exponent
from worker.device import attention
from worker.device.attention_timing import Shape

pytestmark = pytest.mark.gpu

BACKENDS = ("naive", "sdpa", "xformers")
#: Stable Diffusion 1.x' first self-attention, and SDXL's: of heads that fit the kernels badly and well.
LAYERS = {
    "sd15": kernels.FirstAttention(token_px=8, heads=8, head_width=40, dtype=torch.float16),
    "sdxl": kernels.FirstAttention(token_px=16, heads=10, head_width=64, dtype=torch.float16),
}
#: All attention of Stable Diffusion 1.x at 512 px: (query tokens, key tokens, heads, head width).
SHAPES = [
    *((tokens, tokens, 8, width) for tokens, width in ((4096, 40), (1024, 80), (256, 160), (64, 160))),
    *((tokens, 77, 8, width) for tokens, width in ((4096, 40), (1024, 80), (256, 160), (64, 160))),
    (4096, 4096, 1, 512),  # the VAE's
]


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, gpu: torch.device) -> str:
    """A backend that works here. xformers may be absent: then its tests are skipped with the reason."""
    if problem := attention.probe(gpu)[request.param]:
        pytest.skip(f"{request.param}: {problem}")
    return str(request.param)


@pytest.mark.parametrize("layer", LAYERS)
def test_memory_grows_linearly_with_tokens_for_every_backend_but_naive(
    backend: str, layer: str, gpu: torch.device
) -> None:
    # 2304 to 16,384 tokens: naive takes 16 GiB for the last one of sd15.
    sides_px = [384, 512, 768, 1024] if layer == "sd15" else [768, 1024, 1536, 2048]
    points = list(kernels.curve(backend, LAYERS[layer], sides_px, gpu, limit_s=60))
    assert [point.left_out for point in points] == [""] * len(points)
    power = exponent((point.tokens, point.memory_mib or 0) for point in points)
    assert power is not None
    assert power > 1.8 if backend == "naive" else power < 1.15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("numbers", SHAPES, ids=lambda numbers: "x".join(map(str, numbers)))
def test_every_backend_agrees_with_naive_in_fp32(
    backend: str, numbers: tuple[int, int, int, int], dtype: torch.dtype, gpu: torch.device
) -> None:
    torch.manual_seed(0)
    shape = Shape(*numbers, dtype)
    try:
        kernel = kernels.kernel_of(backend)
        drawn = shape.draw(2, gpu)
        scale = shape.head_width**-0.5
        result = kernel(*drawn, scale)
    except NotImplementedError:
        # xformers has no operator for some widths; a worker then takes sdpa for those.
        assert backend == "xformers"
        assert shape.head_width > 256
        return
    query, key, value = (tensor.float() for tensor in drawn)
    expected = attention.naive(query, key, value, scale)
    assert result.shape == expected.shape
    assert result.dtype == dtype
    # A few units in the last place of the dtype, for values that average over all keys.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(result.float(), expected, rtol=tolerance, atol=tolerance)


def test_views_into_one_projection_are_taken_as_they_are(backend: str, gpu: torch.device) -> None:
    """Queries, keys and values as the processor hands them on: strided, nothing copied."""
    torch.manual_seed(0)
    fused = torch.randn(2, 1024, 3, 8, 40, device=gpu, dtype=torch.float16)
    query, key, value = fused.unbind(2)
    kernel = kernels.kernel_of(backend)
    expected = kernel(query.contiguous(), key.contiguous(), value.contiguous(), 40**-0.5)
    torch.testing.assert_close(kernel(query, key, value, 40**-0.5), expected, rtol=2e-3, atol=2e-3)
