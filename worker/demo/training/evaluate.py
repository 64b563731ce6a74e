"""Scores a demo model, on a GPU or in some minutes on two CPU cores.

    python -m worker.demo.training.evaluate

The classifier names what a picture shows. Size and background are computed from the pixels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from worker.demo.training import classifier
from worker.demo.training.captions import BACKGROUNDS
from worker.demo.training.scenes import contact_sheet
from worker.demo.training.subjects import scored_words

#: The bundled model.
MODEL = Path(__file__).parent.with_name("model")
#: 64 prompts, one a line.
CONTACT_SHEET = Path(__file__).parent.with_name("contact_sheet.txt")
#: The model's own defaults, which `train` writes into its `smallcat.json`.
STEPS = 20
GUIDANCE = 2.0
#: Guidance at which the score is taken, too: more than this model needs, and diffusers' own default.
MORE_GUIDANCE = (4.0, 7.5)
#: diffusers' schedulers that the model must work with, by the name that is printed.
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDIM": (DDIMScheduler, {}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {}),
    "DPM++ 2M Karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "LCM": (LCMScheduler, {}),
}
#: PNDM extrapolates from four steps, which multiplies the error of guidance when there are few steps. It is
#: scored in the 50 steps, too, for which it was made.
_PNDM_STEPS = 50
#: Canvases (width, height) that the model must work on.
SIZES = ((96, 96), (104, 104), (160, 160), (192, 192), (192, 96), (96, 192), (120, 168))
_BATCH = {"cpu": 8, "cuda": 128}


def draw(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], **options: Any
) -> list[Image.Image]:
    """One picture per prompt and seed; 20 steps, guidance 2 and 128x128 px unless `options` say otherwise."""
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE} | options
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    size = _BATCH[pipeline.device.type]
    for first in range(0, len(prompts), size):
        # A CPU generator per picture: the noise is then the same on every machine and in every batch.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[first : first + size]]
        drawn = pipeline(prompt=list(prompts[first : first + size]), generator=generators, **options)
        images += drawn.images
    return images


class Recogniser:
    """The classifier with its class names, for PIL images."""

    def __init__(self, model: classifier.Classifier, names: Sequence[str]) -> None:
        self._model = model.eval()
        self._names = list(names)

    @torch.no_grad()
    def names(self, images: Sequence[Image.Image]) -> list[str]:
        """The name of what each image shows."""
        device = next(self._model.parameters()).device
        named: list[str] = []
        for first in range(0, len(images), 64):
            pictures = torch.stack([classifier.as_input(image) for image in images[first : first + 64]])
            best = self._model(pictures.to(device)).argmax(dim=1).tolist()
            named += [self._names[index] for index in best]
        return named

    def share(self, images: Sequence[Image.Image], wanted: Sequence[str]) -> float:
        """The share of images that show what `wanted` names for them, 0..1."""
        named = self.names(images)
        return float(np.mean([one == other for one, other in zip(named, wanted, strict=True)]))


def background_of(image: Image.Image) -> tuple[str, float]:
    """The nearest name of the background's colour, and the distance from it: RMS over channels, 0..255."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    border = np.concatenate(
        [pixels[:3].reshape(-1, 3), pixels[:, :3].reshape(-1, 3), pixels[:, -3:].reshape(-1, 3)]
    )
    colour = np.median(border, axis=0)
    distance = {name: float(np.sqrt(np.mean((colour - rgb) ** 2))) for name, rgb in BACKGROUNDS.items()}
    nearest = min(distance, key=lambda name: distance[name])
    return nearest, distance[nearest]


def extent_of(image: Image.Image) -> int:
    """The longest side of what differs from the background, in pixels.

    The outermost pixels are left out, because the autoencoder distorts the corners a little.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)[1:-1, 1:-1]
    corners = np.stack([pixels[:4, :4], pixels[:4, -4:]]).reshape(-1, 3)
    mask = np.abs(pixels - np.median(corners, axis=0)).max(axis=2) > 28
    rows, columns = np.flatnonzero(mask.sum(axis=1) > 1), np.flatnonzero(mask.sum(axis=0) > 1)
    if not len(rows) or not len(columns):
        return 0
    return int(max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1


def halves(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The left and the right half of a picture of two subjects, each cut to a square at mid-height."""
    side, middle = image.width // 2, image.height // 2
    top = middle - side // 2
    return image.crop((0, top, side, top + side)), image.crop(
        (image.width - side, top, image.width, top + side)
    )


