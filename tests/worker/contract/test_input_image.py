"""Pictures that jobs begin with: files of every kind are read as one means them, or refused with a remedy."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from worker.contract.input_image import BadInputError, mask_of_alpha, read_input, read_mask


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refusal(data: bytes) -> str:
    with pytest.raises(BadInputError) as caught:
        read_input(data)
    return str(caught.value)


def png(
    width: int, height: int, depth: int, colour: int, pixels: bytes, *chunks: tuple[bytes, bytes]
) -> bytes:
    """A PNG, written by hand."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in parts)


#: Four pixels, each of another colour.
CORNERS = Image.new("RGB", (2, 2))
CORNERS.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)])


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["PNG", "WEBP"]), st.integers(1, 40), st.integers(1, 40), st.binary(min_size=3))
def test_a_lossless_picture_is_read_as_it_is(kind: str, width: int, height: int, data: bytes) -> None:
    size = width * height * 3
    image = Image.frombytes("RGB", (width, height), (data * (size // len(data) + 1))[:size])
    found = read_input(file_of(image, kind, lossless=True))
    assert found.rgb.tobytes() == image.tobytes()
    assert (found.alpha, found.size, found.mime) == (None, image.size, f"image/{kind.lower()}")


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_turned_as_its_exif_says(kind: str, turn: int) -> None:
    """The pixels of each turn, by Exif 2.32, 4.6.4: which corner of the scene is row 0, column 0."""
    scene = Image.new("RGB", (32, 16), "white")
    scene.paste("black", (0, 0, 16, 8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = scene.transpose(undo[turn]) if turn > 1 else scene
    found = read_input(file_of(stored, kind, exif=exif)).rgb
    assert found.size == (32, 16)
    dark = [found.getpixel((x, y))[0] < 64 for x, y in ((4, 4), (28, 4), (4, 12), (28, 12))]  # type: ignore[index]
    assert dark == [True, False, False, False]


@settings(deadline=None, max_examples=40)
@given(st.binary(max_size=200))
@example(b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03")
def test_an_exif_that_cannot_be_read_turns_nothing(exif: bytes) -> None:
    found = read_input(file_of(CORNERS, exif=exif))
    assert found.rgb.tobytes() == CORNERS.tobytes() or found.size == (2, 2)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_become_rgb(mode: str) -> None:
    image = CORNERS.convert(mode)
    assert read_input(file_of(image)).rgb.tobytes() == image.convert("RGB").tobytes()


def test_16_bits_become_8_by_the_upper_ones() -> None:
    grey = png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 0x1234, 0xFF00))
    assert [*read_input(grey).rgb.tobytes()] == [0x12] * 3 + [0xFF] * 3
    colour = png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 0x10FF, 0x20FF, 0x30FF))
    assert [*read_input(colour).rgb.tobytes()] == [0x10, 0x20, 0x30]
    clear = png(1, 1, 16, 4, b"\0" + struct.pack(">HH", 0x8000, 0x40FF))
    assert read_input(clear).alpha.tobytes() == b"\x40"  # type: ignore[union-attr]


def test_a_cmyk_jpeg_becomes_rgb() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = read_input(file_of(image, "JPEG", quality=100)).rgb.getpixel((8, 8))  # type: ignore[misc]
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_is_transparent_lies_on_white_and_is_the_alpha(kind: str) -> None:
    image = Image.new("RGBA", (2, 1))
    image.putdata([(10, 20, 30, 255), (10, 20, 30, 0)])
    found = read_input(file_of(image, kind, lossless=True))
    assert [*found.rgb.tobytes()] == [10, 20, 30, 255, 255, 255]
    assert [*found.alpha.tobytes()] == [255, 0]  # type: ignore[union-attr]
    assert [*mask_of_alpha(found).tobytes()] == [0, 255]


def test_a_colour_of_a_palette_may_be_the_transparent_one() -> None:
    image = CORNERS.convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    index = image.getpixel((0, 0))
    found = read_input(file_of(image, transparency=index))
    assert [*found.alpha.tobytes()] == [0, 255, 255, 255]  # type: ignore[union-attr]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_grey_of_a_png_may_be_the_transparent_one(depth: int) -> None:
    """PNG, 11.3.1.1: of its two bytes, which are in the file's greys, the lower bits count."""
    most = (1 << depth) - 1
    for grey in {0, 1, most // 2, most}:
        row = bytes([0, *(grey << shift for shift in (8 - depth,))])  # The first pixel; a second one is 0.
        row += b"\0" * (depth == 8)
        data = png(2, 1, depth, 0, row, (b"tRNS", struct.pack(">H", 0x100 + grey if depth > 1 else grey)))
        found = read_input(data)
        assert found.cut_out is not None
        assert [*found.cut_out.getchannel("A").tobytes()] == [0, 255 if grey else 0], grey
        assert found.cut_out.getpixel((0, 0)) == (*[grey * 255 // most] * 3, 0)


@pytest.mark.parametrize("colour", [0, 2])
def test_a_transparent_colour_of_16_bits_is_refused_with_a_remedy(colour: int) -> None:
    value = struct.pack(">H", 0x1234) * (1 + colour)
    data = png(1, 1, 16, colour, b"\0" + value, (b"tRNS", value))
    assert refusal(data) == "has 16 bits and a transparent colour: save it with 8 bits, or an alpha channel"


def test_an_alpha_channel_in_which_all_is_opaque_is_none() -> None:
    found = read_input(file_of(CORNERS.convert("RGBA")))
    assert found.alpha is None
    with pytest.raises(BadInputError, match="is alpha, and no pixel of the image is transparent"):
        mask_of_alpha(found)


def test_an_alpha_channel_in_which_nothing_is_kept_is_no_mask() -> None:
    with pytest.raises(BadInputError, match="is alpha, and every pixel of the image is transparent"):
        mask_of_alpha(read_input(file_of(Image.new("RGBA", (2, 2)))))
    hardly = Image.new("RGBA", (2, 2), (0, 0, 0, 1))
    assert mask_of_alpha(read_input(file_of(hardly))).getextrema() == (254, 254)


@pytest.mark.parametrize("light", [1, 127, 128, 255])
def test_a_mask_that_draws_nothing_is_none(light: int) -> None:
    """A pixel is drawn from 128 on."""
    mask, image = Image.new("L", (2, 1)), Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    mask.putpixel((1, 0), light)
    image.putpixel((1, 0), (0, 0, 0, 255 - light))
    if light >= 128:
        assert read_mask(file_of(mask)).tobytes() == mask_of_alpha(read_input(file_of(image))).tobytes()
        return
    with pytest.raises(BadInputError, match="is nowhere as light as 128 of 255, so that nothing"):
        read_mask(file_of(mask))
    with pytest.raises(BadInputError, match="is alpha, and no pixel of the image is transparent by half"):
        mask_of_alpha(read_input(file_of(image)))


def test_a_mask_is_grey_and_says_something() -> None:
    mask = Image.new("L", (2, 1))
    mask.putdata([0, 255])
    assert [*read_mask(file_of(mask)).tobytes()] == [0, 255]
    with pytest.raises(BadInputError, match="is black everywhere"):
        read_mask(file_of(Image.new("L", (2, 2))))
    with pytest.raises(BadInputError, match="is transparent in places: make it white"):
        read_mask(file_of(Image.new("RGBA", (2, 2))))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty: give a PNG, JPEG or WebP"),
        (file_of(CORNERS, "GIF"), "is a GIF: give a PNG"),
        (file_of(CORNERS, "BMP"), "is a BMP: give"),
        (file_of(CORNERS, "TIFF"), "is a TIFF or a raw photo: give"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "is an AVIF: give"),
        (b"\0\0\0\x1cftypheic\0\0\0\0", "is a HEIC: give"),
        (b" \n<svg xmlns='x'/>", "is an SVG: give"),
        (b"<!DOCTYPE html>", "is a web page: give"),
        (b"a small cat", "is no picture that is read: give a PNG, JPEG or WebP"),
        (b"\x89PNG\r\n\x1a\n", "is "),
    ],
)
def test_other_kinds_are_refused_by_their_name(data: bytes, sentence: str) -> None:
    assert refusal(data).startswith(sentence)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:])
    assert refusal(data) == "is animated (3 frames): save the frame that is meant"


def test_a_jpeg_with_further_pictures_behind_it_is_its_first_one() -> None:
    """Phones put depth maps and previews there: Multi-Picture Format, CIPA DC-007."""
    data = file_of(CORNERS.resize((16, 16)), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert (read_input(data).size, read_input(data).mime) == ((16, 16), "image/jpeg")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused_and_never_half_a_picture(kind: str, share: float) -> None:
    whole = file_of(Image.effect_noise((64, 64), 90).convert("RGB"), kind)
    assert refusal(whole[: int(len(whole) * share)]).endswith("save it again")


@settings(deadline=None, max_examples=120)
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.data())
def test_a_damaged_file_is_a_picture_or_refused_and_raises_nothing_else(
    kind: str, data: st.DataObject
) -> None:
    damaged = bytearray(file_of(CORNERS.resize((24, 24)), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadInputError):
        read_input(bytes(damaged))


def test_bombs_are_refused_before_they_are_unpacked() -> None:
    """Files of a few kilobytes that would be gigabytes: only their heads are read."""
    assert refusal(png(30_000, 30_000, 8, 2, b"\0" * 1_000)).startswith("has far more pixels than the limit")
    assert refusal(png(8_001, 8_000, 8, 2, b"\0")).startswith("is 8001x8000, the limits are 64 megapixels")
    assert refusal(png(40_000, 1, 1, 0, b"\0")).startswith("is 40000x1, the limits are")
    texts = [(b"zTXt", b"x\0\0" + zlib.compress(b" " * 5_000_000)) for _ in range(3)]
    assert "is damaged" in refusal(png(1, 1, 8, 0, b"\0\0", *texts))
    profile = (b"iCCP", b"x\0\0" + zlib.compress(b" " * 5_000_000))
    assert "is damaged" in refusal(png(1, 1, 8, 0, b"\0\0", profile))


def test_a_file_of_too_many_bytes_is_refused_by_their_number_alone() -> None:
    assert refusal(bytes(50_000_001)) == "is 50.0 MB, the limit is 50 MB: make it smaller"


def test_a_jpeg_of_many_passes_is_refused() -> None:
    """Each pass goes over the whole picture, and takes ten bytes of the file."""
    data = file_of(CORNERS.resize((64, 64)), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    assert "is a JPEG of" in refusal(data[:-2] + scan * 100 + data[-2:])
    assert read_input(data).size == (64, 64)
