"""The GELU in Triton, for kernels. Imported where there is a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _erf(x):  # type: ignore[no-untyped-def]
    """The error function to 1.5e-7: Abramowitz and Stegun, 7.1.26. Half the work of the library's."""
    size = tl.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * size)
    sum_ = -1.453152027 + t * 1.061405429
    sum_ = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * sum_))
    result = 1.0 - t * sum_ * tl.exp(-size * size)
    return tl.where(x < 0, -result, result)


@triton.jit  # type: ignore[untyped-decorator]
def gelu(x, FAST: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803 - Triton's constants
    """x, float32, times the share of a normal distribution below it. `FAST`: enough for half precision."""
    halved = x * 0.7071067811865476
    error = _erf(halved) if FAST else tl.erf(halved)
    return x * 0.5 * (1.0 + error)
