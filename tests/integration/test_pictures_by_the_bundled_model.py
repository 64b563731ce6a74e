"""The bundled model draws what docs/pictures-in.md and docs/product-photos.md say, on a CPU, often enough."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.embedded.stack import Stack
from producer import submit_job
from tests.docs import ROOT
from tests.worker.demo.cut_outs import cut_out
from worker.demo.training import classifier
from worker.demo.training.captions import BACKGROUNDS
from worker.demo.training.evaluate import background_of

pytestmark = [pytest.mark.services, pytest.mark.timeout(1200)]

#: Of pictures that a judge looks at, so many are to be right.
SHARE = 0.95
#: By how much a channel of a background's pixel may differ from its colour, 0 to 255.
NEAR = 64
#: What is cut out: each is drawn on every background but white, which it is cut out of.
SUBJECTS = ("dog", "cat", "house", "rocket", "pizza", "car", "apple", "robot", "heart", "banana")
COLOURS = tuple(BACKGROUNDS)[1:]


@pytest.fixture(scope="module")
def stack(servers: Stack) -> Iterator[Stack]:
    with Stack(workers=1) as stack:
        yield stack


@pytest.fixture(autouse=True)
def producer_environment(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in stack.variables.items():
        monkeypatch.setenv(name, value)


def test_cats_are_made_dogs() -> None:
    cats = [submit_job("a cat", seed=seed) for seed in range(20)]
    for cat in cats:
        assert classifier.recognise(cat.image(timeout=300)) == "cat"
    dogs = [submit_job("a dog", image=cat, strength=0.6, seed=seed) for seed, cat in enumerate(cats)]
    names = [classifier.recognise(dog.image(timeout=300)) for dog in dogs]
    assert names.count("dog") >= SHARE * len(dogs), names


def test_products_keep_their_pixels_before_the_backgrounds_that_prompts_name(tmp_path: Path) -> None:
    drawn = [submit_job(f"a {word}", seed=1) for word in SUBJECTS]
    (tmp_path / "cut-outs").mkdir()
    cut_outs = {}
    for word, handle in zip(SUBJECTS, drawn, strict=True):
        cut_outs[f"{word}.png"] = np.asarray(found := cut_out(handle.image(timeout=300)))
        found.save(tmp_path / "cut-outs" / f"{word}.png")
    prompts = [f"a {{name}} on a {colour} background" for colour in COLOURS]
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "product_photos.py", "cut-outs", "photos", *prompts],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "photos" / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == len(SUBJECTS) * len(COLOURS) == 110
    wrong = []
    for line in lines:
        pixels, cut = np.asarray(Image.open(tmp_path / line["path"])), cut_outs[line["image"]]
        opaque = cut[..., 3] == 255
        assert opaque.mean() > 0.1
        assert np.array_equal(pixels[opaque], cut[opaque][:, :3]), line
        named, _ = background_of(Image.fromarray(pixels))
        near = np.abs(pixels.astype(int) - BACKGROUNDS[named]).max(axis=2)[cut[..., 3] == 0] < NEAR
        if not line["prompt"].endswith(f" on a {named} background") or near.mean() < 0.9:
            wrong.append(line["prompt"])
    assert len(wrong) <= (1 - SHARE) * len(lines), wrong


def test_a_photo_of_any_size_has_its_own_size_and_pixels_with_padding() -> None:
    photo = Image.open(ROOT / "docs" / "cut-outs" / "sneaker.png").resize((301, 299))
    fields = {"image": photo, "mask": "alpha", "padding": 0, "width": 128, "height": 128, "seed": 1}
    picture = submit_job("a sneaker on a blue background", **fields).image(timeout=300)
    assert picture.size == photo.size
    opaque = np.asarray(photo)[..., 3] == 255
    assert np.array_equal(np.asarray(picture)[opaque], np.asarray(photo)[opaque][:, :3])
    assert background_of(picture)[0] == "blue"
