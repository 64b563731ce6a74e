"""Names the style and the subject of a picture that a LoRA had a part in, for the figures and the tests.

    python -m worker.demo.training.style_judge --out worker/demo/training

It learns from the emoji as they are and as each style's filter makes them, and never sees a generated
picture. The classifier alone will not do for the subject: it knows that by its colours, which styles change.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from worker.demo.training import classifier
from worker.demo.training.captions import BACKGROUNDS, SIZES
from worker.demo.training.recipe import rate_factor
from worker.demo.training.scenes import Composer, SceneBatch, to_images
from worker.demo.training.styles import STYLES, blurred
from worker.demo.training.subjects import Subject, load_subjects, scored_words

#: The weights of the repository, fp16. The names of the subjects are in the file's metadata.
WEIGHTS = Path(__file__).with_name("style_judge.safetensors")
#: The style of a picture without a LoRA.
NONE = "none"
#: The styles, in the order of the judge's classes.
NAMES = (NONE, *STYLES)
#: Pixels a side of the pictures that are filtered: those that the LoRAs are trained on.
_SIZE = 128
#: Pictures a step, and the learning rate at first.
_BATCH, _RATE = 64, 2e-3
#: The most blur, as the Gaussian's standard deviation in pixels.
_BLUR = 2.5
#: Pictures of each style that the judge is tested on, of subjects that it did not learn from.
_TESTED = 64


class Network(nn.Module):
    """Two networks on the same pictures, (n, 3, height, width) in -1..1.

    That of styles is small and sees each pixel, for a style is in the edges. That of subjects is the
    classifier.
    """

    def __init__(self, subjects: int) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=1 if before == 3 else 2, padding=1)
            for before, after in itertools.pairwise(widths)
        )
        # Of a plain background the variance is 0: a greater eps keeps the gradient finite.
        self.norms = nn.ModuleList(nn.GroupNorm(8, width, eps=1e-3) for width in widths[2:])
        self.out = nn.Linear(2 * widths[-1], len(NAMES))
        self.subject = classifier.Classifier(subjects)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of the styles and of the subjects."""
        x = functional.relu(self.convolutions[0](pictures))
        for convolution, norm in zip(self.convolutions[1:], self.norms, strict=True):
            x = functional.relu(norm(convolution(x)))
        size = (classifier.SIZE, classifier.SIZE)
        small = functional.interpolate(pictures, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        found = self.subject(small.contiguous(memory_format=torch.channels_last))
        return self.out(torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)), found


class StyleJudge:
    """The trained networks, for PIL images."""

    def __init__(self, path: Path = WEIGHTS) -> None:
        with safe_open(path, framework="pt") as file:
            self._subjects: list[str] = json.loads(file.metadata()["names"])
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
        self._model = Network(len(self._subjects))
        self._model.load_state_dict(weights)
        self._model.eval()

    @torch.no_grad()
    def judge(self, images: Sequence[Image.Image]) -> list[tuple[str, str]]:
        """The style and the subject of each image: ("pixel", "cat"). The images have one size."""
        pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
        pictures = torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2)
        styles, subjects = (logits.argmax(dim=1).tolist() for logits in self._model(pictures))
        return [
            (NAMES[style], self._subjects[subject]) for style, subject in zip(styles, subjects, strict=True)
        ]


class Examples(NamedTuple):
    """Pictures with what the judge has to say of them."""

    #: (n, 3, height, width), -1..1.
    pictures: torch.Tensor
    #: int64 (n,): places in `NAMES`, and among the subjects.
    styles: torch.Tensor
    subjects: torch.Tensor


