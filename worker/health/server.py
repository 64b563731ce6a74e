"""Answers probes about another process: a program of the standard library alone.

Run as `python -I -S server.py [FD]` by `worker.health.report`. FD is a socket that listens; without one, only
systemd is told. Each line of standard input is a report, as JSON:

    sent_s      monotonic seconds when it was sent; the clock is the same in all processes of a machine
    stuck_s     monotonic seconds at which the process counts as stuck, unless it reports later ones; or null
    stuck_as    a sentence that says so
    patient     whether the process may be silent: it starts or compiles
    started     whether it has started
    doing       what it does until it has started
    not_ready   why it is not ready; empty where it is
    stopping    whether it is about to end

Standard input ends when the other process ends, however it does, and this one ends with it. It answers while
the other process holds Python's lock, and says when that has been silent for too long.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

#: Seconds without a report after which the process counts as stuck.
SILENT_S = 60.0
#: Seconds between two messages to systemd, where it does not say how often it wants them.
NOTIFY_EVERY_S = 10.0


class Reported:
    """What the process has reported last, judged by the present time."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {"doing": "starting", "patient": True}

    def take(self, line: str) -> None:
        """Take a report."""
        self._last = json.loads(line)

    def stuck(self) -> str:
        """Why the process counts as stuck; empty where it does not."""
        now_s, last = time.monotonic(), self._last
        if last.get("patient"):
            return ""
        silent_s = now_s - last["sent_s"]
        if silent_s > SILENT_S:
            return f"The process has been silent for {silent_s:.0f} s."
        stuck_s = math.inf if last["stuck_s"] is None else last["stuck_s"]
        return str(last["stuck_as"]) if now_s > stuck_s else ""

    def not_started(self) -> str:
        """What the process does until it has started; empty when it has."""
        return "" if self._last.get("started") else f"{self._last['doing']}"

    def not_ready(self) -> str:
        """Why the process is not ready; empty where it is."""
        return self.not_started() or self.stuck() or self._last.get("not_ready") or ""

    @property
    def is_stopping(self) -> bool:
        """Whether the process is about to end."""
        return bool(self._last.get("stopping"))


class Probe(BaseHTTPRequestHandler):
    """Answers GET and HEAD of three paths with 200, or with 503 and the reason."""

    reported: ClassVar[Reported]
    #: Seconds that a connection may be silent.
    timeout = 5
    server_version, sys_version = "smallcat-health", ""

    def do_GET(self) -> None:
        """Answer a probe."""
        checks = {
            "/live": self.reported.stuck,
            "/ready": self.reported.not_ready,
            "/startup": self.reported.not_started,
        }
        check = checks.get(self.path.partition("?")[0])
        if check is None:
            self._answer(404, {"status": "unknown", "reason": f"There are {', '.join(checks)}."})
        elif reason := check():
            self._answer(503, {"status": "failing", "reason": reason})
        else:
            self._answer(200, {"status": "ok"})

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def _answer(self, status: int, body: dict[str, str]) -> None:
        content = json.dumps(body).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - http.server's name
        """Probes come every few seconds: they are not logged."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, descriptor: int) -> None:
        listening = socket.socket(fileno=descriptor)
        self.address_family = listening.family
        super().__init__(listening.getsockname()[:2], Probe, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.server_name, self.server_port = "", 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


def tell_systemd(reported: Reported) -> None:
    """Tell systemd when the process has started, what it does, and that it lives, for as long as it does."""
    address = os.environ["NOTIFY_SOCKET"]
    address = f"\0{address[1:]}" if address.startswith("@") else address
    watchdog_us = int(os.environ.get("WATCHDOG_USEC") or 0)
    every_s = min(NOTIFY_EVERY_S, watchdog_us / 3e6) if watchdog_us else NOTIFY_EVERY_S
    was_started = was_stopping = False
    while True:
        lines = [f"STATUS={reported.not_ready() or 'ready'}"]
        if not was_started and not reported.not_started():
            lines, was_started = [*lines, "READY=1"], True
        if reported.is_stopping and not was_stopping:
            lines, was_stopping = [*lines, "STOPPING=1"], True
        if not reported.stuck():
            lines.append("WATCHDOG=1")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
            sender.sendto("\n".join(lines).encode(), address)
        # READY must not wait for the next turn.
        until_s = time.monotonic() + every_s
        while time.monotonic() < until_s:
            if (not was_started and not reported.not_started()) or (
                reported.is_stopping and not was_stopping
            ):
                break
            time.sleep(0.2)


def main() -> None:
    """Answer until standard input ends."""
    # They are for the group of both processes: this one ends after the other.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    reported = Probe.reported = Reported()
    if len(sys.argv) > 1:
        threading.Thread(target=_Server(int(sys.argv[1])).serve_forever, daemon=True).start()
    if os.environ.get("NOTIFY_SOCKET"):
        threading.Thread(target=tell_systemd, args=[reported], daemon=True).start()
    for line in sys.stdin:
        reported.take(line)
    # Threads that answer must not hold up the end.
    os._exit(0)


if __name__ == "__main__":
    main()
