"""Measures how long a picture takes to become a PNG, and how large it is, by zlib's level and strategy.

    python -m tests.benchmarks.encoding

Pictures of 1,024 px: a photo that comes with matplotlib, enlarged, with the fine grain that pictures of SDXL
have; smooth colours; and noise, the most that a PNG can be. Times are CPU milliseconds of one thread, the
least of some runs.
"""

from __future__ import annotations

import io
import time
import zlib

import click
import numpy as np
from matplotlib import cbook
from numpy.typing import NDArray
from PIL import Image

#: Standard deviation of the grain, of 255.
GRAIN = 2.0
STRATEGIES = {
    "default": -1,
    "filtered": zlib.Z_FILTERED,
    "run lengths": zlib.Z_RLE,
    "Huffman alone": zlib.Z_HUFFMAN_ONLY,
}


def pictures(side: int) -> dict[str, Image.Image]:
    """The pictures by name, `side` pixels wide and high."""
    noise = np.random.default_rng(1)
    photo = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    photo = photo.crop((0, 40, 512, 552)).resize((side, side), Image.Resampling.LANCZOS)
    rows, columns = np.mgrid[0:side, 0:side] / side
    smooth = np.stack([rows, columns, np.sin(6 * rows * columns) / 2 + 0.5], axis=-1) * 255
    grain = noise.normal(0, GRAIN, (side, side, 3))
    return {
        "photo with grain": _image(np.asarray(photo, dtype=float) + grain),
        "photo": photo,
        "smooth": _image(smooth),
        "noise": _image(noise.uniform(0, 255, (side, side, 3))),
    }


def _image(values: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def measured(image: Image.Image, level: int, strategy: int, times: int) -> tuple[float, int]:
    """CPU milliseconds, and bytes."""
    took = []
    for _ in range(times):
        file, began_s = io.BytesIO(), time.thread_time()
        image.save(file, "PNG", compress_level=level, compress_type=strategy)
        took.append(1e3 * (time.thread_time() - began_s))
    return min(took), len(file.getvalue())


@click.command(help=__doc__)
@click.option("--side", default=1_024, show_default=True, help="Pixels.")
@click.option("--times", default=3, show_default=True, help="Runs of each.")
def main(side: int, times: int) -> None:
    found = pictures(side)
    print(f"{'level, strategy':24}" + "".join(f"{name:>24}" for name in found))
    for strategy, number in STRATEGIES.items():
        for level in range(1, 10) if strategy == "default" else (1, 4, 6):
            cells = [measured(image, level, number, times) for image in found.values()]
            shown = "".join(f"{ms:14.0f} ms {size / 1024:5.0f} K" for ms, size in cells)
            print(f"{f'{level}, {strategy}':24}{shown}", flush=True)


if __name__ == "__main__":
    main()
