"""Asks a process for its health, as a probe does."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable
from typing import Any

#: Seconds that a test waits for an answer to change; only a failing test waits so long.
SOON_S = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, path: str, timeout_s: float = 5) -> tuple[int, dict[str, Any]]:
    """Status and body; raises `OSError` where nobody listens, or whoever does ends meanwhile."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except http.client.HTTPException as error:
        raise OSError(f"The answer broke off: {error!r}") from error
    finally:
        connection.close()


def wait_until(port: int, path: str, status: int, timeout_s: float = SOON_S) -> dict[str, Any]:
    """The body of the first answer with that status."""
    found: Any = None

    def is_there() -> bool:
        nonlocal found
        try:
            found = ask(port, path)
        except (OSError, ValueError) as error:
            found = error
        return isinstance(found, tuple) and found[0] == status

    wait_for(is_there, lambda: f"{path} of port {port}: {found}", timeout_s)
    body: dict[str, Any] = found[1]
    return body


def wait_for(is_there: Callable[[], bool], what: Callable[[], str], timeout_s: float = SOON_S) -> None:
    """Poll what no event announces, because it is in another process."""
    until_s = time.monotonic() + timeout_s
    while not is_there():
        assert time.monotonic() < until_s, what()
        time.sleep(0.02)
