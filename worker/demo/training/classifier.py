"""A small classifier that names the emoji of a picture, for the tests and for the score.

It is trained on the emoji themselves, never on generated pictures, and is not used to train the generator.
"""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from worker.demo.training.captions import BACKGROUNDS
from worker.demo.training.recipe import Clock, Recipe, rate_factor, searched_convolutions
from worker.demo.training.scenes import Composer, Layout

#: The weights of the repository, fp16. The names of the classes are in the file's metadata.
WEIGHTS = Path(__file__).with_name("classifier.safetensors")
#: Pixels a side to which pictures are resized first.
SIZE = 96


class Classifier(nn.Module):
    """A residual convolutional network of 0.8 million parameters: (n, 3, 96, 96) in -1..1 to (n, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (32, 64, 112, 144)
        self.stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1)
        self.down = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in itertools.pairwise(widths)
        )
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths[1:])
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:] for _ in range(2))
        self.out = nn.Linear(widths[-1], classes)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """The logits."""
        x = functional.relu(self.stem(pictures))
        for index, (down, block) in enumerate(zip(self.down, self.blocks, strict=True)):
            x = functional.relu(self.norms[2 * index](down(x)))
            x = x + functional.relu(self.norms[2 * index + 1](block(x)))
        return self.out(x.amax(dim=(2, 3)))  # type: ignore[no-any-return]


def examples(count: int, composer: Composer) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (count, 3, 96, 96), -1..1, and their classes, int64 (count,).

    Size, position and background vary. Some pictures have the edge of a second emoji, blur, noise and a tint,
    so that the classifier learns to ignore them.
    """
    device = composer.device
    subjects = torch.randint(composer.count, (count, 2), device=device)
    labels = subjects[:, 0].clone()
    neighbour = torch.rand(count, device=device) < 0.25
    subjects[:, 1] = torch.where(neighbour, subjects[:, 1], -1)
    side = SIZE * (0.32 + 0.66 * torch.rand(count, 2, device=device))
    free = (SIZE - side).clamp(min=4)[:, :, None]
    centre = SIZE / 2 + (torch.rand(count, 2, 2, device=device) - 0.5) * free
    # Of a neighbour only the edge is in the picture, at the left or at the right.
    outside = torch.where(
        torch.rand(count, device=device) < 0.5, -0.42 * side[:, 1], SIZE + 0.42 * side[:, 1]
    )
    centre[:, 1, 0] = torch.where(neighbour, outside, centre[:, 1, 0])
    named = torch.tensor(list(BACKGROUNDS.values()), device=device) / 255
    colour = named[torch.randint(len(named), (count,), device=device)]
    colour = torch.where(torch.rand(count, 1, device=device) < 0.45, 1.0, colour)
    colour = (colour + 0.06 * torch.randn_like(colour)).clamp(0, 1)
    pictures = composer.draw(Layout(subjects, side, centre, colour), SIZE, SIZE)
    soft = functional.avg_pool2d(functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = torch.lerp(pictures, soft, torch.rand(count, 1, 1, 1, device=device).square())
    noise = 0.12 * torch.rand(count, 1, 1, 1, device=device).square()
    tint = 1 + 0.1 * (torch.rand(count, 3, 1, 1, device=device) - 0.5)
    return (pictures * tint + noise * torch.randn_like(pictures)).clamp(-1, 1), labels


def train_classifier(model: Classifier, composer: Composer, recipe: Recipe, clock: Clock) -> None:
    """Trains until the clock is over."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.02)
    fast = torch.compile(model) if recipe.compiled else model
    step = 0
    while not clock.over:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate_factor(step, clock.progress)
        pictures, labels = examples(recipe.classifier_batch, composer)
        with searched_convolutions():
            with torch.autocast(composer.device.type, torch.bfloat16, enabled=composer.device.type == "cuda"):
                logits = fast(pictures.contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits.float(), labels)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 250 == 0:
            right = float((logits.argmax(dim=1) == labels).float().mean())
            print(
                f"classifier step {step} {clock.elapsed:.2f} min loss {loss.item():.3f} right {right:.3f}",
                flush=True,
            )
        step += 1
    print(f"classifier: {step} steps", flush=True)


def save_classifier(model: Classifier, names: list[str], path: Path) -> None:
    """Writes fp16 weights with the class names."""
    weights = {name: tensor.half().contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(weights, path, metadata={"names": json.dumps(names)})


def load_classifier(path: Path = WEIGHTS) -> tuple[Classifier, list[str]]:
    """The classifier in fp32, in evaluation mode, and the names of its classes."""
    with safe_open(path, framework="pt") as file:
        names: list[str] = json.loads(file.metadata()["names"])
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
    model = Classifier(len(names))
    model.load_state_dict(weights)
    return model.eval(), names


_shipped = functools.cache(load_classifier)


@torch.no_grad()
def recognise(image: Image.Image) -> str:
    """The most likely name of what the image shows: "cat", "house", ..."""
    model, names = _shipped()
    return names[int(model(as_input(image)[None])[0].argmax())]


def as_input(image: Image.Image) -> torch.Tensor:
    """The image as the classifier's input: (3, 96, 96), -1..1."""
    small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()
