"""The Lua scripts behind `records` and `fleet`. Each file of them says its keys, arguments and result.

A script is done whole or not at all, and reads Redis' clock only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from worker.contract.lua import script

_HERE = Path(__file__).parent

SUBMIT: Final = script(_HERE / "submit.lua")
CLAIM: Final = script(_HERE / "claim.lua")
FINISH: Final = script(_HERE / "finish.lua")
GIVE_BACK: Final = script(_HERE / "give_back.lua")
CANCEL: Final = script(_HERE / "cancel.lua")
FORGET: Final = script(_HERE / "forget.lua")
SETTLE: Final = script(_HERE / "settle.lua")
ADMIT: Final = script(_HERE / "admit.lua")
REQUEST: Final = script(_HERE / "request.lua")
PROGRESS: Final = script(_HERE / "progress.lua")
FAILURES: Final = script(_HERE / "failures.lua")
UNREADABLE: Final = script(_HERE / "unreadable.lua")
ANNOUNCE: Final = script(_HERE / "announce.lua")
WITHDRAW: Final = script(_HERE / "withdraw.lua")
WEBHOOK_TAKE: Final = script(_HERE / "webhook_take.lua")
WEBHOOK_SETTLE: Final = script(_HERE / "webhook_settle.lua")
WEBHOOK_RETRY: Final = script(_HERE / "webhook_retry.lua")
