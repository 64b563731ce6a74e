"""Reports of a process about itself, from which `/live`, `/ready` and `/startup` are answered.

    health = Health(settings.health_port)
    health.start()
    health.doing("loading the model")
    health.started(stuck_s=..., not_ready=...)
    health.stopping()

What answers is a process of its own (`worker.health.server`): it answers while this one's Python is busy, and
never delays it. This one writes a line to it each second, and at each change.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker.contract.errors import SettingsError, first_line

logger = logging.getLogger("smallcat.health")

#: Seconds between two reports, and between two checks of whether the process is ready.
REPORT_EVERY_S, CHECK_EVERY_S = 1.0, 15.0
#: Seconds between two checks while the process is not ready.
CHECK_AGAIN_S = 2.0
#: Seconds after which a check that has not returned counts as failed.
CHECK_S = 10.0


class Health:
    """The health of this process. Thread-safe; nothing blocks.

    `port`: 1 to 65535, on all addresses; None: no HTTP. Where systemd has started the process with
    `Type=notify`, it is told too. Where there is neither, all methods do nothing.
    """

    def __init__(self, port: int | None) -> None:
        self._port = port
        self._socket: socket.socket | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._doing = "The process starts."
        self._started = self._stopping = False
        self._stuck_s: Callable[[], float] = lambda: math.inf
        self._stuck_as = ""
        self._is_patient: Callable[[], bool] = lambda: False
        self._check: Callable[[], str] = lambda: ""
        self._check_now = threading.Event()
        self._checking_since_s: float | None = None
        self._not_ready = "It has not been checked yet."

    @property
    def is_on(self) -> bool:
        """Whether anybody is told."""
        return bool(self._port or os.environ.get("NOTIFY_SOCKET"))

    def start(self) -> None:
        """Begin to answer. Raises `SettingsError` where the port is taken."""
        if not self.is_on:
            return
        if self._port:
            self._socket = _listen(self._port)
        self._report()
        threading.Thread(target=self._run, name="health", daemon=True).start()

    def doing(self, what: str) -> None:
        """Say in a sentence what the process does until it has started."""
        self._doing = what
        self._report()

    def started(
        self,
        *,
        stuck_s: Callable[[], float],
        stuck_as: str,
        not_ready: Callable[[], str],
        is_patient: Callable[[], bool] = lambda: False,
    ) -> None:
        """From now on the process has started.

        `stuck_s` returns, by `time.monotonic`, when the process counts as stuck unless it moves; infinity
        while it has nothing to do. It is called each second, and `stuck_as` is the sentence for it. Where
        `is_patient` returns True, the process may be silent. `not_ready` returns in a sentence why the
        process is not ready, or nothing; it may block, and is called on a thread of its own.
        """
        self._stuck_s, self._stuck_as, self._is_patient = stuck_s, stuck_as, is_patient
        self._check, self._started = not_ready, True
        if self.is_on:
            threading.Thread(target=self._run_checks, name="readiness", daemon=True).start()
        self._report()

    def stopping(self) -> None:
        """From now on the process is not ready, because it is about to end."""
        self._stopping = True
        self._report()

    def check(self) -> None:
        """Check now whether the process is ready, and not at the next turn."""
        self._check_now.set()

    def stop(self) -> None:
        """Answer no more."""
        self._ended.set()
        self._check_now.set()
        with self._writing:
            if self._server is not None and self._server.stdin is not None:
                with contextlib.suppress(OSError):
                    self._server.stdin.close()
                self._server.wait()
                self._server = None
        if self._socket is not None:
            self._socket.close()

    def _run(self) -> None:
        while not self._ended.wait(REPORT_EVERY_S):
            try:
                self._report()
            except Exception:
                # The next one may succeed; that none is sent is seen from outside.
                logger.exception("The health of this process cannot be reported.")

    def _run_checks(self) -> None:
        while not self._ended.is_set():
            self._checking_since_s = time.monotonic()
            try:
                found = self._check()
            except Exception as error:  # noqa: BLE001 - whatever it is, the process is not ready
                found = first_line(error)
            self._checking_since_s = None
            is_new, self._not_ready = found != self._not_ready, found
            if is_new:
                self._report()
            self._check_now.wait(CHECK_AGAIN_S if found else CHECK_EVERY_S)
            self._check_now.clear()

    def _why_not_ready(self) -> str:
        if self._stopping:
            return "The process is about to end."
        since_s = self._checking_since_s
        if since_s is not None and (for_s := time.monotonic() - since_s) > CHECK_S:
            return f"What it needs has not answered for {for_s:.0f} s."
        return self._not_ready

    def _report(self) -> None:
        if not self.is_on or self._ended.is_set():
            return
        stuck_s = self._stuck_s()
        report: dict[str, Any] = {
            "sent_s": time.monotonic(),
            "stuck_s": None if math.isinf(stuck_s) else stuck_s,
            "stuck_as": self._stuck_as,
            "patient": not self._started or self._is_patient(),
            "started": self._started,
            "doing": self._doing,
            "not_ready": self._why_not_ready(),
            "stopping": self._stopping,
        }
        line = json.dumps(report).encode() + b"\n"
        with self._writing:
            if self._ended.is_set():
                return
            if self._server is None or self._server.poll() is not None:
                self._server = self._spawn()
            assert self._server.stdin is not None  # noqa: S101 - PIPE was asked for
            # One that has died is replaced at the next report.
            with contextlib.suppress(OSError):
                os.write(self._server.stdin.fileno(), line)

    def _spawn(self) -> subprocess.Popen[bytes]:
        descriptors = [] if self._socket is None else [self._socket.fileno()]
        program = str(Path(__file__).with_name("server.py"))
        names = ("PATH", "NOTIFY_SOCKET", "WATCHDOG_USEC")
        server = subprocess.Popen(
            [sys.executable, "-I", "-S", program, *map(str, descriptors)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=descriptors,
            env={name: os.environ[name] for name in names if name in os.environ},
            cwd="/",
        )
        assert server.stdin is not None  # noqa: S101 - PIPE was asked for
        # A server that does not read must not hold up this process.
        os.set_blocking(server.stdin.fileno(), False)
        return server


def _listen(port: int) -> socket.socket:
    """A socket that listens on all addresses, of both families where the machine has IPv6."""
    try:
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):
                return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise SettingsError(
            f"SMALLCAT_HEALTH_PORT is {port}, which cannot be listened on ({error.strerror}): name another. "
            "Each process of a machine needs one of its own."
        ) from None
