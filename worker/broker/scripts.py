"""The Lua scripts that move messages. Each file of them says its keys, arguments and result.

A script is done whole or not at all, whoever is killed, and reads Redis' clock only. A Redis that was
restarted has forgotten the scripts that it was given before. Those that are called for every job, or again
and again, are called by their digest, and sent again where they are missing; the others are sent with every
call (EVAL).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from worker.contract.lua import script

_HERE = Path(__file__).parent

FETCH: Final = script(_HERE / "fetch.lua")
FETCH_DIGEST: Final = hashlib.sha1(FETCH.encode(), usedforsecurity=False).hexdigest()
LEAVE: Final = script(_HERE / "leave.lua")
RENEW: Final = script(_HERE / "renew.lua")
EXPIRED: Final = script(_HERE / "expired.lua")
ADOPTABLE: Final = script(_HERE / "adoptable.lua")
MOVE: Final = script(_HERE / "move.lua")
POSTPONE: Final = script(_HERE / "postpone.lua")
SET_ASIDE: Final = script(_HERE / "set_aside.lua")
ACKNOWLEDGE: Final = script(_HERE / "acknowledge.lua")
