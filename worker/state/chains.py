"""Jobs that begin with the pictures of jobs that are not done: they wait, and are released or fail with them.

The script that ends a job settles those that wait for it, in the same step (`chains.lua`). A worker looks
through all that wait from time to time: for what an earlier version has ended, and for what one call of a
script leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from worker.contract.errors import InvalidJobError
from worker.state import scripts
from worker.state.hashes import readable
from worker.state.keys import WAITING, job_key
from worker.state.shared_scripts import Script

if TYPE_CHECKING:
    from redis.client import Redis

#: Jobs that may wait for one, and jobs of a chain that may wait for each other. `chains.lua` has them, too.
MAX_CHILDREN, MAX_DEPTH = 1_000, 16
#: Jobs that are looked at in one call.
LOOKED_AT: Final = 200
#: Calls in a row, at most, while they settle jobs.
LOOKS: Final = 50


def refusal(answer: object) -> InvalidJobError | None:
    """Why `submit.lua` has refused a job, by its answer; None where it has not."""
    if not isinstance(answer, str) or " " not in answer:
        return None
    why, parent = answer.split(" ", 1)
    text = f"image or mask is the picture of job {parent}, which "
    match why:
        case "many":
            text += f"{MAX_CHILDREN:,} jobs wait for already, the limit: wait until it is done."
        case "deep":
            text += f"waits itself, as number {MAX_DEPTH} of a chain, the limit: wait until it is done."
        case _:
            text += f"{'has failed' if why == 'failed' else 'was cancelled'}: submit that job again first."
    return InvalidJobError(text)


class Chains:
    """Settles jobs that wait although what they wait for has ended. For workers."""

    def __init__(self, client: Redis) -> None:
        self._redis = client
        self._settle = Script(client, scripts.SETTLE)
        self._cursor = "0"

    def look(self, is_stored: Callable[[str, str], bool]) -> None:
        """Look at the next jobs that wait.

        `is_stored` says whether the bucket has the picture of a job by its id and tenant: asked of jobs
        without a record. Raises what it raises, and redis-py's errors.
        """
        if not self._redis.exists(WAITING):
            self._cursor = "0"
            return  # As nearly always: to make the script's functions takes Redis longer than to say so.
        for _ in range(LOOKS):
            # There may be more: of many that wait for one, its end settles the first ones.
            if not self._look_once(is_stored):
                return

    def _look_once(self, is_stored: Callable[[str, str], bool]) -> int:
        self._cursor, settled, *missing = self._call([])
        known: list[str] = []
        for child, parent in zip(missing[::2], missing[1::2], strict=True):
            known += [child, parent, "done" if is_stored(parent, self._tenant_of(child)) else "gone"]
        if known:
            _, more, *_ = self._call(known)
            return int(settled) + int(more)
        return int(settled)

    def _call(self, known: list[str]) -> list[str]:
        found: list[Any] = self._settle(keys=[WAITING], args=[self._cursor, LOOKED_AT, *known])
        return [str(each) for each in found]

    def _tenant_of(self, job_id: str) -> str:
        record = readable(job_id, self._redis.hgetall(job_key(job_id)))
        return record.job.tenant if record else ""
