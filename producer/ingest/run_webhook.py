"""The webhook of a run of prompt files: told when the run is over, and of each job where that is asked for.

Workers tell it in the step that ends the last job (`worker/state/mark_runs.lua`), and producers that it is
cancelled in the step that cancels it (`worker/state/cancel_run.lua`). Here is what else they tell.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final, Literal

from worker.state.keys import TOLD_BY_PRODUCERS, run_key

if TYPE_CHECKING:
    from redis.client import Redis


#: Seconds that what was told is kept while no sender runs; `notify.lua` has them, too.
UNTOLD_TTL_S: Final = 518_400


def set_webhook(redis: Redis, run: str, hook: str, *, of_jobs: bool) -> None:
    """Let a run tell `hook` (`worker.contract.webhook.hook_of`). One that is over tells it at once.

    `of_jobs`: also of each job that ends from now on. A run that Redis does not have is left alone.
    """
    key = run_key(run)
    if redis.hget(key, "fed") is None:
        return
    with redis.pipeline() as pipe:
        pipe.hset(key, mapping={"webhook": hook, "webhook_jobs": int(of_jobs)})
        pipe.hmget(key, "ended", "total", "cancelled")
        ended, total, cancelled = pipe.execute()[-1]
    if total is not None and int(ended or 0) >= int(total) and cancelled is None:
        tell_run(redis, run, hook, "finished")


def tell_run(
    redis: Redis, run: str, hook: str, state: Literal["finished", "failed"], error: str = ""
) -> None:
    """Tell that a run is over. Told twice, it is one notification, as `notify_run` of `notify.lua` has it."""
    key = run_key(run)
    with redis.pipeline(transaction=False) as pipe:
        pipe.hmget(key, "created", "total", "rejected")
        pipe.bitcount(f"{key}:done")
        pipe.bitcount(f"{key}:failed")
        pipe.bitcount(f"{key}:cancelled")
        pipe.time()
        (created, total, rejected), done, failed, cancelled, (seconds, micros) = pipe.execute()
    what: dict[str, Any] = {"run": run, "state": state, "hook": hook, "at": f"{seconds}.{micros:06d}"}
    what |= {} if total is None else {"total": int(total)}
    what |= {
        "done": done,
        "failed": failed - cancelled,
        "cancelled": cancelled,
        "rejected": int(rejected or 0),
    }
    what |= {"error_type": "PromptFileError", "error": error} if error else {}
    name = f"run:{run}:{created or ''}:{state}"
    digest = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
    with redis.pipeline(transaction=False) as pipe:
        pipe.lpush(TOLD_BY_PRODUCERS, f"{digest} {json.dumps(what)}")
        pipe.expire(TOLD_BY_PRODUCERS, UNTOLD_TTL_S)
        pipe.execute()
