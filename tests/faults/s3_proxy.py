"""An HTTP proxy before the S3 server that fails in the ways that S3 fails."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

#: well: nothing is wrong. down: connections are cut. errors: every answer is a 500. silent: nobody answers.
#: corrupt: a byte of each object is another one on the way. slow: each request waits for SLOW_S.
#: denied: every request is refused, as when rights lapse. expired: as when keys do.
#: halved: the connection ends in the middle of each object that is read.
Mode = Literal["well", "down", "errors", "silent", "corrupt", "slow", "denied", "expired", "halved"]

#: Status and code of a refusal by mode.
_REFUSALS = {"denied": (403, "AccessDenied"), "expired": (400, "ExpiredToken")}

#: Seconds that a request waits when the mode is slow.
SLOW_S = 0.7


class S3Proxy:
    """Passes requests on to `port`, or does what its mode says. Ends with `close`."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._mode: Mode = "well"
        self._changed = threading.Condition()
        #: Requests that failed on purpose, by mode.
        self.failed: Counter[str] = Counter()
        #: Keys that hold this are refused, whatever the mode; none where it is empty.
        self.denied_key = ""
        #: Requests whose path does not hold this are passed on, whatever the mode.
        self.only_key = ""
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="s3 proxy", daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """The proxy's address as `AWS_ENDPOINT_URL_S3`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def mode(self) -> Mode:
        """What it does at present."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        with self._changed:
            self._mode = mode
            self._changed.notify_all()

    def wait_while(self, mode: Mode, timeout_s: float | None = None) -> None:
        """Return when the mode is another one."""
        with self._changed:
            self._changed.wait_for(lambda: self._mode != mode, timeout_s)

    def pass_on(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        """The real server's status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self._target, timeout=30)
        try:
            # As it was signed: with the caller's own Host.
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def close(self) -> None:
        """Stop listening."""
        self.mode = "well"
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: S3Proxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        mode = self.owner.mode if self.owner.only_key in self.path else "well"
        if mode != "well":
            self.owner.failed[mode] += 1
        if mode in ("down", "silent"):
            if mode == "silent":
                self.owner.wait_while("silent")
            self.close_connection = True
            return
        if mode == "errors":
            self._answer(500, {}, b"<Error><Code>InternalError</Code><Message>on purpose</Message></Error>")
            return
        if self.owner.denied_key and self.owner.denied_key in self.path:
            mode = "denied"
        if mode in _REFUSALS:
            status, code = _REFUSALS[mode]
            self._answer(
                status, {}, f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
            )
            return
        if mode == "slow":
            self.owner.wait_while("slow", SLOW_S)
        if mode == "corrupt" and self.command == "PUT" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        answer = self.owner.pass_on(self.command, self.path, body, headers)
        self._answer(*answer, is_halved=mode == "halved")

    def _answer(self, status: int, headers: dict[str, str], body: bytes, *, is_halved: bool = False) -> None:
        with contextlib.suppress(OSError):
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = (
                headers.get("Content-Length", str(len(body))) if self.command == "HEAD" else str(len(body))
            )
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if is_halved else body)
                self.close_connection = self.close_connection or is_halved

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Say nothing."""
