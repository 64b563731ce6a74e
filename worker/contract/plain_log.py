"""Logs in which no text of others can do harm: every handler formats through here.

What is logged quotes messages, records and announcements, which whoever reaches Redis can write. Escaping
where it is quoted would have to be remembered at each place, also in other people's code.

Nor does a log have secrets or prompts, at any level: loggers of other people's code that write them are not
let below a level at which they do not.
"""

from __future__ import annotations

import copy
import logging

from worker.contract.plain_text import plain

_BASIC = logging.Formatter("[%(asctime)s: %(levelname)s] %(message)s")

#: Loggers, with those below them, and the lowest level that they may have: below it they write requests with
#: their headers, which have tokens and signatures, addresses that are signed, and tasks with their prompts.
LOWEST = {
    "botocore": logging.INFO,
    "boto3": logging.INFO,
    "s3transfer": logging.INFO,
    "urllib3": logging.INFO,
    "httpcore": logging.INFO,
    "httpcore2": logging.INFO,
    "httpx": logging.WARNING,
    "celery.pool": logging.INFO,
}


class PlainFormatter(logging.Formatter):
    """Another formatter, which is given the record with all characters escaped that are not seen.

    A message is one line, unless the code that logs it says otherwise; its further lines and those of a
    traceback are indented. So no text begins a line of the log.
    """

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self.inner = inner or _BASIC

    def format(self, record: logging.LogRecord) -> str:
        """The record as `inner` formats it, but for what is escaped."""
        shown = copy.copy(record)
        text = record.getMessage()
        shown.msg, shown.args = (_lines(text) if "\n" in str(record.msg) else plain(text)), ()
        if record.exc_info or record.exc_text:
            # Not the text that another handler's formatter has left there.
            found = self.inner.formatException(record.exc_info) if record.exc_info else record.exc_text
            shown.exc_info, shown.exc_text = None, f"  {_lines(found or '')}"
        if record.stack_info:
            shown.stack_info = f"  {_lines(record.stack_info)}"
        return self.inner.format(shown)


def escape_logs() -> None:
    """Let all handlers that there are format through `PlainFormatter`, and keep to `LOWEST`.

    Calling it again changes nothing.
    """
    for name, level in LOWEST.items():
        logger = logging.getLogger(name)
        logger.setLevel(max(level, logger.level))
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for logger in (logging.root, *loggers):
        for handler in logger.handlers:
            if not isinstance(handler.formatter, PlainFormatter):
                handler.setFormatter(PlainFormatter(handler.formatter))


def _lines(text: str) -> str:
    return plain(text, keep="\n").replace("\n", "\n  ")
