"""The number format: four bits of exponent, three of mantissa, no infinities."""

from __future__ import annotations

from typing import Final

import torch

E4M3 = torch.float8_e4m3fn
#: Its largest number.
MOST: Final = 448.0
#: Scales are no smaller: a token of zeros has one, too.
LEAST_SCALE: Final = 1e-12
