"""The page at `/`: its files, and signing in to it.

The page is the same for everybody, and has no data. What it shows it fetches from the API, with the rights of
the key that signed in. Its script and its style are files of this server: nothing is inline, and no other
host is asked for anything.
"""

from __future__ import annotations

import functools
import hashlib
import re
from importlib.resources import files
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from producer.gallery import fields
from producer.gallery.page import as_data, one_script, pieces, static
from producer.http.auth import Authentication, Shared, require_tenant
from producer.http.caller import Caller
from producer.http.jobs import as_json
from producer.http.key_store import SCOPES, digest_of
from producer.http.problems import RefusedError
from producer.http.reading import read_json
from producer.http.sessions import COOKIE, LASTS_S, proof_of
from worker.contract.prompt_syntax import SYNTAX, only_words_warning
from worker.contract.scheduler_names import OFFERED

router = APIRouter(include_in_schema=False)

#: The parts of its script and its style that are the gallery's, and its own.
GALLERY_SCRIPTS: Final = ("elements.js", "picture.js", "viewer.js")
SCRIPTS: Final = ("calls.js", "form.js", "notes.js", "jobs.js", "fleet.js", "shown.js", "begin.js")
GALLERY_STYLES: Final = ("look.css", "viewer.css")
#: Nothing is inline, and text cannot become markup.
POLICY: Final = "; ".join(
    [
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' blob:"),
        *("connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
        *("require-trusted-types-for 'script'", "trusted-types 'none'"),
    ]
)
#: The headers of every answer of the page.
_HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_MEDIA: Final = {
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}


@router.get("/")
async def page() -> Response:
    """The page."""
    return Response(_html(), headers=_HEADERS | {"Cache-Control": "no-cache"}, media_type="text/html")


@router.get("/page/session")
async def who(request: Request, backend: Shared) -> Response:
    """Who is signed in, and what he may do; nobody: an empty name."""
    authentication: Authentication = request.app.state.authentication
    if authentication.is_open:
        return _about(await authentication.caller(request), "", is_open=True)
    token = request.cookies.get(COOKIE, "")
    digest = await backend.run(backend.sessions.key_of, token) if token else None
    caller = await authentication.of_key(digest) if digest else None
    if caller is not None:
        require_tenant(caller)
    return _about(caller, token)


@router.post("/page/session")
async def sign_in(request: Request, backend: Shared) -> Response:
    """Sign in with a key: `{"key": ...}`. The answer sets the cookie."""
    authentication: Authentication = request.app.state.authentication
    body = await read_json(request)
    key = body.get("key") if isinstance(body, dict) else None
    if not isinstance(key, str) or not key.strip():
        raise RefusedError(422, "The key is missing: paste one that `smallcat keys add NAME` has printed.")
    digest = digest_of(key.strip()[:1_000])
    caller = await authentication.of_key(digest)
    if caller is None:
        raise RefusedError(
            403, "There is no such key: `smallcat keys list` has all, by their names.", code="Forbidden"
        )
    require_tenant(caller)
    await backend.limits.request(caller)
    token = await backend.run(backend.sessions.begin, digest)
    answer = _about(caller, token)
    _set_cookie(answer, request, token)
    return answer


@router.delete("/page/session")
async def sign_out(request: Request, backend: Shared) -> Response:
    """Sign out, and drop the cookie."""
    authentication: Authentication = request.app.state.authentication
    if token := request.cookies.get(COOKIE, ""):
        await authentication.caller(request)  # That it comes from the page.
        await backend.run(backend.sessions.end, token)
        authentication.forget(token)
    answer = _about(None, "")
    _set_cookie(answer, request, "")
    return answer


@router.get("/page/{name}")
async def page_file(name: str) -> Response:
    """A file of the page. Its name has a hash of what is in it, so that it can be kept."""
    if (text := _files().get(name)) is None:
        raise RefusedError(404, "There is no such file of the page: load the page again.")
    headers = _HEADERS | {"Cache-Control": "public, max-age=31536000, immutable"}
    return Response(text, headers=headers, media_type=_MEDIA[name.rpartition(".")[2]])


def _about(caller: Caller | None, token: str, *, is_open: bool = False) -> Response:
    found: dict[str, Any] = {"name": "", "scopes": [], "proof": "", "is_open": is_open}
    if caller is not None:
        scopes = [scope for scope in SCOPES if caller.may(scope)]
        found |= {"name": caller.name, "scopes": scopes, "proof": proof_of(token) if token else ""}
    return as_json(found, headers={"Cache-Control": "no-store"})


def _set_cookie(answer: Response, request: Request, token: str) -> None:
    answer.set_cookie(
        COOKIE,
        token,
        max_age=LASTS_S if token else 0,
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


@functools.cache
def _files() -> dict[str, str]:
    """The page's script and style, by names with their hashes."""
    elements, *parts = map(static, GALLERY_SCRIPTS)
    script = one_script([elements, _own("state.js"), *parts, *map(_own, SCRIPTS)])
    style = "\n".join([*map(static, GALLERY_STYLES), _own("page.css")])
    found = {"js": script, "css": style, "svg": _own("icon.svg")}
    return {_named(text, ending): text for ending, text in found.items()}


@functools.cache
def _html() -> str:
    """The page, with the names of its files and the table of job fields."""
    by_ending = {name.rpartition(".")[2]: name for name in _files()}
    about = {"fields": fields.as_json(), "words": _words(), "schedules": _schedules()}
    filled = {
        "viewer": static("viewer.html"),
        "script": by_ending["js"],
        "style": by_ending["css"],
        "icon": by_ending["svg"],
        "about": as_data(about),
    }
    return "".join(text + filled.get(name, "") for text, name in pieces(_own("page.html")))


def _words() -> dict[str, Any]:
    """The patterns of what a plain prompt draws as words, as JavaScript reads them, with the sentences."""
    patterns = [
        {
            "name": name,
            "pattern": pattern.pattern,
            "flags": "i" if pattern.flags & re.IGNORECASE else "",
            "alone": only_words_warning([name], ("{names}",)),
        }
        for name, pattern in SYNTAX.items()
    ]
    return {"patterns": patterns, "several": only_words_warning(["{names}"])}


def _schedules() -> dict[str, list[str]]:
    """The schedules that each scheduler is offered with beside its own."""
    return {str(name): [str(each) for each in schedules] for name, schedules in OFFERED.items()}


def _named(text: str, ending: str) -> str:
    return f"page.{hashlib.sha256(text.encode()).hexdigest()[:16]}.{ending}"


def _own(name: str) -> str:
    return files("producer.http").joinpath("static", name).read_text(encoding="utf-8")
