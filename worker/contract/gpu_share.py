"""How much of a GPU's memory a worker may use: `SMALLCAT_GPU_MEMORY`. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import ByteSize, TypeAdapter, ValidationError

_SIZE: TypeAdapter[ByteSize] = TypeAdapter(ByteSize)
_SHARE = re.compile(r"\d*\.?\d+")


@dataclass(frozen=True)
class GpuShare:
    """A share of whatever GPU a worker takes, or a number of bytes. One of the two."""

    share: float = 0.0
    size: int = 0

    @classmethod
    def parse(cls, text: str) -> GpuShare:
        """`text` as it is set. Raises `ValueError` that says what it must be."""
        text = text.strip()
        if _SHARE.fullmatch(text):
            if 0 < (share := float(text)) <= 1:
                return cls(share=share)
        elif text[-1:].isalpha():
            try:
                if (size := int(_SIZE.validate_python(text))) > 0:
                    return cls(size=size)
            except (ValidationError, OverflowError):
                pass
        raise ValueError(
            "must be a share of the GPU's memory, above 0 and at most 1, such as 0.45, or a size, such as "
            "11GiB"
        )

    def of(self, total: int) -> int:
        """Bytes of a GPU of `total` bytes; more than `total` where the size does not fit."""
        return self.size or int(self.share * total)
