"""Pictures that jobs of the fault suite begin with, and what must be in the pictures of these jobs."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from producer.session import session
from worker.contract.job import Job

#: Of text alone; of an image; of a part of it; of that part alone, at a size of its own.
KINDS = ("text", "image", "mask", "part")
WITH_PICTURES = KINDS[1:]
#: Kinds of jobs in turns. Each eighth is of text alone, and begins with another job by `harness.chaining`.
IN_TURNS = ("image", *4 * ["text"], "mask", *4 * ["text"], "part", *5 * ["text"])
#: Of an image, (width, height); its right half is drawn.
SIZE = (96, 64)
#: The grey of an image, which no job is drawn in: see `tests.faults.runner.pixel_of`.
GREY = 252


class Pictures:
    """What jobs of each kind and tenant begin with, stored once."""

    def __init__(self) -> None:
        self._stored: dict[tuple[str, str, int], dict[str, Any]] = {}

    def fields(self, kind: str, tenant: str = "", own: int = 0) -> dict[str, Any]:
        """Fields of a job; with another number `own` it has an image that others have not."""
        if kind == "text":
            return {}
        key = kind, tenant, own
        if key not in self._stored:
            image = Image.new("L", SIZE, GREY)
            image.putpixel((1, 1), own % 256)
            mask = Image.new("L", SIZE)
            mask.paste(255, (SIZE[0] // 2, 0, *SIZE))
            files = {"image": _png(image)} | ({"mask": _png(mask)} if kind != "image" else {})
            given = session().given(files, tenant)
            assert given is not None
            session().store(given, tenant)
            self._stored[key] = given.fields | ({"padding": 4} if kind == "part" else {})
        return self._stored[key]


def check(picture: Image.Image, job: Job, drawn: int) -> None:
    """A job's picture is of its own grey, `drawn`; of an image what stays is there."""
    grey = picture.convert("L")
    if job.mask:
        width, height = grey.size
        assert (width, height) == SIZE
        assert (grey.getpixel((2, height // 2)), grey.getpixel((width - 1, height // 2))) == (GREY, drawn)
    else:
        assert grey.getextrema() == (drawn, drawn)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
