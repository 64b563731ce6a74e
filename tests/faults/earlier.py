"""Earlier versions whose workers and producers are tested beside this one's, by their commits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: Commit -> what it is. docs/upgrades.md has them from here.
EARLIER: Final[Mapping[str, str]] = {
    "e673185": "2026-11-22, the first version",
    "b89d500": "2026-11-26, the first public version",
}