def filtered(count: int, composer: Composer) -> Examples:
    """New pictures of `_SIZE`. `count` is a multiple of the number of styles, which are equally frequent."""
    subjects = torch.stack([torch.randint(composer.count, (count,)), torch.full((count,), -1)], dim=1)
    backgrounds = torch.where(torch.rand(count) < 0.6, 0, torch.randint(len(BACKGROUNDS), (count,)))
    scenes = SceneBatch(subjects, torch.randint(len(SIZES), (count, 2)), backgrounds)
    drawn = composer.draw(scenes.layout(_SIZE, _SIZE), _SIZE, _SIZE)
    plain, *others = drawn.chunk(len(NAMES))
    styled = [plain, *(style(part) for style, part in zip(STYLES.values(), others, strict=True))]
    styles = torch.arange(len(NAMES)).repeat_interleave(count // len(NAMES))
    return Examples(torch.cat(styled), styles, subjects[:, 0])


def varied(pictures: torch.Tensor) -> torch.Tensor:
    """The pictures with blur and noise, more of them in some, in all styles alike.

    What a model draws is a little soft: sharpness must not tell the styles apart.
    """
    count = len(pictures)
    soft = blurred(pictures, 0.5 + (_BLUR - 0.5) * float(torch.rand(())))
    pictures = torch.lerp(pictures, soft, torch.rand(count, 1, 1, 1))
    noise = 0.1 * torch.rand(count, 1, 1, 1).square()
    return (pictures + noise * torch.randn_like(pictures)).clamp(-1, 1)


def train_judge(names: Sequence[str], composer: Composer, steps: int) -> Network:
    """Trains the networks, that of subjects from the classifier on: `names` are the composer's subjects."""
    known, classes = classifier.load_classifier()
    model = Network(len(names))
    own = [classes.index(name) for name in names]
    weights = known.state_dict()
    weights |= {part: weights[part][own] for part in ("out.weight", "out.bias")}
    model.subject.load_state_dict(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.99), weight_decay=0.02)
    start = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * rate_factor(step, step / steps, warm_up=20)
        pictures, styles, subjects = filtered(_BATCH, composer)
        style_logits, subject_logits = model(varied(pictures).contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(style_logits, styles)
        loss = loss + functional.cross_entropy(subject_logits, subjects)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            style, subject = (
                float((found.argmax(dim=1) == wanted).float().mean())
                for found, wanted in ((style_logits, styles), (subject_logits, subjects))
            )
            print(
                f"judge step {step + 1} loss {loss.item():.3f} styles right {style:.3f}, "
                f"subjects {subject:.3f}, {time.process_time() - start:.0f} s of CPU time",
                flush=True,
            )
    return model


def save_judge(model: Network, names: Sequence[str], path: Path) -> None:
    """Writes fp16 weights with the names of the subjects."""
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, path, metadata={"names": json.dumps(list(names))})


def confusion(judge: StyleJudge, composer: Composer) -> dict[str, dict[str, int]]:
    """What the judge takes filtered pictures for, by their style: how many for which."""
    images = to_images(filtered(_TESTED * len(NAMES), composer).pictures)
    found = [style for style, _ in judge.judge(images)]
    parts = [found[first : first + _TESTED] for first in range(0, len(found), _TESTED)]
    return {name: {each: part.count(each) for each in NAMES} for name, part in zip(NAMES, parts, strict=True)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for the npm tarballs")
    parser.add_argument("--steps", type=int, default=400, help="of training (default 400)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    parser.add_argument("--test", action="store_true", help="only test the weights that are in the folder")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    words, path = set(scored_words()), arguments.out / WEIGHTS.name
    common = [subject for subject in load_subjects(arguments.data) if subject.common]

    def composer_of(subjects: list[Subject]) -> Composer:
        return Composer(subjects, arguments.data, torch.device("cpu"))

    if not arguments.test:
        subjects = [subject for subject in common if subject.name in words]
        names = [subject.name for subject in subjects]
        model = train_judge(names, composer_of(subjects), arguments.steps)
        arguments.out.mkdir(parents=True, exist_ok=True)
        save_judge(model, names, path)
    unseen = composer_of([subject for subject in common if subject.name not in words])
    print(f"{_TESTED} pictures of each style, of {unseen.count} subjects that it has not seen:")
    for name, found in confusion(StyleJudge(path), unseen).items():
        print(f"  {name}: {found}")


if __name__ == "__main__":
    main()
