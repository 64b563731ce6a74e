"""The process that makes spans of a worker's attempts and sends them: here is the worker's end of it.

An attempt is one line of its standard input. The worker never waits for it: what it does not read in time is
dropped. It ends when the worker has ended, however that ended, and everything was sent.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

from worker.contract.plain_log import log_form
from worker.tracing.attempts import trace_to
from worker.tracing.context import endpoint_of, environment_of_exporter, shown, why_not

logger = logging.getLogger("smallcat.tracing")

#: Bytes of a line that is written whole or not at all, whoever else writes: Linux' PIPE_BUF.
_MAX_LINE: Final = 4096
#: Bytes that wait to be read, at most.
_BUFFER: Final = 1 << 20
#: The program.
PROGRAM: Final = Path(__file__).with_name("process.py")
#: Seconds between two starts, at least: it may not be able to run at all.
REST_S: Final = 60.0
#: Seconds that the end of a worker waits for its last spans.
LAST_S: Final = 5.0


class SpanProcess:
    """The process, which is started again when it has ended by itself. Thread-safe."""

    def __init__(self, program: Path = PROGRAM) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        #: Until when it is not started again, monotonic seconds.
        self._rests_until_s = 0.0
        self._has_dropped = False

    def start(self) -> None:
        """Start it."""
        with self._starting:
            now_s = time.monotonic()
            if now_s < self._rests_until_s or (self._process and self._process.poll() is None):
                return
            self._rests_until_s = now_s + REST_S
            root = str(Path(__file__).parents[2])
            environment = environment_of_exporter()
            environment["PYTHONPATH"] = os.pathsep.join(
                each for each in (root, environment.get("PYTHONPATH")) if each
            )
            self._process = process = subprocess.Popen(
                [sys.executable, "-P", str(self._program), log_form(), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=environment,
                cwd="/",
            )
            assert process.stdin is not None  # noqa: S101 - PIPE was asked for
            os.set_blocking(process.stdin.fileno(), False)
            if hasattr(fcntl, "F_SETPIPE_SZ"):
                with contextlib.suppress(OSError):
                    fcntl.fcntl(process.stdin.fileno(), fcntl.F_SETPIPE_SZ, _BUFFER)

    def send(self, attempt: dict[str, Any]) -> None:
        """Hand an attempt over (`worker.tracing.attempts.Attempt.as_json`), or drop it."""
        process = self._process
        if process is None or process.stdin is None:
            return
        line = _line(attempt)
        try:
            os.write(process.stdin.fileno(), line)
            self._has_dropped = False
        except BlockingIOError:
            if not self._has_dropped:
                logger.warning("Spans are dropped: they are sent more slowly than jobs end.")
            self._has_dropped = True
        except (OSError, ValueError):
            if (code := process.poll()) is not None and time.monotonic() >= self._rests_until_s:
                logger.warning("The process that sends spans has ended with %d: it is started again.", code)
                self.start()

    def stop(self) -> None:
        """Let it send what it has, for some seconds."""
        trace_to(None)
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_S)


def begin() -> str:
    """Trace this process' attempts, if OpenTelemetry's variables say where to. Returns where; empty: not."""
    if not (endpoint := endpoint_of(os.environ)):
        return ""
    if why := why_not(os.environ):
        logger.warning("Nothing is traced to %s: %s.", shown(endpoint), why)
        return ""
    process = SpanProcess()
    process.start()
    trace_to(process.send)
    atexit.register(process.stop)
    return shown(endpoint)


def _line(attempt: dict[str, Any]) -> bytes:
    """An attempt as one line that is short enough; the stages' links are the first that it does without."""
    line = json.dumps(attempt, separators=(",", ":")).encode() + b"\n"
    if len(line) > _MAX_LINE:
        stages = [[*stage[:4], []] for stage in attempt["stages"]]
        line = json.dumps({**attempt, "stages": stages}, separators=(",", ":")).encode() + b"\n"
    if len(line) > _MAX_LINE:
        line = json.dumps({**attempt, "stages": [], "state": ""}, separators=(",", ":")).encode() + b"\n"
    return line
