"""The log as JSON: an object a line, whoever logs, with the job and the trace that it is about."""

from __future__ import annotations

import datetime
import io
import json
import logging
import math
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.worker.contract.test_plain_log import HOSTILE
from worker.contract.job_scope import about_job, job_scope
from worker.contract.json_log import JsonFormatter
from worker.contract.plain_log import PlainFormatter, ended, escape_logs, log_form

JOB, TRACE = "a" * 32, "b" * 32


class Log:
    """A logger and the lines that it has written."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self.logger, self._out = logging.getLogger("smallcat.test.json"), io.StringIO()
        self.handler = logging.StreamHandler(self._out)
        self.handler.setFormatter(formatter)
        self.logger.addHandler(self.handler)
        self.logger.setLevel(logging.DEBUG)

    def lines(self) -> list[str]:
        return self._out.getvalue().splitlines()

    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines()]


@pytest.fixture
def log() -> Iterator[Log]:
    made = Log(JsonFormatter())
    yield made
    made.logger.removeHandler(made.handler)


def test_a_line_is_one_object_whatever_it_quotes(log: Log) -> None:
    before = datetime.datetime.now(datetime.UTC)
    log.logger.warning("Of %s\n%s", HOSTILE, "more", extra={"fields": {"host": HOSTILE, "level": "FORGED"}})
    [line], [found] = log.lines(), log.objects()
    assert line.isascii()
    assert line.isprintable()
    assert found["message"] == f"Of {HOSTILE}\nmore"
    assert found["host"] == HOSTILE
    assert (found["level"], found["logger"]) == ("WARNING", "smallcat.test.json")
    assert found["timestamp"].endswith("Z")
    at = datetime.datetime.fromisoformat(found["timestamp"])
    assert abs((at - before).total_seconds()) < 60
    assert "job" not in found
    assert "trace" not in found


def test_a_traceback_is_a_field(log: Log) -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.logger.exception("It failed", stack_info=True)
    [found] = log.objects()
    assert found["exception"].startswith("Traceback")
    assert "ValueError" in found["exception"]
    assert "test_a_traceback_is_a_field" in found["stack"]


def test_what_others_put_beside_a_message_is_left_out(log: Log) -> None:
    """Celery puts the arguments of a task there, and with them the prompt."""
    log.logger.info("Task received", extra={"data": {"args": "a unicorn"}})
    assert "unicorn" not in log.lines()[0]


def test_each_thread_has_its_own_job() -> None:
    log, ready = Log(JsonFormatter()), threading.Barrier(2, timeout=10)

    def work(job: str) -> None:
        with about_job(job, TRACE):
            ready.wait()
            log.logger.info("Somebody else's line")
            ready.wait()

    threads = [threading.Thread(target=work, args=[job * 32]) for job in "cd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.logger.info("About none")
    log.logger.info("About one", extra={"job": JOB})
    log.logger.removeHandler(log.handler)
    found = log.objects()
    assert {each["job"] for each in found[:2]} == {"c" * 32, "d" * 32}
    assert {each["trace"] for each in found[:2]} == {TRACE}
    assert "job" not in found[2]
    assert found[3]["job"] == JOB
    assert job_scope().job == ""


def test_for_people_a_line_names_its_job_once_and_its_trace() -> None:
    log = Log(PlainFormatter(logging.Formatter("%(message)s")))
    with about_job(JOB):
        log.logger.info("Of Job %s", JOB)
        log.logger.info("Of none\nin lines")
        log.logger.info("Of %s", HOSTILE)
    with about_job(JOB, TRACE):
        log.logger.info("Traced")
    log.logger.removeHandler(log.handler)
    lines = log.lines()
    assert lines[:3] == [f"Of Job {JOB}", f"Of none [job {JOB}]", "  in lines"]
    assert lines[3].endswith(f"\\u2028b [job {JOB}]")
    assert lines[4:] == [f"Traced [job {JOB}, trace {TRACE}]"]


def test_all_handlers_follow_and_those_of_libraries_that_come_later(
    capsys: pytest.CaptureFixture[str],
) -> None:
    handler = logging.StreamHandler(io.StringIO())
    logger = logging.getLogger("somebody.else.json")
    before = [(each, each.formatter) for each in logging.root.handlers]
    try:
        escape_logs("json")
        logger.addHandler(handler)
        escape_logs()
        assert isinstance(handler.formatter, JsonFormatter)
        assert log_form() == "json"
        assert ended("The bucket is gone.", 3).code == 3
        escape_logs("human")
        assert isinstance(handler.formatter, PlainFormatter)
        assert ended("The bucket is gone.", 3).code == "smallcat: The bucket is gone."
    finally:
        escape_logs("human")
        logger.removeHandler(handler)
        for each, formatter in before:
            each.setFormatter(formatter)


def test_a_number_that_json_has_not_is_null(log: Log) -> None:
    fields = {"wait_s": math.inf, "all": [1.5, math.nan, {"least": -math.inf}], "size": 3}
    log.logger.info("of %s", math.inf, extra={"fields": fields})
    [line], [found] = log.lines(), log.objects()
    assert not {"Infinity", "NaN"} & set(re.findall(r"\w+", line))
    assert (found["message"], found["wait_s"], found["all"]) == ("of inf", None, [1.5, None, {"least": None}])
    assert found["size"] == 3
