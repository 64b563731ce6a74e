"""The commands `webhooks`: send notifications, list and retry what could not be delivered, make secrets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from producer.cli.json_output import json_option, moment, print_json, say
from producer.session import Session, session
from worker.contract.errors import CallerError, UnknownJobError
from worker.contract.plain_log import set_up_log
from worker.contract.plain_text import counted
from worker.contract.settings import webhook_settings

if TYPE_CHECKING:
    from worker.state.notifications import Notification, Notifications


@click.group()
def webhooks() -> None:
    """Tell webhooks how jobs ended: send, list, retry, make secrets."""


@webhooks.command("run")
@click.option(
    "--concurrency", type=click.IntRange(1, 4_096), default=128, help="Requests at once; 128 when not given."
)
@click.option(
    "--per-host", type=click.IntRange(1, 256), default=8, help="Of these to one host; 8 when not given."
)
@click.option("--metrics-port", type=click.IntRange(1, 65_535), help="Serve Prometheus metrics on this port.")
def webhooks_run(concurrency: int, per_host: int, metrics_port: int | None) -> None:
    """Send notifications until SIGTERM or Ctrl-C. Several may run at once."""
    try:
        from producer.webhooks import sender
    except ModuleNotFoundError as error:
        raise CallerError(f'{error.name} is not installed: pip install "smallcat[http]".') from None
    now, settings = session(redis_retry_s=2), webhook_settings()
    set_up_log(settings.log)
    sender.run(now, settings, concurrency, per_host, counting(now, metrics_port))


def counting(now: Session, port: int | None) -> Callable[[str], None]:
    """Serve the metrics of a sender on `port`. Returns what counts how its attempts end; None: nothing does.

    Raises `CallerError`.
    """
    if port is None:
        return lambda ended: None
    try:
        from producer.webhooks import metrics
    except ModuleNotFoundError as error:
        raise CallerError(f'{error.name} is not installed: pip install "smallcat[metrics]".') from None
    try:
        return metrics.serve(now, port)
    except OSError as error:
        raise CallerError(f"Port {port} cannot be listened on ({error.strerror}): name another.") from None


@webhooks.command("list")
@click.option("--waiting", is_flag=True, help="Those that are sent now or wait for their next attempt.")
@json_option
def webhooks_list(waiting: bool, as_json: bool) -> None:
    """List notifications that were given up, the latest first. They are kept for 30 days, up to 10,000."""
    now = session()
    with now.queue_errors():
        book = _book()
        found = book.waiting() if waiting else book.failed()
        untaken = book.untaken()
    if as_json:
        print_json([_shown(each) for each in found])
        return
    for each in found:
        values = _shown(each)
        when = f"next {moment(each.due_at)}" if waiting else f"given up {moment(each.ended_at)}"
        ended = f": {values['error']}" if values["error"] else ""
        attempts = counted(each.attempts, "attempt")
        say(f"{each.id}  {values['event']}  {values['host']}  {when}, {attempts}{ended}")
    if not found:
        say("No notification waits." if waiting else "No notification was given up.", err=True)
    if untaken:
        waits = counted(untaken, "notification waits", "notifications wait")
        say(f"note  {waits} for a sender: `smallcat webhooks run` is one.", err=True)


@webhooks.command("retry")
@click.argument("ids", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every one that was given up.")
@json_option
def webhooks_retry(ids: Sequence[str], everything: bool, as_json: bool) -> None:
    """Send notifications again that were given up, with all their attempts; waiting ones at once."""
    if bool(ids) == everything:
        raise CallerError("Which notifications? Give ids of `smallcat webhooks list`, or --all.")
    now = session()
    with now.queue_errors():
        book = _book()
        count = book.retry([each.id for each in book.failed()] if everything else list(dict.fromkeys(ids)))
    if unknown := max(0, len(set(ids)) - count):
        raise UnknownJobError(
            f"{unknown} of these ids belong to no notification that waits or was given up: see "
            f"`smallcat webhooks list`. The others, {count}, are sent again."
        )
    print_json({"retried": count}) if as_json else say(f"{count} are sent again")


@webhooks.command("secret")
@click.option("--tenant", default="", help="Whose; jobs that are no tenant's when not given.")
@click.option("--rotate", is_flag=True, help="Make a new one; the old one signs as well until --drop-old.")
@click.option("--drop-old", is_flag=True, help="Sign with the newest alone: its receiver knows it.")
@json_option
def webhooks_secret(tenant: str, rotate: bool, drop_old: bool, as_json: bool) -> None:
    """Make a secret that signs notifications, and print it for their receiver.

    It is kept in SMALLCAT_WEBHOOK_SECRETS_DIR. Without such a folder it is only printed, for
    SMALLCAT_WEBHOOK_SECRET.
    """
    from producer.webhooks.secrets import Secrets, new_secret, whose

    if rotate and drop_old:
        raise CallerError("--rotate and --drop-old are two steps: receivers take the new secret in between.")
    settings = webhook_settings()
    if drop_old:
        count = Secrets("", settings.webhook_secrets_dir).drop_old(tenant)
        text = (
            f"the older secret of {whose(tenant)} is dropped"
            if count
            else f"{whose(tenant)} has one secret alone"
        )
        print_json({"tenant": tenant, "dropped": count}) if as_json else say(text)
        return
    if not settings.webhook_secrets_dir and not tenant:
        secret = new_secret()
        say("note  Put it into SMALLCAT_WEBHOOK_SECRET of the sender, before the one that it has.", err=True)
    else:
        book = Secrets("", settings.webhook_secrets_dir)
        secret = book.rotate(tenant, is_new=not rotate)
    print_json({"tenant": tenant, "secret": secret}) if as_json else say(secret)


def _book() -> Notifications:
    from worker.state.notifications import Notifications

    return Notifications(session().redis)


def _shown(notification: Notification) -> dict[str, Any]:
    """A notification for people: its host, and nothing else of its address, which may hold secrets."""
    what = notification.what
    kind = "job." + str(what.get("state", "")) if "job" in what else "run.finished"
    return {
        "id": notification.id,
        "event": kind,
        "job": what.get("job"),
        "submission": what.get("submission"),
        "run": what.get("run"),
        "tenant": notification.hook.get("tenant", ""),
        "host": notification.host,
        "attempts": notification.attempts,
        "told_at": notification.told_at,
        "next_at": notification.due_at or None,
        "error": notification.ended,
    }
