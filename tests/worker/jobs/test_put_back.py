"""The image of a job put back into what was drawn of it, and what was drawn put into the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.inputs_in_memory import InputsInMemory
from worker.contract.errors import InputError
from worker.contract.job import Job
from worker.engine.runner import Picture
from worker.jobs.put_back import put_back
from worker.storage.input_pixels import PUT_BACK, InputPixels, read_pixels

SIDE = 64
Pixels = NDArray[np.uint8]


def begun(image: Image.Image, mask: Image.Image | None = None, **fields: Any) -> tuple[Job, InputPixels]:
    """A job of 64 x 64 px with a mask, its alpha channel where none is given, and what it begins with."""
    files = InputsInMemory()
    wanted = {"image": files.put(image), "mask": files.put(mask) if mask else "alpha"}
    job = Job.parse({"prompt": "x", "seed": 1, "width": SIDE, "height": SIDE, **wanted, **fields})
    return job, read_pixels(files, job)


def finished(job: Job, inputs: InputPixels, drawn: Any, nsfw: bool | None = None) -> Pixels:
    """The picture of a job that was drawn in one colour."""
    return put_back(job, inputs, Picture(np.full((SIDE, SIDE, 3), drawn, np.uint8), nsfw)).pixels


def masked(size: tuple[int, int], *boxes: tuple[int, int, int, int], value: int = 255) -> Image.Image:
    mask = Image.new("L", size)
    for box in boxes:
        mask.paste(value, box)
    return mask


def photo(size: tuple[int, int]) -> Image.Image:
    across, down = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return Image.fromarray(np.stack([across % 256, down % 256, across * down % 256], -1).astype(np.uint8))


def test_a_kept_pixel_is_the_images_own() -> None:
    image = photo((SIDE, SIDE))
    mask = masked(image.size, (16, 8, 64, 48), value=100)
    mask.paste(255, (24, 16, 60, 40))
    pixels = finished(*begun(image, mask), 255)
    black = np.asarray(mask) == 0
    assert np.array_equal(pixels[black], np.asarray(image)[black])
    assert not np.array_equal(pixels[~black], np.asarray(image)[~black])


def test_a_note_says_that_pixels_are_kept_where_some_are_and_that_jpeg_changes_them() -> None:
    image = photo((SIDE, SIDE))
    part, all_ = masked(image.size, (16, 8, 64, 48)), masked(image.size, (0, 0, SIDE, SIDE))
    assert begun(image, part)[1].warnings == (PUT_BACK,)
    assert begun(image, part, preserve_unmasked=False)[1].warnings == ()
    assert begun(image, all_)[1].warnings == ()
    [note] = begun(image, part, format="jpeg")[1].warnings
    assert note == f"{PUT_BACK} JPEG changes them a little: png and webp do not."


@pytest.mark.parametrize("padding", [None, 0, 8])
@pytest.mark.parametrize("blur", [0, 4])
def test_the_edge_is_mixed_within_the_mask(blur: int, padding: int | None) -> None:
    mask = masked((SIDE, SIDE), (32, 0, 64, 64))
    row = finished(*begun(Image.new("RGB", mask.size), mask, mask_blur=blur, padding=padding), 255)[32, :, 0]
    assert not row[:32].any()
    assert row[63] == 255
    assert (row[32] == 255) == (blur == 0)
    assert (np.diff(row[32:].astype(int)) >= 0).all()


def test_the_edge_of_a_part_is_that_of_the_whole_mask() -> None:
    """Without pixels beside it, the part's own border is an edge as well."""
    mask = masked((256, 256), (100, 60, 164, 124))
    job, inputs = begun(Image.new("RGB", mask.size), mask, padding=0)
    assert inputs.part is not None
    assert inputs.part.region == (100, 60, 164, 124)
    pixels = finished(job, inputs, 255)
    assert 0 < pixels[60, 132, 0] < 255
    assert np.array_equal(pixels[60:124, 100:164], pixels[60:124, 100:164][::-1, ::-1])


@pytest.mark.parametrize("padding", [None, 0, 4])
def test_an_image_with_alpha_lies_on_the_picture(padding: int | None) -> None:
    """Of a red cut-out, which is half transparent in its last row, on what was drawn blue."""
    image = Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 255))
    image.paste((255, 0, 0, 0), (0, 0, SIDE, 32))
    image.paste((255, 0, 0, 127), (0, 63, SIDE, 64))
    pixels = finished(*begun(image, padding=padding), (0, 0, 255))
    assert (pixels[:32] == (0, 0, 255)).all()
    assert (pixels[32:-1] == (255, 0, 0)).all()
    assert np.abs(pixels[-1].astype(int) - (127, 0, 128)).max() <= 1