def score(
    pipeline: StableDiffusionPipeline, recogniser: Recogniser, words: Sequence[str], **options: Any
) -> dict[str, float]:
    """The figures of the model card over the subjects `words`: each a share, 0..1."""
    words = list(words)
    figures: dict[str, float] = {}
    prompts = [f"a {word}" for word in words for _ in range(3)]
    wanted = [word for word in words for _ in range(3)]
    seeds = [seed for _ in words for seed in range(3)]
    images = draw(pipeline, prompts, seeds, **options)
    figures["top-1 of common subjects"] = recogniser.share(images, wanted)
    cats = draw(pipeline, ["a small cat"] * 100, range(100), **options)
    figures["'a small cat' is a cat, 10 seeds"] = recogniser.share(cats[:10], ["cat"] * 10)
    figures["'a small cat' is a cat, 100 seeds"] = recogniser.share(cats, ["cat"] * 100)
    some = words[:50]
    plain = [extent_of(image) for image in images[: 3 * len(some) : 3]]
    small = [
        extent_of(image)
        for image in draw(pipeline, [f"a small {word}" for word in some], range(len(some)), **options)
    ]
    big = [
        extent_of(image)
        for image in draw(pipeline, [f"a big {word}" for word in some], range(len(some)), **options)
    ]
    right = [a < b for a, b in zip(small, plain, strict=True)] + [
        a > b for a, b in zip(big, plain, strict=True)
    ]
    figures["size words"] = float(np.mean(right))
    colours = list(BACKGROUNDS)
    asked = [colours[index % len(colours)] for index in range(len(words[:120]))]
    phrases = [f"a {word} on a {colour} background" for word, colour in zip(words, asked, strict=False)]
    coloured = draw(pipeline, phrases, range(len(phrases)), **options)
    found = [background_of(image) for image in coloured]
    figures["background is the named colour"] = float(
        np.mean([name == colour for (name, _), colour in zip(found, asked, strict=True)])
    )
    figures["subject on that background"] = recogniser.share(coloured, words[: len(phrases)])
    figures["two subjects, both there"] = _score_pairs(pipeline, recogniser, words, **options)
    return figures


def _score_pairs(
    pipeline: StableDiffusionPipeline, recogniser: Recogniser, words: list[str], **options: Any
) -> float:
    """The share of prompts for two subjects with the first on the left and the second on the right."""
    lefts, rights = words[:100], [words[(37 * index + 11) % len(words)] for index in range(len(words[:100]))]
    prompts = [f"a {left} and a {right}" for left, right in zip(lefts, rights, strict=True)]
    images = [halves(image) for image in draw(pipeline, prompts, range(len(prompts)), **options)]
    left_names, right_names = (
        recogniser.names([left for left, _ in images]),
        recogniser.names([right for _, right in images]),
    )
    both = zip(left_names, lefts, right_names, rights, strict=True)
    return float(np.mean([a == b and c == d for a, b, c, d in both]))


def score_schedulers(
    pipeline: StableDiffusionPipeline, recogniser: Recogniser, words: Sequence[str]
) -> dict[str, float]:
    """Top-1 accuracy with each scheduler, with and without guidance, and in each of some other sizes."""
    words = list(words)
    own, figures = pipeline.scheduler, {}
    prompts, seeds = [f"a {word}" for word in words], range(len(words))
    for name, (kind, settings) in SCHEDULERS.items():
        pipeline.scheduler = kind.from_config(own.config, **settings)
        for guidance in (1.0, GUIDANCE, *MORE_GUIDANCE):
            images = draw(pipeline, prompts, seeds, guidance_scale=guidance)
            figures[f"{name}, guidance {guidance:g}"] = recogniser.share(images, words)
            if name == "PNDM":
                images = draw(
                    pipeline, prompts, seeds, guidance_scale=guidance, num_inference_steps=_PNDM_STEPS
                )
                figures[f"{name} in {_PNDM_STEPS} steps, guidance {guidance:g}"] = recogniser.share(
                    images, words
                )
    pipeline.scheduler = own
    for width, height in SIZES:
        images = [_square(image) for image in draw(pipeline, prompts, seeds, width=width, height=height)]
        figures[f"{width}x{height} px"] = recogniser.share(images, words)
    return figures


def _square(image: Image.Image) -> Image.Image:
    """The middle square of an image."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def seconds_per_picture(pipeline: StableDiffusionPipeline, together: int) -> float:
    """Seconds a picture for `together` guided 128x128 pictures of 20 steps in one batch: the median of 5."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        draw(pipeline, ["a small cat"] * together, range(together))
        times.append((time.perf_counter() - start) / together)
    # The first measurement includes what torch sets up once.
    return statistics.median(times[1:])


def report(
    pipeline: StableDiffusionPipeline, out: Path, model: classifier.Classifier, names: Sequence[str]
) -> None:
    """Prints the score, and writes `contact_sheet.png` and `figures.json` to the folder `out`."""
    recogniser = Recogniser(model, names)
    words = [word for word in scored_words() if word in set(names)]
    start = time.monotonic()
    # On a CPU each takes minutes.
    scales = (GUIDANCE, *MORE_GUIDANCE) if pipeline.device.type == "cuda" else (GUIDANCE,)
    figures = {
        f"guidance {scale:g}": score(pipeline, recogniser, words, guidance_scale=scale) for scale in scales
    }
    figures["schedulers and sizes"] = score_schedulers(pipeline, recogniser, words[:40])
    prompts = [line for line in CONTACT_SHEET.read_text(encoding="utf-8").splitlines() if line]
    contact_sheet(draw(pipeline, prompts, range(len(prompts)))).save(out / "contact_sheet.png")
    for title, table in figures.items():
        print(title)
        for name, value in table.items():
            print(f"  {name:32s} {100 * value:5.1f}%")
    print(f"scored in {time.monotonic() - start:.0f} s")
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the model")
    parser.add_argument("--classifier", type=Path, default=classifier.WEIGHTS, help="its weights")
    parser.add_argument(
        "--out", type=Path, default=Path(), help="folder for contact_sheet.png and figures.json"
    )
    parser.add_argument(
        "--time", action="store_true", help="only measure the seconds a picture, on two CPU threads"
    )
    arguments = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.model)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    if arguments.time:
        torch.set_num_threads(2)
        for together in (1, 4):
            print(f"{seconds_per_picture(pipeline, together):.2f} s a picture, {together} at a time")
        return
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    report(pipeline, arguments.out, *classifier.load_classifier(arguments.classifier))


if __name__ == "__main__":
    main()
