"""The sender of notifications: takes what is due from Redis, sends it, and notes what became of it.

Several may run at once. One that is killed loses nothing: what it held comes back, and is sent again with the
same `webhook-id`. Each host has a few requests at a time, so that one that is slow holds up no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

from producer.session import Session
from producer.webhooks.connection import Connections, LateError, UnsentError
from producer.webhooks.payload import body_of, headers_of
from producer.webhooks.schedule import GONE, asked_s, pause_s
from producer.webhooks.secrets import Secrets
from worker.contract.errors import QueueError, SettingsError
from worker.contract.plain_text import plain
from worker.contract.settings import WebhookSettings
from worker.contract.webhook import Hosts
from worker.health.report import Health
from worker.state.notifications import HELD_S, Ended, Notification, Notifications, Shares, name_of
from worker.tracing.submissions import NO_SPAN, notification_span, service_is

logger = logging.getLogger("smallcat.webhooks")

#: Notifications that are sent at once, and those of them to one host.
AT_ONCE, PER_HOST = 128, 8
#: Ports of one host name that may have all of a host's requests at once.
_PORTS: Final = 2
#: Hosts that are remembered as slow, or as warned of, at most.
_MAX_NOTED: Final = 1_000
#: Seconds between two looks at Redis while nothing is due, and while it is away.
LOOK_EVERY_S, AWAY_S = 0.25, 1.0
#: Seconds without a look after which a sender counts as stuck.
STUCK_S: Final = 60.0
#: What the log says first: whoever starts a sender waits for it.
STARTED: Final = "Notifications are sent"


class Sender:
    """Sends what is due until it is stopped."""

    def __init__(
        self,
        session: Session,
        settings: WebhookSettings,
        at_once: int,
        per_host: int,
        on_ended: Callable[[str], None] = lambda ended: None,
    ) -> None:
        """`on_ended` is called with how each attempt ended: see `Ended`.

        Raises `SettingsError` where a setting is no secret, or no host.
        """
        self._session, self._on_ended = session, on_ended
        self._notifications = Notifications(session.redis)
        self._secrets = Secrets(settings.webhook_secret, settings.webhook_secrets_dir)
        self._hosts = Hosts.parse(settings.webhook_hosts)
        self._timeout_s = settings.webhook_timeout_s
        self._at_once, self._per_host = at_once, per_host
        self._busy: Counter[str] = Counter()
        self._tenants: Counter[str] = Counter()
        self._slow: set[str] = set()
        self._warned: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._looked_s = time.monotonic()

    def stop(self) -> None:
        """Take no more; `run` returns when what is being sent has been answered. On its event loop."""
        self._stop.set()

    @property
    def stuck_s(self) -> float:
        """When the sender counts as stuck, by `time.monotonic`, unless it looks for something to send."""
        return math.inf if self._stop.is_set() else self._looked_s + STUCK_S

    async def run(self) -> None:
        """Send until `stop`. While Redis is away, wait for it."""
        self._connections = Connections(self._hosts, self._timeout_s, self._at_once)
        is_away = False
        try:
            while not self._stop.is_set():
                self._looked_s = time.monotonic()
                try:
                    taken = await self._take()
                    if is_away:
                        logger.info("Redis answers again.")
                    is_away = False
                except QueueError as error:
                    if not is_away:
                        logger.warning("Notifications wait: %s", plain(str(error)))
                    is_away, taken = True, []
                for each in taken:
                    self._busy[each.host] += 1
                    self._tenants[_tenant_of(each)] += 1
                    task = asyncio.create_task(self._handle(each))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                if not taken:
                    await self._wait(AWAY_S if is_away else LOOK_EVERY_S)
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=self._timeout_s + 1)
            for task in self._tasks:
                task.cancel()
        finally:
            await self._connections.close()

    async def _wait(self, seconds: float) -> None:
        """Wait so long, or until `stop`, or until there is room for one more."""
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({stopping, *self._tasks}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()

    async def _take(self) -> list[Notification]:
        if (room := self._at_once - len(self._tasks)) <= 0:
            return []
        return await asyncio.to_thread(self._taken, room, dict(self._busy), self._shares())

    def _taken(self, room: int, busy: dict[str, int], shares: Shares) -> list[Notification]:
        with self._session.queue_errors():
            return self._notifications.take(room, self._per_host, busy, shares)

    def _shares(self) -> Shares:
        """A tenant has a quarter of what is sent at once, and three where no others wait."""
        names: Counter[str] = Counter()
        for host, count in self._busy.items():
            names[name_of(host)] += count
        quarter = self._at_once // 4
        return Shares(
            per_tenant=max(1, quarter),
            alone=max(1, self._at_once - quarter),
            per_name=_PORTS * self._per_host,
            per_slow=max(1, self._per_host // 4),
            tenants=dict(self._tenants),
            names=names,
            slow=sorted(self._slow),
        )

    def _note_late(self, host: str, *, is_late: bool) -> None:
        if not is_late:
            self._slow.discard(name_of(host))
        elif len(self._slow) < _MAX_NOTED:
            self._slow.add(name_of(host))

    def _may_warn(self, host: str) -> bool:
        """Whether it is a minute since the log said that something is sent to this host again."""
        now_s = time.monotonic()
        if self._warned.get(host, 0.0) > now_s:
            return False
        if len(self._warned) >= _MAX_NOTED:
            self._warned.clear()
        self._warned[host] = now_s + 60
        return True

    async def _handle(self, notification: Notification) -> None:
        """Try to send one, and note how that ended."""
        began_s, span = time.monotonic(), NO_SPAN
        try:
            with notification_span(notification.hook, _attributes_of(notification)) as span:
                ended, delay_s, text = await self._send(notification)
                if ended != "sent":
                    span.fail(text)
        except Exception as error:
            logger.exception("The notification %s has a fault.", notification.id)
            ended, delay_s, text = self._after(notification, f"a fault of the sender, {type(error).__name__}")
        finally:
            for counter, key in (
                (self._busy, notification.host),
                (self._tenants, _tenant_of(notification)),
            ):
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]
        self._on_ended(ended)
        shown = notification.id[1:], plain(notification.host), plain(text)
        about = {"job": notification.what.get("job", ""), "trace": span.trace}
        extra = {**about, "fields": _fields_of(notification)}
        if ended == "sent":
            logger.info("The notification %s to %s is delivered.", *shown[:2], extra=extra)
        elif ended == "failed":
            logger.error("The notification %s to %s is given up: %s.", *shown, extra=extra)
        elif not notification.attempts and self._may_warn(notification.host):
            logger.warning("The notification %s to %s is sent again later: %s.", *shown, extra=extra)
        while True:
            try:
                await asyncio.to_thread(self._settle, notification, ended, delay_s, text)
                return
            except QueueError:
                # After that another sender may hold it.
                if time.monotonic() - began_s > HELD_S - AWAY_S:
                    return
                await asyncio.sleep(AWAY_S)

    def _settle(self, notification: Notification, ended: Ended, delay_s: float, text: str) -> None:
        with self._session.queue_errors():
            self._notifications.settle(notification, ended, delay_s, text)

    async def _send(self, notification: Notification) -> tuple[Ended, float, str]:
        """Try once. Returns how it ended, seconds until the next attempt, and why in words."""
        try:
            body = body_of(notification.what)
            url = str(notification.hook["url"])
        except (ValueError, KeyError):
            return "failed", 0.0, "what Redis has of it cannot be read"
        try:
            secrets = await asyncio.to_thread(self._secrets.of, str(notification.hook.get("tenant", "")))
            headers = headers_of(f"msg_{notification.id[1:]}", time.time(), body, secrets)
            status, retry_after = await self._connections.post(url, body, headers)
            self._note_late(notification.host, is_late=False)
        except LateError as error:
            self._note_late(notification.host, is_late=True)
            return self._after(notification, str(error))
        except (SettingsError, UnsentError) as error:
            return self._after(notification, str(error).rstrip("."))
        if 200 <= status < 300:
            return "sent", 0.0, ""
        if status == GONE:
            return "failed", 0.0, "it answered 410, Gone: it wants nothing more"
        redirects = ": redirects are not followed" if 300 <= status < 400 else ""
        return self._after(
            notification, f"it answered {status}{redirects}", asked_s(retry_after, time.time())
        )

    def _after(self, notification: Notification, text: str, asked: float = 0.0) -> tuple[Ended, float, str]:
        """What to do after an attempt that failed."""
        pause = pause_s(notification.attempts + 1, random.random(), asked)  # noqa: S311 - nothing secret
        return ("failed", 0.0, text) if pause is None else ("later", pause, text)


def _attributes_of(notification: Notification) -> dict[str, Any]:
    """What a span says of an attempt to send it: of the address its host alone, the rest may be secret."""
    return {
        "server.address": name_of(notification.host),
        "http.request.method": "POST",
        "http.request.resend_count": notification.attempts,
        "smallcat.job.id": str(notification.what.get("job", "")),
    }


def _fields_of(notification: Notification) -> dict[str, Any]:
    """What lines of the log say of it as fields."""
    what = {name: notification.what[name] for name in ("submission", "run") if notification.what.get(name)}
    return {"notification": notification.id[1:], "attempt": notification.attempts + 1, **what}


def _tenant_of(notification: Notification) -> str:
    tenant = notification.hook.get("tenant")
    return tenant if isinstance(tenant, str) else ""


@contextlib.contextmanager
def in_background(
    session: Session, settings: WebhookSettings, on_ended: Callable[[str], None] = lambda ended: None
) -> Iterator[None]:
    """Send notifications beside what this process does. Raises `SettingsError`."""
    sender = Sender(session, settings, AT_ONCE, PER_HOST, on_ended)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(
        target=loop.run_until_complete, args=[sender.run()], name="webhooks", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(sender.stop)
        thread.join()
        loop.close()


def run(
    session: Session,
    settings: WebhookSettings,
    at_once: int,
    per_host: int,
    on_ended: Callable[[str], None] = lambda ended: None,
) -> None:
    """Send notifications until SIGTERM or Ctrl-C; then finish what is being sent. Raises `SettingsError`."""

    service_is("smallcat-webhooks")
    health = Health(settings.health_port)
    health.start()

    async def serve() -> None:
        sender = Sender(session, settings, at_once, per_host, on_ended)

        def stop() -> None:
            health.stopping()
            sender.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        health.started(
            stuck_s=lambda: sender.stuck_s,
            stuck_as=f"Nothing has been looked for in Redis for {STUCK_S:.0f} s.",
            not_ready=lambda: _why_not_ready(session),
        )
        hosts = plain(settings.webhook_hosts) or "every public host"
        logger.info("%s to %s, up to %d at once and %d a host.", STARTED, hosts, at_once, per_host)
        await sender.run()
        logger.info("No notifications are sent any more.")

    asyncio.run(serve())


def _why_not_ready(session: Session) -> str:
    """Why Redis does not let the sender work; empty where it does. Blocks while it is away."""
    with session.queue_errors():
        session.redis.ping()
    return ""