def test_an_image_of_several_bands_is_mixed_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    image, mask = photo((200, 90)), masked((200, 90), (10, 20, 150, 80), value=150)
    job, inputs = begun(image, mask, padding=9)
    whole = finished(job, inputs, (1, 100, 250))
    monkeypatch.setattr("worker.jobs.put_back.BAND", 1_000)
    assert np.array_equal(finished(job, inputs, (1, 100, 250)), whole)


def test_without_preserve_unmasked_nothing_is_put_back() -> None:
    job, inputs = begun(photo((SIDE, SIDE)), masked((SIDE, SIDE), (0, 0, 32, 64)), preserve_unmasked=False)
    assert inputs.warnings == ()
    assert (finished(job, inputs, 7) == 7).all()


def test_what_the_safety_checker_blacked_out_stays_black() -> None:
    image, mask = photo((SIDE, SIDE)), masked((SIDE, SIDE), (0, 0, 32, 64))
    assert not finished(*begun(image, mask), 0, nsfw=True).any()
    pixels = finished(*begun(image, mask, padding=0, mask_blur=0), 0, nsfw=True)
    assert not pixels[:, :32].any()
    assert np.array_equal(pixels[:, 32:], np.asarray(image)[:, 32:])


def test_what_was_drawn_of_a_part_lies_in_the_image_as_large_as_it_is() -> None:
    image, mask = photo((400, 300)), masked((400, 300), (300, 200, 340, 220))
    job, inputs = begun(image, mask, padding=12, mask_blur=0)
    assert inputs.part is not None
    assert inputs.part.region == (288, 178, 352, 242), "64 x 44 px, made as high as it is wide"
    assert inputs.warnings == (
        (
            "The part of the image from 288,178 to 352,242 px was drawn at 64x64 and put back. The picture "
            "has the image's size, 400x300."
        ),
    )
    pixels = finished(job, inputs, (1, 2, 3))
    assert (pixels[200:220, 300:340] == (1, 2, 3)).all()
    black = np.asarray(mask) == 0
    assert np.array_equal(pixels[black], np.asarray(image)[black])
    assert job.picture_size == (400, 300)


def test_a_part_that_is_larger_than_the_job_is_enlarged_and_that_is_said() -> None:
    _, inputs = begun(photo((400, 300)), masked((400, 300), (0, 0, 400, 300)), padding=0)
    assert inputs.warnings[0].startswith(
        "The part of the image from 0,0 to 400,300 px was drawn at 64x64 and enlarged and put back: a larger "
        "width and height make it sharper."
    )


def test_a_mask_of_another_resolution_is_as_large_as_the_image_first() -> None:
    _, inputs = begun(photo((200, 100)), masked((100, 50), (50, 20, 60, 40), value=255), padding=10)
    assert inputs.part is not None
    left, top, right, bottom = inputs.part.region
    assert left <= 90
    assert right >= 130
    assert top <= 30
    assert bottom >= 90


def test_a_mask_that_is_black_at_the_images_size_is_refused() -> None:
    mask = Image.new("L", (2_000, 2_000))
    mask.putpixel((7, 7), 255)
    with pytest.raises(InputError, match="mask is white in too few pixels: make its white part larger"):
        begun(photo((20, 20)), mask, padding=0)


@pytest.mark.parametrize("size", [(2, 3_000), (30_000, 1), (1, 30_000), (1, 1)])
def test_a_part_of_any_proportions_is_drawn_and_put_back(size: tuple[int, int]) -> None:
    image = photo(size)
    pixels = finished(*begun(image, Image.new("L", size, 255), padding=3, mask_blur=0), 9)
    assert pixels.shape == (size[1], size[0], 3)
    assert (pixels == 9).all()


@pytest.mark.parametrize("padding", [None, 0])
def test_whether_a_part_of_the_image_is_kept(padding: int | None) -> None:
    size = (80, 64)
    for mask, is_kept in ((Image.new("L", size, 255), False), (masked(size, (0, 0, 79, 64)), True)):
        for preserve in (True, False):
            _, inputs = begun(photo(size), mask, padding=padding, preserve_unmasked=preserve)
            assert inputs.keeps_a_part == is_kept
