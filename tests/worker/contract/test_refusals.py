"""Why a Redis refuses: known by its own words, in whichever shape they arrive."""

from __future__ import annotations

import logging
import threading

import pytest
import redis
from redis._parsers import BaseParser

from worker.contract.refusals import REFUSALS, RefusalLog, code_of, over, sentence

#: What Valkey 9.1 and Redis 6.2 to 7.4 answer.
WORDS = {
    "NOAUTH": "NOAUTH Authentication required.",
    "WRONGPASS": "WRONGPASS invalid username-password pair or user is disabled.",
    "NOPERM": "NOPERM User default has no permissions to run the 'eval' command",
    "OOM": "OOM command not allowed when used memory > 'maxmemory'.",
    "MISCONF": "MISCONF Redis is configured to save RDB snapshots, but it's unable to persist to disk.",
    "READONLY": "READONLY You can't write against a read only replica.",
    "MASTERDOWN": "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "NOREPLICAS": "NOREPLICAS Not enough good replicas to write.",
    "BUSY": "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "LOADING": "LOADING Redis is loading the dataset in memory",
    "MAXCLIENTS": "ERR max number of clients reached",
    "DENIED": "DENIED Redis is running in protected mode because protected mode is enabled.",
    "DATABASE": "ERR DB index is out of range",
    "CLUSTER": "ERR SELECT is not allowed in cluster mode",
    "MOVED": "MOVED 3999 127.0.0.1:6381",
    "CROSSSLOT": "CROSSSLOT Keys in request don't hash to the same slot",
    "CLUSTERDOWN": "CLUSTERDOWN Hash slot not served",
    "TRYAGAIN": "TRYAGAIN Multiple keys request during rehashing of slot",
    "ASK": "ASK 3999 127.0.0.1:6381",
    "COMMAND": "ERR unknown command 'EVAL', with args beginning with: ",
}


@pytest.mark.parametrize("code", WORDS)
def test_a_refusal_is_known_as_redis_py_raises_it(code: str) -> None:
    error = BaseParser.parse_error(WORDS[code])
    expected = {"WRONGPASS": "NOAUTH"}.get(code, code)
    assert code_of(error) == expected
    told = sentence("redis://h", error)
    assert told.startswith(f"Redis at redis://h {REFUSALS[expected].what} (")
    assert told.endswith(f"): {REFUSALS[expected].remedy}.")


@pytest.mark.parametrize("code", ["OOM", "MISCONF", "NOREPLICAS", "READONLY", "NOPERM"])
@pytest.mark.parametrize(
    "shape",
    [
        "Command # 1 (SET smallcat:worker:w) of pipeline caused error: {}",
        "ERR Error running script (call to f_6b): @user_script:3: @user_script: 3: -{}",  # Redis 6.2
        "{} script: 6b, on @user_script:3.",
    ],
)
def test_a_refusal_is_known_in_a_script_and_in_a_pipeline(code: str, shape: str) -> None:
    assert code_of(redis.ResponseError(shape.format(WORDS[code]))) == code


def test_a_refusal_is_known_behind_another_error() -> None:
    error = ConnectionError("lost")
    error.__cause__ = BaseParser.parse_error(WORDS["READONLY"])
    assert code_of(error) == "READONLY"


@pytest.mark.parametrize(
    "error",
    [
        redis.ConnectionError("Connection refused"),
        redis.TimeoutError("Timeout reading from socket"),
        redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"),
        redis.ResponseError("Command # 1 (SET BUSY OOM) of pipeline caused error: WRONGTYPE"),
        ValueError("READ"),
    ],
)
def test_other_errors_are_no_refusals(error: Exception) -> None:
    assert code_of(error) is None
    assert over(error) is None


def test_each_reason_has_a_sentence_of_its_own() -> None:
    alike = {"WRONGPASS", "MOVED", "ASK", "CROSSSLOT", "CLUSTERDOWN", "TRYAGAIN"}
    reasons = [reason for code, reason in REFUSALS.items() if code not in alike]
    assert (
        len({reason.what for reason in reasons}) == len({reason.remedy for reason in reasons}) == len(reasons)
    )
    assert "password" not in REFUSALS["NOPERM"].what + REFUSALS["NOPERM"].remedy


def test_a_refusal_is_logged_once_and_its_end_once(caplog: pytest.LogCaptureFixture) -> None:
    log, full, busy = RefusalLog(), *(BaseParser.parse_error(WORDS[code]) for code in ("OOM", "BUSY"))

    def lines() -> list[str]:
        """What this thread logged there: what earlier tests left behind may log meanwhile."""
        return [
            each.getMessage()
            for each in caplog.records
            if (each.name, each.thread) == ("smallcat.redis", threading.get_ident())
        ]

    with caplog.at_level(logging.WARNING, logger="smallcat.redis"):
        for _ in range(100):
            log.refused("jobs", full)
            log.refused("fetch", full)
        assert lines() == [f"{sentence('', full)} Jobs wait for it; none counts an attempt."]
        log.answered("jobs")
        log.answered("heartbeat")
        assert len(lines()) == 1
        log.refused("jobs", busy)
        log.answered("fetch")
        assert len(lines()) == 2
        log.answered("jobs")
        log.answered("jobs")
        assert "is back" in lines()[-1]
        assert len(lines()) == 3
