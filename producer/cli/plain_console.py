"""A terminal that shows what others wrote, and is not moved by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from worker.contract.plain_text import plain


class PlainConsole(Console):
    """rich's console, with an escape for each character in a text that is not seen: see `plain`.

    Line breaks are how rich ends a line, and stay: a text that must be one line is escaped before. A `:name:`
    in a prompt is no emoji.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of a renderable; those that are rich's own codes are left alone."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield segment._replace(text=plain(segment.text, keep="\n"))
