"""What a notification says: the body of its request, and the headers that sign it.

As Standard Webhooks 1.0 has it (https://www.standardwebhooks.com): `type`, `timestamp` and `data`; the
headers `webhook-id`, `webhook-timestamp` and `webhook-signature`. The body is the same at each attempt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from standardwebhooks import Webhook

from worker.contract.record import State

#: Bytes of a body, at most: metadata have 4 KiB, and errors are cut.
_LONGEST_ERROR: Final = 2_000
#: What is said of a job of a run, and of a run.
_PLACE: Final = ("run", "number", "file", "line")
_COUNTS: Final = ("total", "done", "failed", "cancelled", "rejected")


def body_of(what: Mapping[str, Any]) -> bytes:
    """The body for what was told (`worker/state/notify.lua`). Raises `ValueError` for what is none."""
    try:
        at = datetime.fromtimestamp(float(what["at"]), UTC)
        kind, data = ("job", _job(what)) if "job" in what else ("run", _run(what))
        event = f"job.{State(str(what['state']))}" if kind == "job" else "run.finished"
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"it is no notification ({type(error).__name__})") from None
    stamp = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"type": event, "timestamp": stamp, "data": data}, ensure_ascii=False).encode()


def _job(what: Mapping[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = {"id": str(what["job"]), "state": str(what["state"])}
    if "submission" in what:
        own = json.loads(what["own"]) if what.get("own") else {}
        data |= {"submission": str(what["submission"]), "metadata": dict(own.get("metadata", {}))}
    data |= {name: what[name] for name in _PLACE if name in what}
    data |= {name: what[name] for name in ("uri", "cached") if what.get(name)}
    return data | _error(what)


def _error(what: Mapping[str, Any]) -> dict[str, Any]:
    if not what.get("error_type"):
        return {}
    return {
        "error": {"type": str(what["error_type"]), "message": str(what.get("error") or "")[:_LONGEST_ERROR]}
    }


def _run(what: Mapping[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = {"run": str(what["run"]), "state": str(what["state"])}
    return data | {name: int(what[name]) for name in _COUNTS if name in what} | _error(what)


def headers_of(name: str, at: float, body: bytes, secrets: Sequence[str]) -> dict[str, str]:
    """The headers of the request that carries `body`, signed with each of the secrets.

    `name` is the notification's own: the same at each attempt. `at`: Unix seconds of this attempt.
    """
    sent = datetime.fromtimestamp(int(at), UTC)
    signatures = [Webhook(each).sign(name, sent, body.decode()) for each in secrets]
    return {
        "content-type": "application/json",
        "webhook-id": name,
        "webhook-timestamp": str(int(at)),
        "webhook-signature": " ".join(signatures),
    }
