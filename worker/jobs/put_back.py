"""A job's image put back into what was drawn of it, or what was drawn put into the image.

a mask                   the image's own pixels where it is black, both mixed at its edge
`padding`                as diffusers' `padding_mask_crop`: the picture is the image, as large as it is, in
                         which the drawn part lies where the mask is white
`preserve_unmasked` no   without `padding` nothing is put back; with it the edge is the mask's own
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps

from worker.contract.input_reference import ALPHA
from worker.contract.job import Job
from worker.engine.runner import Picture
from worker.storage.input_pixels import InputPixels, Part, unpacked
from worker.storage.masked_region import Region, fitted

#: Pixels that are mixed at once: Pillow keeps Python's lock while it does, 1 ms for so many, for which the
#: thread of the steps waits.
BAND = 2**18


def put_back(job: Job, inputs: InputPixels | None, picture: Picture) -> Picture:
    """The finished picture of a job: `picture` is what was drawn, at the job's size.

    One that the safety checker blacked out stays black; with `padding` its part does.
    """
    if inputs is None or inputs.mask is None:
        return picture
    if inputs.part is not None:
        return Picture(_into_image(job, inputs.part, Image.fromarray(picture.pixels)), picture.nsfw)
    if picture.nsfw or not job.preserve_unmasked:
        return picture
    image = Image.frombytes("RGB", inputs.size, inputs.rgb)
    mask = Image.frombytes("L", inputs.size, inputs.mask)
    mixed = _mixed(job, image, mask, _edge(job, mask), Image.fromarray(picture.pixels))
    return Picture(np.asarray(mixed), picture.nsfw)


def _into_image(job: Job, part: Part, drawn: Image.Image) -> np.ndarray:
    """The whole image, (height, width, 3), with what was drawn of a part of it."""
    region = part.region
    whole = unpacked(job, part.files)
    image, mask = whole.image.rgb, whole.mask
    assert mask is not None  # noqa: S101 - a part is of a mask
    own = mask.crop(region)
    edge = _edge_within(job, mask, region) if job.preserve_unmasked else own
    mixed = _mixed(job, image.crop(region), own, edge, fitted(drawn, region.size))
    image.paste(mixed, region)
    return np.asarray(image)


def _mixed(
    job: Job, image: Image.Image, mask: Image.Image, edge: Image.Image, drawn: Image.Image
) -> Image.Image:
    """`drawn` where the mask is white, `image` where it is black, and both between: all of one size.

    `edge`: the mask as it counts. With the mask `alpha` the image lies on what was drawn, as its alpha
    channel says.
    """
    if job.mask == ALPHA and job.preserve_unmasked:
        # The image lies on white, which the drawn pixels take the place of.
        share = np.asarray(mask, np.float32)[..., None] / 255.0
        pixels = np.asarray(image, np.float32) + share * (np.asarray(drawn, np.float32) - 255.0)
        return Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8))
    mixed = Image.new("RGB", image.size)
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        band = 0, top, image.width, min(top + rows, image.height)
        mixed.paste(_overlaid(image.crop(band), edge.crop(band), drawn.crop(band)), band)
    return mixed


def _overlaid(image: Image.Image, edge: Image.Image, drawn: Image.Image) -> Image.Image:
    """`drawn` where `edge` is white: as `VaeImageProcessor.apply_overlay` does, with its rounding."""
    kept = Image.new("RGBa", image.size)
    kept.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(edge))
    below = drawn.convert("RGBA")
    below.alpha_composite(kept.convert("RGBA"))
    return below.convert("RGB")


def _edge(job: Job, mask: Image.Image) -> Image.Image:
    """A mask with its edge blurred inwards: where it is black, nothing is drawn."""
    return ImageChops.darker(mask, mask.filter(ImageFilter.GaussianBlur(job.mask_blur)))


def _edge_within(job: Job, mask: Image.Image, region: Region) -> Image.Image:
    """The part of `_edge` in a region, of which no more is blurred than it takes."""
    reach = 4 * job.mask_blur
    left, top = max(region.left - reach, 0), max(region.top - reach, 0)
    right, bottom = min(region.right + reach, mask.width), min(region.bottom + reach, mask.height)
    wider = _edge(job, mask.crop((left, top, right, bottom)))
    width, height = region.size
    return wider.crop(
        (region.left - left, region.top - top, region.left - left + width, region.top - top + height)
    )
