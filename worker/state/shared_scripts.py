"""The Lua scripts that producers run. Workers load them into Redis, producers run what is loaded.

So a producer's user in Redis needs no right to run text of its own, with which it could stop the server:
`deploy/redis-producer.acl` allows EVALSHA, and neither EVAL nor SCRIPT LOAD. A user who may load scripts
needs no worker. A Redis that was restarted has forgotten its scripts until a worker announces itself again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from worker.contract.errors import QueueError
from worker.contract.refusals import code_of
from worker.state import run_scripts, scripts
from worker.state.together import Together

if TYPE_CHECKING:
    from redis.client import Redis

#: Seconds that a producer waits for a worker to load the scripts. Workers announce themselves more often.
LOADED_WITHIN_S: Final = 8.0
#: Seconds between two tries.
RETRY_S: Final = 0.25

_TEXTS: Final = (
    scripts.SUBMIT,
    scripts.CANCEL,
    scripts.FAILURES,
    scripts.ADMIT,
    scripts.REQUEST,
    run_scripts.FEED,
    run_scripts.TAKE,
    run_scripts.ACKNOWLEDGE,
    run_scripts.HEX,
    run_scripts.CANCEL_RUN,
)


def load(client: Redis) -> None:
    """Load those scripts that Redis does not have. One small command where it has all."""
    digests = [hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest() for text in _TEXTS]
    for text, is_there in zip(_TEXTS, client.script_exists(*digests), strict=True):
        if not is_there:
            client.script_load(text)


class Script:
    """A script of redis-py, which loads it where it is missing. Called as those are."""

    #: Times that it is tried. While sentinels replace a primary, it may be loaded into one server and run on
    #: another.
    TRIES: Final = 5

    def __init__(self, client: Redis, text: str, together: Together | None = None) -> None:
        """`together`: what other threads' calls go with."""
        self._client, self._script = client, client.register_script(text)
        self._together = together

    def __call__(self, keys: Sequence[str], args: Sequence[Any] = ()) -> Any:
        """Run it. Raises redis-py's errors."""
        if self._together is None:
            return self._alone(keys, args)
        return self._together(self._script.sha, keys, args, lambda: self._alone(keys, args))

    def _alone(self, keys: Sequence[str], args: Sequence[Any]) -> Any:
        for left in reversed(range(self.TRIES)):
            try:
                return self._script(keys=keys, args=args)
            except Exception as error:
                if type(error).__name__ != "NoScriptError" or not left:
                    raise
            # The next connection asks where the primary is.
            self._client.connection_pool.disconnect(inuse_connections=False)
        return None


class SharedScript:
    """A script of `_TEXTS`. Called as redis-py's own are."""

    def __init__(self, client: Redis, text: str) -> None:
        if text not in _TEXTS:
            raise ValueError("workers must load the script for producers: add it to _TEXTS")
        self._script = Script(client, text)

    def __call__(self, keys: Sequence[str], args: Sequence[Any] = ()) -> Any:
        """Run it. Raises `QueueError` where no worker of this version loads it in time."""
        deadline_s = time.monotonic() + LOADED_WITHIN_S
        while True:
            try:
                return self._script(keys=keys, args=args)
            except Exception as error:
                # redis-py loads a script that is missing, which this user may not.
                is_missing = type(error.__context__).__name__ == "NoScriptError"
                if not is_missing or code_of(error) != "NOPERM":
                    raise
                if time.monotonic() > deadline_s:
                    raise QueueError(
                        "Redis does not have the scripts of this version of smallcat, and this user may not "
                        "load them: start a worker of this version, which does, or give this user the "
                        "right to SCRIPT LOAD."
                    ) from error
            time.sleep(RETRY_S)


class WrittenLately:
    """What this process has written lately, and need not write for each job: that a queue is one of all
    queues; when a list expires. `ttl_s`: seconds that it lives in Redis."""

    EVERY_S: Final = 60.0

    def __init__(self, ttl_s: float) -> None:
        self._every_s = min(self.EVERY_S, ttl_s / 2)
        self._until_s: dict[str, float] = {}

    def has(self, name: str) -> int:
        """1 where it has, else 0."""
        return int(time.monotonic() < self._until_s.get(name, 0.0))

    def note(self, name: str) -> None:
        """It has now."""
        if not self.has(name):
            self._until_s[name] = time.monotonic() + self._every_s
