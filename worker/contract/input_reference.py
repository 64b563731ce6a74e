"""How a job names a picture that it begins with: by content, or as the picture of another job.

    sha256:<64 hexadecimal digits>:<width>x<height>    a file in the bucket (`object_keys.input_key`)
    job:<32 hexadecimal digits>:<width>x<height>       the picture of the job with that id

The size is that of the picture as it is seen: after the turn that its Exif says. It is part of the name, so
that a job's own size follows from its fields alone. The worker compares it with the picture.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

#: Bytes of an input's file, at most.
MAX_INPUT_BYTES = 50_000_000
#: Pixels of an input, at most, and of each of its sides.
MAX_INPUT_PIXELS, MAX_INPUT_SIDE = 64_000_000, 32_768
#: A reference, and one to a file alone, as JSON schemas' patterns.
FILE_REFERENCE = r"sha256:[0-9a-f]{64}:[1-9][0-9]{0,4}x[1-9][0-9]{0,4}"
REFERENCE = rf"({FILE_REFERENCE}|job:[0-9a-f]{{32}}:[1-9][0-9]{{0,4}}x[1-9][0-9]{{0,4}})"
#: The mask that is the input's own alpha channel: what is transparent is drawn.
ALPHA = "alpha"


class InputReference(NamedTuple):
    """A picture that a job begins with."""

    kind: Literal["sha256", "job"]
    #: The SHA-256 of the file's bytes, or the job's id; hexadecimal.
    id: str
    #: Pixels, as it is seen.
    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> InputReference:
        """The reference in `text`. Raises `ValueError`, with the end of a sentence, where it is none."""
        if not re.fullmatch(REFERENCE, text):
            raise ValueError(
                "is no reference such as sha256:<64 digits>:640x480 or job:<id>:512x512: `submit_job`, the "
                "command line, prompt files and uploads make one of a picture"
            )
        kind, name, size = text.split(":")
        width, height = map(int, size.split("x"))
        if max(width, height) > MAX_INPUT_SIDE or width * height > MAX_INPUT_PIXELS:
            raise ValueError(too_many_pixels(width, height))
        return cls("job" if kind == "job" else "sha256", name, width, height)

    def encode(self) -> str:
        """The reference as text."""
        return f"{self.kind}:{self.id}:{self.width}x{self.height}"


def jobs_of(*references: object) -> tuple[str, ...]:
    """The ids of the jobs whose pictures are meant, each once; without what is no reference to one."""
    texts = [each for each in references if isinstance(each, str) and each.startswith("job:")]
    return tuple(dict.fromkeys(InputReference.parse(each).id for each in texts))


def too_many_pixels(width: int, height: int) -> str:
    """What is wrong with a picture of that size: the end of a sentence."""
    return (
        f"is {width}x{height}, the limits are {MAX_INPUT_PIXELS // 1_000_000} megapixels and "
        f"{MAX_INPUT_SIDE:,} a side: make it smaller"
    )
