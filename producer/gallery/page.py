"""Writes the page's file: a template, a Content-Security-Policy, and data that cannot become markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import parse_qs, urlsplit

from producer.gallery import fields
from producer.gallery.rows import Row
from worker.contract.errors import CallerError

#: The parts of the page's one script, in `static/`, in the order in which they run.
SCRIPTS = (
    "elements.js",
    "data.js",
    "axes.js",
    "filter.js",
    "layout.js",
    "picture.js",
    "drawing.js",
    "keyboard.js",
    "viewer.js",
    "start.js",
)
#: The parts of its style.
STYLES = ("look.css", "page.css", "viewer.css")
#: Rows in one block of data.
_ROWS = 500
#: Thumbnails in one block: about 1 MB, which a browser reads in the time that it draws one frame.
_THUMBS = 100
#: An origin that the policy may name as a source of pictures: scheme, host and port.
_ORIGIN = re.compile(r"https?://[\w.\-\[\]:]+")


class PageWriter:
    """Writes one page, row by row. `finish` puts it in place, whole.

    The data is kept in temporary files beside it until then: the policy comes first in the file, and has to
    name the origins of all links.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open = ExitStack()
        #: Rows so far, and of these those with a picture.
        self.jobs = self.pictures = 0
        #: Rows so far by their state.
        self.states: Counter[str] = Counter()
        #: Where the links lead: scheme, host and port.
        self.origins: set[str] = set()
        self._temporary_keys = False
        self._embeds = False
        self._rows: list[Row] = []
        self._thumbs: list[str | None] = []

    def __enter__(self) -> Self:
        with self._errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            folder = self._path.parent
            self._row_file = self._open.enter_context(tempfile.TemporaryFile(dir=folder))
            self._thumb_file = self._open.enter_context(tempfile.TemporaryFile(dir=folder))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, row: Row, thumbnail: str | None) -> None:
        """Add a row, with its thumbnail as base64. Raises `CallerError` when it cannot be written."""
        self.jobs += 1
        self.states[row["state"]] += 1
        self.pictures += "uri" in row
        if url := row.get("url"):
            self._note_link(url)
        self._embeds |= thumbnail is not None
        self._rows.append(row)
        self._thumbs.append(thumbnail)
        if len(self._rows) == _ROWS:
            self._flush_rows()
        if len(self._thumbs) == _THUMBS:
            self._flush_thumbs()

    def finish(
        self,
        *,
        title: str,
        command: str,
        made_at: float,
        expires_at: float | None,
        notices: Sequence[str],
    ) -> int:
        """Write the whole page under its name. Returns its size, bytes. Raises `CallerError`.

        `command` makes the page again. `notices` are sentences at its top. Times are Unix seconds.
        """
        self._flush_rows()
        self._flush_thumbs()
        about = {
            "made_at": made_at,
            "expires_at": expires_at,
            "temporary_keys": self._temporary_keys,
            "command": command,
            "notices": list(notices),
            "thumbs_per_block": _THUMBS if self._embeds else 0,
            "fields": fields.as_json(),
        }
        style, script = "\n".join(map(static, STYLES)), _script()
        filled = {
            "policy": html.escape(self._policy(style, script)),
            "title": html.escape(_whole(title)),
            "style": style,
            "script": script,
            "about": as_data(about),
            "viewer": static("viewer.html"),
        }
        streamed: dict[str, IO[bytes]] = {"rows": self._row_file, "thumbs": self._thumb_file}
        unfinished = self._path.with_name(f".{self._path.name}.part")
        with self._errors():
            try:
                with unfinished.open("wb") as page:
                    for text, name in pieces(static("page.html")):
                        page.write(text.encode())
                        if name in streamed:
                            streamed[name].seek(0)
                            shutil.copyfileobj(streamed[name], page)
                        elif name:
                            page.write(filled[name].encode())
                    size = page.tell()
                unfinished.replace(self._path)
            finally:
                unfinished.unlink(missing_ok=True)
        return size

    def _policy(self, style: str, script: str) -> str:
        """Allows this script, this style and pictures from the links' origins. Text cannot become markup."""
        pictures = " ".join(["data:" if self._embeds else "", *sorted(self.origins)]).strip() or "'none'"
        return "; ".join(
            [
                "default-src 'none'",
                f"img-src {pictures}",
                f"style-src '{_hash(style)}'",
                f"script-src '{_hash(script)}'",
                "base-uri 'none'",
                "form-action 'none'",
                "require-trusted-types-for 'script'",
                "trusted-types 'none'",
            ]
        )

    def _note_link(self, url: str) -> None:
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        if not _ORIGIN.fullmatch(origin):
            raise CallerError(f"Links to {origin} cannot be shown on a page: check AWS_ENDPOINT_URL_S3.")
        self.origins.add(origin)
        # Links that were signed with temporary keys expire with these, perhaps earlier than asked for.
        self._temporary_keys |= "X-Amz-Security-Token" in parse_qs(parts.query)

    def _flush_rows(self) -> None:
        self._block(self._row_file, 'class="rows"', self._rows)
        self._rows = []

    def _flush_thumbs(self) -> None:
        if any(self._thumbs):
            self._block(self._thumb_file, f'id="thumbs-{(self.jobs - 1) // _THUMBS}"', self._thumbs)
        self._thumbs = []

    def _block(self, file: IO[bytes], mark: str, values: Sequence[Any]) -> None:
        if values:
            with self._errors():
                file.write(f'<script type="application/json" {mark}>{as_data(values)}</script>\n'.encode())

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CallerError(f"The page {self._path} cannot be written ({error}).") from error


def as_data(value: object) -> str:
    """JSON without the characters that could end its block or begin markup.

    ASCII only, so that half a surrogate pair is kept: JSON can hold it and UTF-8 cannot.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def pieces(template: str) -> Iterator[tuple[str, str]]:
    """A template's texts, each with the name of the `{{placeholder}}` after it; empty after the last."""
    parts = re.split(r"\{\{(\w+)\}\}", template)
    yield from zip(parts[::2], [*parts[1::2], ""], strict=True)


def static(name: str) -> str:
    """A file of `static/`. Some of them are parts of the server's page as well."""
    return files("producer.gallery").joinpath("static", name).read_text(encoding="utf-8")


def one_script(parts: Iterable[str]) -> str:
    """The parts as one script. They share the scope of one function, and add no name to the page's own."""
    joined = "\n".join(parts)
    return f'\n"use strict";\n(() => {{\n{joined}}})();\n'


def _script() -> str:
    return one_script(map(static, SCRIPTS))


def _hash(text: str) -> str:
    """The hash by which a Content-Security-Policy names a script or a style (CSP level 3, 6.7.3)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _whole(text: str) -> str:
    """`text` without halves of surrogate pairs, which UTF-8 cannot hold."""
    return text.encode(errors="replace").decode()
