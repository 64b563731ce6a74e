"""What Inductor chooses for a UNet's kernels other than by itself. Imported where something compiles."""

from __future__ import annotations

from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

#: Numbers of a row that a kernel keeps while it reduces them. Of itself Inductor keeps 1,024 and reads longer
#: rows once more, as those of SDXL's norms, which are 1,280 wide: docs/performance.md, "The step".
MOST_KEPT = 2048


class Choices(InductorChoices):
    """Inductor's own choices, with longer rows in one pass."""

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        """Whether a kernel keeps what it reduces. See `InductorChoices`."""
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        is_row = features.get_reduction_hint() is ReductionHint.INNER and not cooperative_reduction
        return is_row and bool(V.graph.sizevars.statically_known_leq(features.reduction_numel, MOST_KEPT))
