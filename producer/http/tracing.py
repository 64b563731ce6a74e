"""Traces the requests that may submit jobs, those by POST: a span each, which their jobs are below."""

from __future__ import annotations

from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker.tracing.submissions import request_span


class Traced:
    """An app whose requests are traced, where traces are sent anywhere."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        status: dict[str, Any] = {}

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                status["http.response.status_code"] = message["status"]
            await send(message)

        with request_span("POST", headers, {"http.request.method": "POST"}) as span:
            try:
                await self._app(scope, receive, told)
            finally:
                # The path may have ids; the route has none.
                route = getattr(scope.get("route"), "path", "")
                span.note(status | ({"http.route": route} if route else {}))
                if route:
                    span.rename(f"POST {route}")
                if status.get("http.response.status_code", 500) >= 500:
                    span.fail("the server has failed")
