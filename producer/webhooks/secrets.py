"""What signs notifications: a secret for each tenant, two while one replaces the other.

Redis has none of them. They are where the sender runs:

    SMALLCAT_WEBHOOK_SECRET            of jobs that are no tenant's
    SMALLCAT_WEBHOOK_SECRETS_DIR       a folder, such as a mounted secret of Kubernetes
        _default                       of jobs that are no tenant's
        acme                           of the tenant acme

A file has one secret a line, the newest first. Whoever gets a notification finds it signed with each of them.
Files are read for each notification, so a new secret is used at once.
"""

from __future__ import annotations

import base64
import os
import re
import secrets as chance
import tempfile
from pathlib import Path
from typing import Final

from worker.contract.errors import CallerError, SettingsError
from worker.contract.explain import short

#: The file of jobs that are no tenant's. No tenant can have that name.
DEFAULT: Final = "_default"
#: How secrets begin, as Standard Webhooks has it; bytes of a new one, and those that one may have.
PREFIX, NEW_BYTES = "whsec_", 32
_BYTES: Final = range(24, 65)
#: Secrets that are valid at once, at most.
MOST: Final = 2
_TENANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: Bytes of a file that are read.
_READ: Final = 4_096


def new_secret() -> str:
    """A new secret."""
    return PREFIX + base64.b64encode(chance.token_bytes(NEW_BYTES)).decode()


class Secrets:
    """The secrets of all tenants. Thread-safe."""

    def __init__(self, own: str, folder: str) -> None:
        """`own` and `folder` are the two settings. Raises `SettingsError` for what is no secret."""
        try:
            self._own = _secrets_in(own)
        except ValueError as error:
            raise SettingsError(f"SMALLCAT_WEBHOOK_SECRET {error}.") from None
        self._folder = Path(folder) if folder else None

    def of(self, tenant: str) -> list[str]:
        """The secrets that sign a tenant's notifications, the newest first. Raises `SettingsError`."""
        if not tenant and self._own:
            return self._own
        path = self._path(tenant)
        try:
            found = _secrets_in(path.read_bytes()[:_READ].decode("ascii", "replace")) if path else []
        except FileNotFoundError:
            found = []
        except OSError as error:
            raise SettingsError(f"{path} cannot be read: {error.strerror}.") from None
        except ValueError as error:
            raise SettingsError(f"{path} {error}.") from None
        if not found:
            raise SettingsError(_missing(tenant))
        return found

    def rotate(self, tenant: str, *, is_new: bool = False) -> str:
        """Write a new secret, beside the one that there is. Returns it.

        `is_new`: there must be none yet. Raises `SettingsError` where there is no folder for them,
        `CallerError`.
        """
        path = self._file(tenant)
        try:
            known = self.of(tenant)
        except SettingsError:
            if path.exists():
                raise
            known = []
        if is_new and known:
            raise CallerError(
                f"There is a secret of {whose(tenant)} already: --rotate makes a new one, beside which it "
                "stays valid until --drop-old."
            )
        secret = new_secret()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_privately(path, "".join(f"{each}\n" for each in (secret, *known[: MOST - 1])))
        return secret

    def drop_old(self, tenant: str) -> int:
        """Drop all secrets but the newest. Returns how many.

        Raises `SettingsError` where there is no folder for them, and where there is no secret.
        """
        path = self._file(tenant)
        newest, *old = self.of(tenant)
        if old:
            _write_privately(path, f"{newest}\n")
        return len(old)

    def _file(self, tenant: str) -> Path:
        if (path := self._path(tenant)) is None:
            raise SettingsError(
                "SMALLCAT_WEBHOOK_SECRETS_DIR is not set: name a folder for secrets, which the sender reads."
            )
        return path

    def _path(self, tenant: str) -> Path | None:
        if tenant and not _TENANT.fullmatch(tenant):
            raise SettingsError(f"There can be no secret of a tenant named {short(tenant)}.")
        return self._folder / (tenant or DEFAULT) if self._folder else None


def _secrets_in(text: str) -> list[str]:
    """The secrets in a text. Raises `ValueError` with the end of a sentence, without the text."""
    found = text.replace(",", " ").split()
    if len(found) > MOST:
        raise ValueError(f"has {len(found)} secrets, the limit is {MOST}: drop the older ones")
    for each in found:
        try:
            size = len(base64.b64decode(each.removeprefix(PREFIX), validate=True))
        except ValueError:
            size = 0
        if not each.startswith(PREFIX) or size not in _BYTES:
            raise ValueError(
                f"is no secret: it must be {PREFIX} and base64 of {_BYTES.start} to {_BYTES.stop - 1} bytes, "
                "as `smallcat webhooks secret` makes it"
            )
    return found


def _missing(tenant: str) -> str:
    option = f" --tenant {tenant}" if tenant else ""
    own = "" if tenant else "set SMALLCAT_WEBHOOK_SECRET, or "
    command = f"smallcat webhooks secret{option}"
    return f"There is no secret for notifications of {whose(tenant)}: {own}run `{command}`."


def whose(tenant: str) -> str:
    """Whose secrets these are, in words."""
    return f"the tenant {tenant}" if tenant else "this installation"


def _write_privately(path: Path, text: str) -> None:
    """Write a whole file that its user alone can read, in one step."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".secret-")
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(text)
    Path(name).replace(path)
