"""Writes the contact sheet of a run, from a manifest or from the records in a bucket.

    lines.py     what is known of each job: manifest lines, or the records beside the pictures
    rows.py      from that to what the page shows: texts, a link, a thumbnail
    page.py      the file: a template, a policy, and blocks of data that cannot become markup
    fields.py    the fields of a job that the page lists and filters by
    static/      page.html, page.css and the parts of the page's script

Lines become rows in several threads. Rows are written in order as they come, so that memory stays flat.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from producer.gallery.lines import is_address, read_lines
from producer.gallery.page import PageWriter
from producer.gallery.rows import Pictures, row_of
from worker.contract.errors import CallerError

#: Seconds for which a link works, at most: S3's own limit of 7 days.
MAX_LINK_S = 604_800
#: Jobs on one page, by default: browsers take long to open a page with more.
DEFAULT_LIMIT = 20_000
#: Threads that fetch pictures and read records.
THREADS = 16

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Gallery:
    """A page that was written."""

    #: Where it is.
    path: Path
    #: Jobs on it, failed ones among them.
    jobs: int
    #: Of these, jobs with a picture.
    pictures: int
    #: Of these, jobs that failed.
    failed: int
    #: The file's size, bytes.
    size: int
    #: Unix seconds at which its links expire; None where it has none.
    expires_at: float | None
    #: What the page's reader should know, in sentences.
    notices: tuple[str, ...]


def write_gallery(
    source: str,
    output: Path | None = None,
    *,
    embed: bool = False,
    title: str | None = None,
    expires_s: int = MAX_LINK_S,
    limit: int = DEFAULT_LIMIT,
) -> Gallery:
    """Write the contact sheet of `source`: a manifest, or an s3:// address with pictures below it.

    `output` is the page's path; by default it is beside the manifest, or in the current folder. A page that
    is there already is replaced when the new one is whole. Links to the pictures work for `expires_s` seconds
    (1 to 604,800). With `embed`, thumbnails of 256 pixels are part of the page, which then shows them without
    the bucket and after the links have expired. The first `limit` jobs are shown, and the page says so.

    Raises `CallerError` where the source cannot be read or the page not be written, `StorageError`.
    """
    if not 1 <= expires_s <= MAX_LINK_S:
        raise CallerError(f"The links cannot last {expires_s} seconds: S3 allows 1 to {MAX_LINK_S:,}.")
    if limit < 1:
        raise CallerError(f"The limit is {limit}: show at least one picture.")
    path = output or _beside(source)
    notices: list[str] = []
    lines = read_lines(source, notices.append)
    made_at = time.time()
    pictures = Pictures(expires_s, embed=embed)
    with PageWriter(path) as page:
        for row, thumbnail in in_order(partial(row_of, pictures), islice(lines, limit)):
            page.add(row, thumbnail)
        if page.jobs == limit and next(lines, None) is not None:
            notices.append(f"Only the first {limit:,} jobs are shown: raise --limit for more.")
        if not page.jobs:
            raise CallerError(f"There is no job in {source}: name a manifest, or an address with pictures.")
        expires_at = made_at + expires_s if page.origins else None
        size = page.finish(
            title=title or _title(source),
            command=f"smallcat gallery {source}" + (" --embed" if embed else ""),
            made_at=made_at,
            expires_at=expires_at,
            notices=notices + pictures.notices(),
        )
    counts = page.states
    return Gallery(
        path, page.jobs, page.pictures, counts["failed"], size, expires_at, (*notices, *pictures.notices())
    )


def in_order(function: Callable[[T], R], items: Iterable[T], threads: int = THREADS) -> Iterator[R]:
    """`function` of each item, in their order, computed in `threads` threads. Raises what `function` raises.

    At most 4 results for each thread are kept: `Executor.map` would read all items first and keep all
    results.
    """
    with ThreadPoolExecutor(threads, "gallery") as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 4 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _beside(source: str) -> Path:
    if is_address(source):
        return Path("gallery.html")
    path = Path(source)
    return path.with_name(f"{_stem(path.name)}.html")


def _title(source: str) -> str:
    return source.rstrip("/") if is_address(source) else _stem(Path(source).name)


def _stem(name: str) -> str:
    """A manifest's name without its endings: `run` of `run.manifest.jsonl`."""
    for ending in (".part", ".gz", ".jsonl", ".csv", ".manifest"):
        name = name.removesuffix(ending)
    return name or "gallery"
