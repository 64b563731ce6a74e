"""Celery's log of a worker, with one line for an event.

Celery shows a traceback for each message that goes back to its queue, and a line for each try to reach Redis.
What it says of Redis goes to the log of refusals, which has a line for the beginning and one for the end; a
message that goes back is logged where that is decided.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from worker.contract.errors import SettingsError
from worker.contract.plain_log import LogForm, escape_logs, log_uncaught, set_up_log
from worker.contract.refusals import code_of, refusal_log
from worker.contract.settings import worker_settings

#: Celery's loggers whose lines are looked at.
_CONSUMER = "celery.worker.consumer.consumer"
_CONNECTION = "celery.worker.consumer.connection"
_TRACE = "celery.app.trace"
_KOMBU = "kombu.transport.redis"
_WARNINGS = "py.warnings"
#: What they say below warnings, that a message came and that a task ended, is said of its job by
#: `worker.jobs.handler`.
_SAID_BY_US = ("celery.worker.strategy", "celery.app.trace")


def before_celery() -> None:
    """As JSON also what Celery says before it sets up its log."""
    # A worker that starts says what is wrong with the settings.
    with contextlib.suppress(SettingsError):
        if worker_settings().log == "json":
            set_up_log("json")


def begin(sender: Any, form: LogForm) -> None:
    """Set up the log of a worker, `sender`."""
    sender.setup_logging()
    # The lines of smallcat itself are logged whatever the level of Celery's own log.
    logging.getLogger("smallcat").setLevel(min(logging.INFO, sender.loglevel))
    shorten(form)
    # Celery's banner is no JSON.
    sender.quiet = sender.quiet or form == "json"


def shorten(form: LogForm = "human") -> None:
    """Begin, once Celery has set up its logging. Calling it again changes nothing."""
    escape_logs(form)
    log_uncaught(form)
    for name in _SAID_BY_US:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in (_CONSUMER, _CONNECTION, _TRACE, _KOMBU, _WARNINGS):
        logger = logging.getLogger(name)
        if _to_be_logged not in logger.filters:
            logger.addFilter(_to_be_logged)


def _to_be_logged(record: logging.LogRecord) -> bool:
    if record.name == _TRACE:
        data = getattr(record, "data", None)
        return not (isinstance(data, dict) and data.get("description") == "rejected")
    if record.name == _WARNINGS:
        # At each lost connection Celery proposes a setting, which is set.
        return "worker_cancel_long_running_tasks_on_connection_loss" not in record.getMessage()
    if record.name == _KOMBU:
        # Twice a second it looks after bindings that nothing here needs.
        return not (record.exc_info and record.exc_info[1] and code_of(record.exc_info[1]))
    if record.name == _CONNECTION:
        # Redis takes connections also while it refuses commands, and each refusal may cost one.
        return not refusal_log.refuses
    return _is_no_outage(record)


def _is_no_outage(record: logging.LogRecord) -> bool:
    """Whether a record of the consumer is about something else than Redis; others are logged as refusals."""
    arguments = record.args if isinstance(record.args, tuple) else ()
    for argument in arguments:
        if isinstance(argument, Exception) and _is_of_the_connection(argument):
            refusal_log.refused("fetch", argument)
            return False
    if "Frequent restarts detected" in str(record.msg) and refusal_log.refuses:
        return False
    record.exc_info = None if refusal_log.refuses else record.exc_info
    return True


def _is_of_the_connection(error: Exception) -> bool:
    # By name: Redis' client is not imported here.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return not kinds.isdisjoint({"RedisError", "OperationalError", "OSError"})
