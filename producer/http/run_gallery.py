"""The gallery of a run: the page that `smallcat gallery` writes, of the jobs that have ended so far."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

from producer.gallery.write import write_gallery
from producer.http import schema
from producer.http.auth import Reader, Shared
from producer.http.problems import RefusedError
from producer.http.runs import look, require_own

router = APIRouter(tags=["runs"])

#: Seconds that the links of a page work: it is made anew for each request.
LINKS_S: Final = 6 * 3_600


@router.get(
    "/v1/runs/{run}/gallery",
    summary="The pictures of a run as a page",
    response_class=HTMLResponse,
    responses=schema.answers(200, {"type": "string"}, 404, 409, media="text/html"),
)
async def get_gallery(run: str, caller: Reader, backend: Shared) -> Response:
    """One HTML file with links to the pictures that work for 6 hours. 409 while no job has ended."""
    require_own(run, caller)
    found = await backend.run(look, backend, run)
    source = backend.runs.listed(run)
    if source is None or not found["done"] + found["failed"] + found["cancelled"]:
        raise RefusedError(
            409,
            f"The run {run} is {found['state']}, and none of its jobs has ended: come back later.",
            code="NotDone",
            headers={"Retry-After": "10"},
        )
    title = ", ".join(found["files"]) or run
    html = await backend.run(_page, source, title)
    # Its own policy, which has the hashes of its script and style, is in the page itself.
    headers = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": "frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(html, headers=headers)


def _page(source: Path, title: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="smallcat-gallery-") as folder:
        path = Path(folder) / "gallery.html"
        write_gallery(str(source), path, title=title, expires_s=LINKS_S)
        return path.read_bytes()
