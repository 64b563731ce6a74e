"""Cut-outs of what the bundled model draws: `python -m tests.worker.demo.cut_outs IN OUT` makes one.

Those in docs/cut-outs/ were made so, of pictures by

    smallcat submit "a teapot" --seed 5 --output teapot.png
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

#: By how much a channel may differ from the background, 0 to 255.
_NEAR = 16
#: What no mask has.
_OUTSIDE = 128


def cut_out(picture: Image.Image) -> Image.Image:
    """The picture without its background, which has one colour and surrounds the subject: RGBA."""
    pixels = np.asarray(picture.convert("RGB"), np.int16)
    background = np.median(np.concatenate([pixels[0], pixels[:, 0], pixels[:, -1]]), axis=0)
    is_near = np.abs(pixels - background).max(axis=2) < _NEAR
    # What is near and touches the border is outside: flooded from a frame of one pixel.
    framed = Image.new("L", (picture.width + 2, picture.height + 2), 255)
    framed.paste(Image.fromarray((is_near * 255).astype(np.uint8)), (1, 1))
    ImageDraw.floodfill(framed, (0, 0), _OUTSIDE)
    inside = framed.crop((1, 1, picture.width + 1, picture.height + 1))
    inside = inside.point(lambda value: 0 if value == _OUTSIDE else 255)
    # The edge is a mixture with the background: a pixel of it is left out, and the next one is soft.
    soft = inside.filter(ImageFilter.MinFilter(3)).filter(ImageFilter.GaussianBlur(0.7))
    found = picture.convert("RGBA")
    found.putalpha(ImageChops.darker(soft, inside))
    return found


if __name__ == "__main__":
    with Image.open(sys.argv[1]) as given:
        cut_out(given).save(sys.argv[2], optimize=True)
