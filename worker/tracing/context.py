"""Which trace a job is part of, as its message's headers say it: W3C's Trace Context, without a library.

https://www.w3.org/TR/trace-context-1/
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple
from urllib.parse import unquote

from worker.contract.plain_text import plain

_PARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
#: Characters of a `tracestate` that are passed on, at most: what the standard asks for.
_MAX_STATE: Final = 512
_SAMPLED: Final = 1


class TraceContext(NamedTuple):
    """A span somewhere, below which others are to be."""

    #: Id of its trace, 32 hexadecimal digits.
    trace: str
    #: Its own id, 16 hexadecimal digits.
    span: str
    #: Whether the trace is recorded.
    is_sampled: bool = True
    #: What tracing systems add for themselves.
    state: str = ""

    @classmethod
    def parse(cls, parent: object, state: object = None) -> TraceContext | None:
        """The context in the headers `traceparent` and `tracestate`; None where there is none that counts."""
        found = _PARENT.fullmatch(parent) if isinstance(parent, str) else None
        if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
            return None
        if not int(found[2], 16) or not int(found[3], 16):
            return None
        is_state = isinstance(state, str) and len(state) <= _MAX_STATE and state.isascii()
        told = str(state) if is_state and str(state).isprintable() else ""
        return cls(found[2], found[3], bool(int(found[4], 16) & _SAMPLED), told)

    @property
    def headers(self) -> dict[str, str]:
        """As headers of a message."""
        parent = f"00-{self.trace}-{self.span}-{int(self.is_sampled):02x}"
        return {"traceparent": parent, **({"tracestate": self.state} if self.state else {})}


def endpoint_of(environment: Mapping[str, str]) -> str:
    """Where OpenTelemetry's variables say that traces go; empty: they are to be sent nowhere."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ""
    if environment.get("OTEL_TRACES_EXPORTER", "").strip().lower() not in ("", "otlp"):
        return ""
    of_traces = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "").strip()
    return of_traces or environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()


def shown(endpoint: str) -> str:
    """An endpoint for logs: without its user, password and options."""
    scheme, sign, rest = endpoint.partition("://")
    if not sign:
        scheme, rest = "", endpoint
    _, at, place = rest.rpartition("@")
    return plain(f"{scheme}{sign}{'***@' if at else ''}{re.split('[?#]', place, maxsplit=1)[0]}")


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """A text of OpenTelemetry's for logs: passwords, options and headers of its variables are masked."""
    for secret in sorted(set(_secrets(environment)), key=len, reverse=True):
        text = text.replace(secret, "***")
    return plain(text)


def _secrets(environment: Mapping[str, str]) -> Iterator[str]:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"):
        user, at, place = environment.get(f"{name}ENDPOINT", "").rpartition("@")
        found = [*re.split("[?#]", place, maxsplit=1)[1:]]
        if at:
            user = user.partition("://")[2] or user
            found += [user, user.partition(":")[2]]
        for header in environment.get(f"{name}HEADERS", "").split(","):
            found += [header.strip(), header.partition("=")[2].strip()]
        for each in found:
            # A word of one or two letters is in any text.
            yield from (word for word in (each, unquote(each)) if len(word) > 2)


def why_not(environment: Mapping[str, str]) -> str:
    """Why traces cannot be sent to the endpoint, with the remedy; empty where they can."""
    import importlib.util

    named = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    name = next((each for each in named if environment.get(each)), "")
    if name and environment[name] != "http/protobuf":
        return (
            f"{name} is {environment[name]!r}: smallcat sends http/protobuf, to port 4318 of most collectors"
        )
    try:
        is_there = all(
            importlib.util.find_spec(each)
            for each in ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
        )
    except ModuleNotFoundError:
        is_there = False
    return "" if is_there else 'OpenTelemetry is not installed: pip install "smallcat[tracing]"'


def environment_of_exporter() -> dict[str, str]:
    """The environment of a process that sends traces: without what is for Redis, the bucket and smallcat."""
    foreign = ("AWS_", "CELERY_", "REDIS_", "S3_", "SMALLCAT_", "HF_")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
