"""A log shows the texts of others with nothing hidden in them, whoever logs them."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import boto3
import botocore.config
import botocore.exceptions
import pytest
from celery.utils.log import ColorFormatter

from worker.broker import log_lines
from worker.contract.plain_log import PlainFormatter, escape_logs

#: Moves the cursor, begins a line, turns the direction of writing, sets a title.
HOSTILE = "a\x1b[2J\x1b]0;owned\x07\r\n[2026-11-28: INFO] FORGED\u202e\x9b31m\u2028b"
ESCAPED = "a\\x1b[2J\\x1b]0;owned\\x07\\r\\n[2026-11-28: INFO] FORGED\\u202e\\x9b31m\\u2028b"


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger, and what it writes."""
    logger, out = logging.getLogger("test.plain"), io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(PlainFormatter(logging.Formatter("%(levelname)s: %(message)s")))
    logger.addHandler(handler)
    yield logger, out
    logger.handlers.clear()


def test_a_message_is_one_line_whatever_it_quotes(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, out = log
    logger.error("Job %s: %r, %s", HOSTILE, ValueError(HOSTILE), ValueError(HOSTILE))
    logger.error(HOSTILE.replace("\n", ""))
    first, second = out.getvalue().splitlines()
    assert first.count(ESCAPED) == 3
    assert second == "ERROR: " + ESCAPED.replace("\\n", "")


def test_an_error_and_a_message_of_several_lines_are_indented(
    log: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, out = log
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logger.exception("It failed", stack_info=True)
    logger.error("In lines:\n%s", HOSTILE)
    lines = out.getvalue().splitlines()
    assert [line for line in lines if not line.startswith("  ")] == ["ERROR: It failed", "ERROR: In lines:"]
    assert any(line.startswith("  Traceback") for line in lines)
    assert sum("FORGED" in line for line in lines) == 2
    assert "\x1b" not in out.getvalue()


def test_the_record_is_left_as_it_is_for_other_handlers(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, _ = log
    seen: list[logging.LogRecord] = []
    other = logging.Handler()
    other.emit = seen.append  # type: ignore[method-assign]
    logger.addHandler(other)
    logger.error("%s", HOSTILE)
    assert seen[0].getMessage() == HOSTILE


def test_celery_s_colours_stay() -> None:
    record = logging.LogRecord("x", logging.ERROR, "x", 1, "%s", (HOSTILE,), None)
    shown = PlainFormatter(ColorFormatter("%(message)s", use_color=True)).format(record)
    assert shown == f"\x1b[1;31m{ESCAPED}\x1b[0m"


def test_all_handlers_of_a_worker_and_of_whoever_logs_in_it_are_covered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Celery has a handler for its tasks beside the root's, and other libraries have their own."""
    loggers = [logging.getLogger(name) for name in ("smallcat.test.logs", "somebody.else")]
    handlers = [logging.StreamHandler(io.StringIO()) for _ in loggers]
    for logger, handler in zip(loggers, handlers, strict=True):
        logger.addHandler(handler)
    before = [(handler, handler.formatter) for handler in logging.root.handlers]
    try:
        log_lines.shorten()
        formatters = [handler.formatter for handler in handlers]
        assert all(isinstance(each, PlainFormatter) for each in formatters)
        escape_logs()
        assert [handler.formatter for handler in handlers] == formatters
        loggers[1].error("%s", HOSTILE)
        assert ESCAPED in handlers[1].stream.getvalue()
    finally:
        for logger, handler in zip(loggers, handlers, strict=True):
            logger.removeHandler(handler)
        for handler, formatter in before:
            handler.setFormatter(formatter)


def test_boto_writes_no_token_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    """It wrote the token of the session with the request that it signs, and with the one that it sends."""
    caplog.set_level(logging.DEBUG)
    escape_logs()
    session = boto3.session.Session("AKIDKNOWN", "secret-known", "token-known", "us-east-1")
    config = botocore.config.Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
    client = session.client("s3", endpoint_url="http://127.0.0.1:9", config=config)
    with pytest.raises(botocore.exceptions.EndpointConnectionError):
        client.put_object(Bucket="pictures", Key="a.png", Body=b"")
    signed = client.generate_presigned_url("get_object", Params={"Bucket": "pictures", "Key": "a.png"})
    assert "token-known" in signed
    assert not re.search("known|Signature", caplog.text, re.IGNORECASE)


def test_a_logger_that_was_set_higher_stays_there() -> None:
    logger = logging.getLogger("urllib3")
    before = logger.level
    try:
        logger.setLevel(logging.ERROR)
        escape_logs()
        assert logger.level == logging.ERROR
    finally:
        logger.setLevel(before)
