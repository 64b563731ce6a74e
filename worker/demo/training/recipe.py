"""All numbers of the recipe, and the clock of its stages."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Recipe:
    """Sizes, amounts of data and times. The defaults are those of the bundled model."""

    #: Seed of captions, layouts, noise and initial weights. Rounding on the GPU still makes runs differ.
    seed: int = 0
    #: Pixels a side of most training pictures; a multiple of 8.
    size: int = 128
    #: Other canvases (width, height) on which the denoiser trains in turn, so that sizes from 96 to 192 px
    #: work. The smallest is listed twice: it has the fewest pixels for a subject and is the hardest.
    other_sizes: tuple[tuple[int, int], ...] = (
        (96, 96),
        (160, 160),
        (192, 96),
        (112, 112),
        (192, 192),
        (96, 192),
        (96, 96),
        (144, 144),
        (192, 128),
        (128, 192),
    )
    #: Share of the denoiser's time, 0 to 1, from which on they are used.
    other_sizes_from: float = 0.25
    #: One step in this many is on another canvas.
    other_size_every: int = 5
    #: Scenes with captions. Each keeps its caption and is drawn many times, at random sizes.
    scenes: int = 200_000
    #: Scenes for each other canvas.
    other_scenes: int = 6_000

    #: Minutes of training per stage, compilation included.
    autoencoder_minutes: float = 5.5
    classifier_minutes: float = 0.8
    denoiser_minutes: float = 9.8

    #: Channels per resolution of the VAE, finest first, and of its latents.
    autoencoder_channels: tuple[int, ...] = (48, 64, 96, 112)
    latent_channels: int = 16
    autoencoder_batch: int = 128
    autoencoder_rate: float = 1.2e-3
    #: Weight of the divergence from a standard normal, per latent value, beside an L1 loss of about 0.02.
    kl_weight: float = 2e-4

    #: Channels per resolution of the UNet; cross attention at the middle one and in the middle block.
    denoiser_channels: tuple[int, ...] = (96, 144, 192)
    text_width: int = 192
    text_layers: int = 2
    denoiser_batch: int = 512
    denoiser_rate: float = 8e-4
    #: Steps between two renewals of 256 latents, whose scenes are drawn and encoded again.
    renew_every: int = 6

    classifier_batch: int = 512
    #: Whether to compile the models: takes a minute a model, and makes training faster on a GPU only.
    compiled: bool = True


@contextlib.contextmanager
def searched_convolutions() -> Iterator[None]:
    """A context in which cuDNN tries its algorithms on every new shape and keeps the fastest.

    The search takes about ten seconds a model: use it for the thousands of equal steps of a training loop
    only.
    """
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


@dataclass
class Clock:
    """Wall-clock time of one stage, over all runs of it."""

    #: Minutes that the whole stage may take.
    minutes: float
    #: Minutes spent in earlier runs.
    spent: float = 0.0
    #: Minutes that this run may spend on it.
    allowed: float = float("inf")
    _start: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Minutes spent, earlier runs included."""
        return self.spent + (time.monotonic() - self._start) / 60

    @property
    def progress(self) -> float:
        """Share of the stage that is over, 0..1."""
        return min(1.0, self.elapsed / self.minutes)

    @property
    def over(self) -> bool:
        """Whether the time of the stage, or of this run, is used up."""
        return self.progress >= 1 or self.elapsed - self.spent >= self.allowed


def rate_factor(step: int, progress: float, warm_up: int = 200, hold: float = 0.35) -> float:
    """The learning rate's factor: linear warm-up in steps, constant, then a linear fall to 1% in time."""
    rise = min(1.0, (step + 1) / warm_up)
    fall = 1.0 if progress < hold else 1 - 0.99 * (progress - hold) / (1 - hold)
    return rise * fall
