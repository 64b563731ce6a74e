"""The program of `worker.tracing.exporter`: `process.py FORM PID`.

FORM is how it logs, PID the worker's. It is no part of the worker, so that its Python does not compete with
the thread that feeds the GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys


def main(form: str, pid: str) -> None:
    """Make spans of all lines of standard input, until it ends."""
    # It ends when the worker has: signals to the group of both are for the worker.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    # What the GPU is fed with goes first.
    with contextlib.suppress(OSError):
        os.nice(5)
    from worker.contract.plain_log import set_up_log
    from worker.tracing.spans import AttemptSpans

    set_up_log("json" if form == "json" else "human")
    spans = AttemptSpans(int(pid))
    for line in sys.stdin.buffer:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            spans.make(json.loads(line))
    spans.end()


if __name__ == "__main__":
    main(*sys.argv[1:3])
