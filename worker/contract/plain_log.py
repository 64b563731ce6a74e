"""Logs in which no text of others can do harm: every handler formats through here, for people or as JSON.

What is logged quotes messages, records and announcements, which whoever reaches Redis can write. Escaping
where it is quoted would have to be remembered at each place, also in other people's code.

Nor does a log have secrets or prompts, at any level: loggers of other people's code that write them are not
let below a level at which they do not.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
from typing import Literal

from worker.contract.json_log import JsonFormatter, scope_of
from worker.contract.plain_text import plain

#: How a log is written: `SMALLCAT_LOG`.
LogForm = Literal["human", "json"]

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
    traceback are indented. So no text begins a line of the log. The ids of the job and of the trace that it
    is about stand at the end, where it does not name them.
    """

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self.inner = inner or _BASIC

    def format(self, record: logging.LogRecord) -> str:
        """The record as `inner` formats it, but for what is escaped."""
        shown = copy.copy(record)
        text = record.getMessage()
        first, *rest = (_lines(text) if "\n" in str(record.msg) else plain(text)).split("\n", 1)
        shown.msg, shown.args = "\n".join([first + _about(record, text), *rest]), ()
        if record.exc_info or record.exc_text:
            # Not the text that another handler's formatter has left there.
            found = self.inner.formatException(record.exc_info) if record.exc_info else record.exc_text
            shown.exc_info, shown.exc_text = None, f"  {_lines(found or '')}"
        if record.stack_info:
            shown.stack_info = f"  {_lines(record.stack_info)}"
        return self.inner.format(shown)


#: As `escape_logs` was called last; what is set up later in this process follows it.
_form: LogForm = "human"


def log_form() -> LogForm:
    """How this process writes its log: for a process that it starts."""
    return _form


def escape_logs(form: LogForm | None = None) -> None:
    """Let all handlers that there are write in that form, and keep to `LOWEST`.

    Calling it again covers the handlers that have come since, as libraries add theirs when they are imported.
    `form`: None is as before.
    """
    global _form
    _form = form or _form
    for name, level in LOWEST.items():
        logger = logging.getLogger(name)
        # Not below that of the loggers above it, either.
        logger.setLevel(max(level, logger.getEffectiveLevel()))
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for logger in (logging.root, *loggers):
        for handler in logger.handlers:
            formatter = handler.formatter
            if _form == "json" and not isinstance(formatter, JsonFormatter):
                handler.setFormatter(JsonFormatter())
            elif _form == "human" and not isinstance(formatter, PlainFormatter):
                handler.setFormatter(PlainFormatter(formatter))


def set_up_log(form: LogForm) -> None:
    """Write this process' log to standard error in that form: of smallcat from INFO on, of others warnings.

    For processes that Celery does not set up.
    """
    logging.basicConfig(stream=sys.stderr, format="[%(asctime)s: %(levelname)s] %(message)s")
    logging.captureWarnings(True)
    logging.getLogger("smallcat").setLevel(logging.INFO)
    escape_logs(form)
    log_uncaught(form)


def ended(text: str, code: int = 1) -> SystemExit:
    """The end of this process, with its reason on standard error: a sentence, or a line of the log.

    `code` is the exit code where it is a line; a sentence ends with 1.
    """
    if _form == "json":
        logging.getLogger("smallcat").critical("%s", text)
        return SystemExit(code)
    return SystemExit(f"smallcat: {text}")


def log_uncaught(form: LogForm) -> None:
    """As JSON, also what ends a thread is a line of the log."""
    if form == "json":
        threading.excepthook = _log_uncaught


def _log_uncaught(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread else "?"
    error = args.exc_value
    logging.getLogger("smallcat").critical("The thread %s has ended by an error.", name, exc_info=error)


def _about(record: logging.LogRecord, text: str) -> str:
    """What the line is about and does not name."""
    job, trace = scope_of(record)
    about = [f"job {job}"] if job and job not in text else []
    about += [f"trace {trace}"] if trace else []
    return f" [{plain(', '.join(about))}]" if about else ""


def _lines(text: str) -> str:
    return plain(text, keep="\n").replace("\n", "\n  ")
