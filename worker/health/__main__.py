"""Ask a process on this machine for its health: `python -m worker.health live|ready|startup`.

Exit codes: 0 where the answer is yes, 1 where it is no or there is no answer, 2 for wrong arguments. For
containers without curl, and starts in a few milliseconds: of this project nothing is imported.
"""

from __future__ import annotations

import http.client
import json
import os
import sys

#: Seconds until an answer must be there.
ANSWER_S = 4.0


def ask(path: str, port: int) -> str:
    """Why the process that listens on `port` of this machine says no; empty where it says yes."""
    connection = http.client.HTTPConnection("localhost", port, timeout=ANSWER_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        return f"Port {port} does not answer: {error}."
    finally:
        connection.close()
    if answer.status == 200:
        return ""
    try:
        return str(json.loads(body)["reason"])
    except (ValueError, KeyError, TypeError):
        return f"Port {port} answers {answer.status}."


def main() -> int:
    """Ask, print why not, and return the exit code."""
    port = os.environ.get("SMALLCAT_HEALTH_PORT", "")
    if len(sys.argv) != 2 or sys.argv[1] not in ("live", "ready", "startup"):
        print("usage: python -m worker.health live|ready|startup", file=sys.stderr)
        return 2
    if not port.isdigit():
        print("SMALLCAT_HEALTH_PORT is not set: set it as the process that is asked has it.", file=sys.stderr)
        return 2
    if reason := ask(f"/{sys.argv[1]}", int(port)):
        print(reason, file=sys.stderr)
        return 1
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
