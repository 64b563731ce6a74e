"""A collector of traces: takes OTLP over HTTP, as OpenTelemetry's own does, and keeps the spans."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue


@dataclass(frozen=True)
class Span:
    """One span as it was received; ids are hexadecimal digits."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    #: 1: internal, 2: server, 3: client, 4: producer, 5: consumer.
    kind: int
    began: int
    ended: int
    attributes: Mapping[str, Any]
    #: Trace and span of each.
    links: tuple[tuple[str, str], ...]
    #: 0: unset, 1: ok, 2: error.
    status: int
    description: str


def _value(value: AnyValue) -> Any:
    return getattr(value, str(value.WhichOneof("value")))


class Collector(ThreadingHTTPServer):
    """The collector. `url` is for OTEL_EXPORTER_OTLP_ENDPOINT."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        #: What it answers.
        self.status = 200
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def spans(self, trace: str = "") -> list[Span]:
        """All spans so far, or those of a trace."""
        with self._lock:
            return [span for span in self._spans if trace in ("", span.trace)]

    def take(self, body: bytes) -> None:
        """Keep what a request has."""
        request = ExportTraceServiceRequest.FromString(body)
        with self._lock:
            for group in request.resource_spans:
                resource = {each.key: _value(each.value) for each in group.resource.attributes}
                for scope in group.scope_spans:
                    self._spans += [
                        Span(
                            resource["service.name"],
                            span.name,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.kind,
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            {each.key: _value(each.value) for each in span.attributes},
                            tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
                            span.status.code,
                            span.status.message,
                        )
                        for span in scope.spans
                    ]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path != "/v1/traces" or self.headers["Content-Type"] != "application/x-protobuf":
            self.server.status = 404
        if self.server.status == 200:
            self.server.take(body)
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(ExportTraceServiceResponse().SerializeToString())

    def log_message(self, *args: object) -> None:
        """Nothing."""


class Sink(Collector):
    """A collector that keeps nothing, for benchmarks."""

    def take(self, body: bytes) -> None:
        """Nothing."""


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """A collector for the length of a with block."""
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield collector
        finally:
            collector.shutdown()
            thread.join()


if __name__ == "__main__":
    with Sink() as sink:
        print(sink.url, flush=True)
        sink.serve_forever()
