"""Why a Redis refuses what is asked of it, and what to do: one sentence for each reason, and one log line.

Known by the code that begins Redis' error ("NOREPLICAS Not enough good replicas to write."), or by the class
that redis-py has made of it. Imports no client.
"""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass
from typing import Final

logger = logging.getLogger("smallcat.redis")


@dataclass(frozen=True)
class Refusal:
    """A reason for which Redis refuses."""

    #: What Redis does, behind "Redis at ...".
    what: str
    #: What somebody can do about it.
    remedy: str
    #: How soon it may be over: "seconds" by itself, "operator" once somebody acts, "never" for this address.
    over: str = "operator"


_CLUSTER: Final = Refusal(
    "is a Redis Cluster",
    "smallcat needs one server with all keys, or Sentinel: set REDIS_URL to one",
    "never",
)

#: Code of Redis' error -> the reason.
REFUSALS: Final = {
    "NOAUTH": Refusal("refuses the password", "check REDIS_URL"),
    "WRONGPASS": Refusal("refuses the password", "check REDIS_URL"),
    "NOPERM": Refusal(
        "does not allow this user what was asked",
        "give the user of REDIS_URL the rights of deploy/redis-producer.acl, or a worker's those that "
        "docs/operations.md lists",
    ),
    "OOM": Refusal("is full", "wait for workers to drain it, or raise its maxmemory"),
    "MISCONF": Refusal(
        "takes no writes while it cannot write to its disk", "make room there; its log says more"
    ),
    "READONLY": Refusal("is read-only, a replica", "wait until it is promoted, or use the primary's address"),
    "MASTERDOWN": Refusal(
        "is a replica that has lost its primary", "start the primary, or use the primary's address", "seconds"
    ),
    "NOREPLICAS": Refusal(
        "takes no writes while too few replicas follow it",
        "start its replicas, or lower its min-replicas-to-write",
        "seconds",
    ),
    "BUSY": Refusal("is busy with a script that does not end", "wait, or end it by SCRIPT KILL", "seconds"),
    "LOADING": Refusal("is still loading its data", "wait", "seconds"),
    "MAXCLIENTS": Refusal(
        "has as many clients as it takes", "raise its maxclients, or end some of them", "seconds"
    ),
    "DENIED": Refusal(
        "is in protected mode and takes no clients from other machines", "set a password for it"
    ),
    "NOSENTINEL": Refusal(
        "is not known: no sentinel that answers names a primary for this service",
        "start the sentinels, or correct their addresses and the service's name in REDIS_URL",
        "seconds",
    ),
    "DATABASE": Refusal("has no database of that number", "use a lower one, 0 to 15 by default", "never"),
    "COMMAND": Refusal(
        "does not know a command that is needed",
        "use Redis 7.0 or later, or Valkey, with no command renamed",
        "never",
    ),
    **dict.fromkeys(("MOVED", "ASK", "CROSSSLOT", "CLUSTERDOWN", "TRYAGAIN", "CLUSTER"), _CLUSTER),
}

#: Classes of redis-py that have taken the code off the text, and the sentinels'.
_CLASSES: Final = {
    "NoPermissionError": "NOPERM",
    "AuthenticationError": "NOAUTH",
    "AuthenticationWrongNumberOfArgsError": "NOAUTH",
    "OutOfMemoryError": "OOM",
    "ReadOnlyError": "READONLY",
    "MasterDownError": "MASTERDOWN",
    "BusyLoadingError": "LOADING",
    "MovedError": "MOVED",
    "AskError": "ASK",
    "TryAgainError": "TRYAGAIN",
    "ClusterCrossSlotError": "CROSSSLOT",
    "ClusterDownError": "CLUSTERDOWN",
    "ClusterError": "CLUSTER",
    "MasterNotFoundError": "NOSENTINEL",
}
#: Texts of errors that have no code of their own.
_TEXTS: Final = {
    "max number of clients reached": "MAXCLIENTS",
    "DB index is out of range": "DATABASE",
    "SELECT is not allowed in cluster mode": "CLUSTER",
    "unknown command": "COMMAND",
    "The previous master is now a slave": "READONLY",
}
#: A code at the beginning, behind what redis-py tells of a pipeline, or as Redis 6 shows a script's error.
_CODE: Final = re.compile(rf"(?:^|caused error: |: -)({'|'.join(REFUSALS)})\b")


def code_of(error: BaseException) -> str | None:
    """The key of `REFUSALS` for an error of redis-py, or of kombu around it; None: it is no refusal."""
    seen: BaseException | None = error
    while seen is not None:
        for kind in type(seen).__mro__:
            if code := _CLASSES.get(kind.__name__):
                return code
        text = str(seen)
        if found := _CODE.search(text):
            return found[1]
        for part, code in _TEXTS.items():
            if part in text:
                return code
        seen = seen.__cause__
    return None


def over(error: BaseException) -> str | None:
    """When the refusal may be over: see `Refusal.over`. None: it is no refusal."""
    code = code_of(error)
    return REFUSALS[code].over if code else None


def sentence(where: str, error: BaseException) -> str:
    """What is wrong with the Redis at `where`, Redis' own words, and the remedy."""
    code, words = code_of(error), _first_line(error)
    redis = f"Redis at {where}" if where else "Redis"
    if code:
        return f"{redis} {REFUSALS[code].what} ({words}): {REFUSALS[code].remedy}."
    if any(kind.__name__ == "ResponseError" for kind in type(error).__mro__):
        return f"{redis} answers with an error ({words}): `smallcat doctor` checks it."
    return f"{redis} is out of reach ({words}): start it, or set REDIS_URL."


def too_few_replicas(have_it: int, wanted: int) -> str:
    """What is wrong where fewer replicas than `SMALLCAT_WAIT_REPLICAS` confirmed a job."""
    return (
        f"The job was sent, but only {have_it} of {wanted} replicas (SMALLCAT_WAIT_REPLICAS) confirmed it in "
        "time: it may be lost with Redis' primary. Start the replicas; submitting again is safe."
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


class RefusalLog:
    """A log line when Redis begins to refuse or is lost, and one when it is back, whoever notices first.

    Several parts of a worker ask Redis again and again; each has a name of its own here. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Who was refused last, and why.
        self._reasons: dict[str, str] = {}
        self.where = ""

    @property
    def refuses(self) -> bool:
        """Whether somebody's last command was refused."""
        return bool(self._reasons)

    def refused(self, part: str, error: BaseException) -> None:
        """A command of `part` was refused, or found no connection."""
        code = code_of(error) or "AWAY"
        with self._lock:
            is_new = code not in self._reasons.values()
            self._reasons[part] = code
        if is_new:
            logger.warning("%s Jobs wait for it; none counts an attempt.", sentence(self.where, error))

    def answered(self, part: str) -> None:
        """A command of `part` was done. Costs next to nothing while nothing is refused."""
        if part not in self._reasons:
            return
        with self._lock:
            self._reasons.pop(part, None)
            is_over = not self._reasons
        if is_over:
            logger.warning("Redis at %s is back: it answers all that it refused.", self.where or "REDIS_URL")


#: The log of this process.
refusal_log: Final = RefusalLog()
