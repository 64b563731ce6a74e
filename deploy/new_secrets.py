"""Makes the passwords and keys of deploy/compose.yaml: `make secrets` writes deploy/.env.

Every variable that the file asks for as `${NAME:?...}` gets a value of its own. A file that is there is left
alone: the servers keep the old passwords. Only the standard library is needed.
"""

from __future__ import annotations

import base64
import os
import re
import secrets
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
COMPOSE, ENV = FOLDER / "compose.yaml", FOLDER / ".env"
#: Bytes of a password, and of an access key, which S3 servers want to be at most 20 characters long.
PASSWORD_BYTES, KEY_BYTES = 24, 10


def names(compose: str) -> list[str]:
    """The variables that a compose file cannot do without."""
    return sorted(set(re.findall(r"\$\{([A-Z0-9_]+):\?", compose)))


def main(env: Path = ENV) -> int:
    """Write the file, for its owner alone; return the exit code."""
    lines = [f"{name}={_new(name)}" for name in names(COMPOSE.read_text(encoding="utf-8"))]
    try:
        descriptor = os.open(env, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        print(
            f"{env} is there already and is left alone, because the servers were started with it: to have "
            "new passwords, move it away, stop the servers, and run this again.",
            file=sys.stderr,
        )
        return 1
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write("\n".join(["# Made by `make secrets`. Keep it: nothing else has these.", *lines, ""]))
    print(f"{env} has {len(lines)} new passwords and keys, for its owner alone.")
    return 0


def _new(name: str) -> str:
    if name == "WEBHOOK_SECRET":
        # As `smallcat webhooks secret` makes it.
        return f"whsec_{base64.b64encode(secrets.token_bytes(PASSWORD_BYTES)).decode()}"
    return secrets.token_hex(KEY_BYTES if name.endswith("_KEY") else PASSWORD_BYTES)


if __name__ == "__main__":
    sys.exit(main())
