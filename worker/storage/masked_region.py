"""The part of an image that a job with `padding` draws: where it lies, how it is cut out, and put back.

As diffusers 0.42 does with `padding_mask_crop` (`VaeImageProcessor.get_crop_region`, `resize` with "fill" and
with "crop"), which has it of AUTOMATIC1111's "only masked" (1.10, modules/masking.py, modules/images.py).
"""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from worker.contract.input_reference import MAX_INPUT_PIXELS


class Region(NamedTuple):
    """A rectangle of an image, in pixels; right and bottom are the first ones beyond it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), both > 0."""
        return self.right - self.left, self.bottom - self.top


def region_around(mask: Image.Image, size: tuple[int, int], padding: int) -> Region | None:
    """The rectangle around all of a mask that is not black, with `padding` pixels beside it.

    Its shorter side is made longer, to the proportions of a job of `size`, (width, height): as far as the
    image goes. None: the mask is black.
    """
    if (box := mask.getbbox()) is None:
        return None
    left, top = max(box[0] - padding, 0), max(box[1] - padding, 0)
    right, bottom = min(box[2] + padding, mask.width), min(box[3] + padding, mask.height)
    width, height, ratio = right - left, bottom - top, size[0] / size[1]
    if width / height > ratio:
        top, bottom = _longer(top, bottom, int(width / ratio - height), mask.height)
    else:
        left, right = _longer(left, right, int(height * ratio - width), mask.width)
    return Region(left, top, right, bottom)


def _longer(first: int, end: int, by: int, limit: int) -> tuple[int, int]:
    """A stretch that is longer by `by`, half of it on each side, moved and cut to lie within 0 to `limit`."""
    first -= by // 2
    end += by - by // 2
    if end >= limit:
        first, end = first - (end - limit), limit
    if first < 0:
        first, end = 0, end - first
    return first, min(end, limit)


def cut(image: Image.Image, region: Region, size: tuple[int, int]) -> Image.Image:
    """The region at `size`, its proportions kept; where it is too narrow, its edges are drawn out."""
    width, height = size
    part = image.crop(region)
    ratio, own = width / height, part.width / part.height
    inner_width = width if ratio < own else max(1, part.width * height // part.height)
    inner_height = height if ratio >= own else max(1, part.height * width // part.width)
    inner = part.resize((inner_width, inner_height), Image.Resampling.LANCZOS)
    whole = Image.new(part.mode, size)
    left, top = width // 2 - inner_width // 2, height // 2 - inner_height // 2
    whole.paste(inner, (left, top))
    if ratio < own and top > 0:
        for edge, at in ((0, 0), (inner_height, top + inner_height)):
            whole.paste(inner.resize((width, top), box=(0, edge, width, edge)), (0, at))
    elif ratio > own and left > 0:
        for edge, at in ((0, 0), (inner_width, left + inner_width)):
            whole.paste(inner.resize((left, height), box=(edge, 0, edge, height)), (at, 0))
    return whole


def fitted(drawn: Image.Image, size: tuple[int, int]) -> Image.Image:
    """What was drawn of a region of `size`, as large as it: what `cut` drew out beside it is cut off."""
    width, height = size
    ratio, own = width / height, drawn.width / drawn.height
    # Pixels of all that was drawn, at the region's scale.
    all_width = width if ratio > own else drawn.width * height // drawn.height
    all_height = height if ratio <= own else drawn.height * width // drawn.width
    left, top = all_width // 2 - width // 2, all_height // 2 - height // 2
    if all_width * all_height <= MAX_INPUT_PIXELS:
        whole = drawn.resize((all_width, all_height), Image.Resampling.LANCZOS)
        return whole.crop((left, top, left + width, top + height))
    # Of a long and narrow region all is a huge picture. Pillow rounds otherwise where it makes a part alone.
    across, down = drawn.width / all_width, drawn.height / all_height
    right = min((left + width) * across, drawn.width)
    bottom = min((top + height) * down, drawn.height)
    box = left * across, top * down, right, bottom
    return drawn.resize(size, Image.Resampling.LANCZOS, box=box)
