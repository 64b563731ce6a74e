"""The Lua scripts of a run of prompt files. Each file of them says its keys, arguments and result.

Redis does the whole of a script or nothing of it, whoever is killed meanwhile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from worker.contract.lua import script

_HERE = Path(__file__).parent

FEED: Final = script(_HERE / "feed.lua")
TAKE: Final = script(_HERE / "take.lua")
ACKNOWLEDGE: Final = script(_HERE / "acknowledge.lua")
CANCEL_RUN: Final = script(_HERE / "cancel_run.lua")
HEX: Final = script(_HERE / "hex.lua")
