"""Jobs that draw only the masked part of an image, against diffusers' `padding_mask_crop`, on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.inputs_in_memory import InputsInMemory
from tests.worker.device.test_beginnings import A_FEW, SIDE, Model, a_job, models, of_image, of_mask
from worker.contract.job import Job
from worker.engine.runner import JobInputs, Picture
from worker.jobs.input_arrays import arrays_of
from worker.jobs.put_back import put_back
from worker.storage.input_pixels import InputPixels, read_pixels
from worker.storage.masked_region import cut, fitted, region_around

__all__ = ["models"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]

#: The size of an image, and what of it is masked: (left, top, right, bottom).
PARTS = {
    "in the middle": ((200, 150), (90, 60, 130, 100)),
    "in a corner": ((200, 150), (180, 0, 200, 11)),
    "wide, and the image too low for it": ((200, 40), (20, 10, 170, 30)),
    "high, and the image too narrow for it": ((50, 200), (0, 3, 44, 190)),
    "all": ((100, 100), (0, 0, 100, 100)),
    "all of a wide image": ((160, 70), (0, 0, 160, 70)),
    "small": ((1_000, 700), (400, 300, 412, 309)),
}


def photo(size: tuple[int, int]) -> Image.Image:
    across, down = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    channels = [across * 2 % 256, down * 3 % 256, (across + down) % 256]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def masked(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """White in the box, with an edge that is neither."""
    mask = Image.new("L", size)
    mask.paste(70, box)
    left, top, right, bottom = box
    mask.paste(255, (left + 2, top + 2, right, bottom))
    return mask


class Case:
    """A job that draws a part of an image."""

    def __init__(self, part: str, **fields: Any) -> None:
        size, box = PARTS[part]
        self.image, self.mask = photo(size), masked(size, box)
        files = InputsInMemory()
        references = {"image": files.put(self.image), "mask": files.put(self.mask)}
        self.job = of_mask(**references, **{"padding": 8, **fields})
        self.inputs: InputPixels = read_pixels(files, self.job)

    def check(self, model: Model, picture: Picture) -> None:
        """It is what diffusers gives, within 1 of 255."""
        found = put_back(self.job, self.inputs, picture).pixels
        expected = model.expected(self.job, self.image, self.mask)
        assert found.shape == expected.shape == (self.image.height, self.image.width, 3)
        difference = np.abs(found.astype(int) - expected.astype(int)).max()
        assert difference <= 1, f"{self.job!r} is off by {difference}"


def check(model: Model, *cases: Case, mates: tuple[Job, ...] = ()) -> None:
    """The pictures of cases that share their steps with `mates`."""
    inputs: list[JobInputs | None] = [arrays_of(case.inputs) for case in cases]
    image = JobInputs(np.asarray(photo((SIDE, SIDE))))
    inputs += [image if mate.image else None for mate in mates]
    pictures = model.together([*(case.job for case in cases), *mates], inputs)
    for case, picture in zip(cases, pictures, strict=False):
        case.check(model, picture)


def test_equal_to_diffusers_beside_other_jobs(models: Any) -> None:
    cases = [
        Case("in the middle", steps=3),
        Case("wide, and the image too low for it", steps=3, strength=1.0, seed=8),
    ]
    check(models("sd1"), *cases, mates=(a_job(seed=9, steps=3), of_image(steps=3)))


def test_equal_to_diffusers_with_xl(models: Any) -> None:
    check(models("sdxl"), Case("in a corner", steps=2, width=128, padding=0))


def test_equal_to_diffusers_with_a_model_made_for_inpainting(models: Any) -> None:
    """Its UNet sees the mask of the part, and the part without what is drawn."""
    cases = [
        Case("in the middle", steps=3),
        Case("wide, and the image too low for it", steps=3, strength=1.0, seed=8),
    ]
    check(models("sd1 for inpainting"), *cases, mates=(a_job(seed=9, steps=3), of_image(steps=3)))
    check(models("sdxl for inpainting"), Case("in a corner", steps=2, width=128, padding=0))


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["sd1", "v", "sdxl", "sd1 for inpainting", "sdxl for inpainting"])
def test_equal_to_diffusers_with_every_part(models: Any, name: str, part: str) -> None:
    # With 256 px beside them small parts are less than a latent.
    for padding in (0, 5, 32) if part in ("small", "in a corner") else (0, 5, 32, 256):
        for width, height in ((SIDE, SIDE), (128, SIDE), (SIDE, 96)):
            check(models(name), Case(part, padding=padding, width=width, height=height, steps=3))
    alone = [Case(part, scheduler=scheduler, strength=0.6) for scheduler in A_FEW]
    for case in alone:
        check(models(name), case)
    check(models(name), *alone, mates=(a_job(), of_image(scheduler="heun")))


def test_a_sharp_edge_is_diffusers_own_also_where_the_images_pixels_are_preserved(models: Any) -> None:
    """Its overlay is the mask itself."""
    pictures = []
    for fields in ({"preserve_unmasked": False}, {"preserve_unmasked": True, "mask_blur": 0}):
        case = Case("in a corner", **fields)
        drawn = Picture(np.full((SIDE, SIDE, 3), 200, np.uint8))
        pictures.append(put_back(case.job, case.inputs, drawn).pixels)
    assert np.array_equal(*pictures)


SIDES = st.integers(1, 300)


@settings(max_examples=40, deadline=None)
@given(st.tuples(SIDES, SIDES), st.data(), st.integers(0, 40))
def test_a_part_is_cut_and_put_back_as_diffusers_does(
    size: tuple[int, int], data: st.DataObject, padding: int
) -> None:
    left, top = (data.draw(st.integers(0, side - 1)) for side in size)
    right, bottom = data.draw(st.integers(left + 1, size[0])), data.draw(st.integers(top + 1, size[1]))
    of_job = data.draw(st.sampled_from([(64, 64), (128, 64), (64, 200), (72, 80)]))
    image, mask = photo(size), Image.new("L", size)
    mask.paste(1, (left, top, right, bottom))
    theirs = VaeImageProcessor()
    region = region_around(mask, of_job, padding)
    assert region == theirs.get_crop_region(mask, *of_job, pad=padding)
    own, ratio = region.size[0] / region.size[1], of_job[0] / of_job[1]
    if not 1 / 30 < own / ratio < 30:
        return  # There diffusers has pictures without a pixel.
    expected = theirs.resize(image.crop(region), *of_job[::-1], resize_mode="fill")
    assert np.array_equal(cut(image, region, of_job), expected)
    drawn = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*of_job[::-1], 3), np.uint8))
    back = theirs.resize(drawn, *region.size[::-1], resize_mode="crop")
    assert np.array_equal(fitted(drawn, region.size), back)
