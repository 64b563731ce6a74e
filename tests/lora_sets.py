"""Random LoRAs, made without files. What they change is large enough to see, and stays finite."""

from __future__ import annotations

import random

import torch

from worker.device.loras.job_set import Adaptable, LayerFactors, LoraSet


def random_set(
    adaptable: Adaptable, seed: int, rank: int, *, wide: bool = False, dora: bool = False, share: float = 1.0
) -> LoraSet:
    """A set that changes a `share` of the model's layers; convolutions too if `wide`."""
    device = next(iter(adaptable.weights.values())).device
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    drawn = random.Random(seed)
    layers = {}
    for name, weight in adaptable.weights.items():
        if name not in adaptable.places.common and not wide:
            continue
        if drawn.random() > share:
            continue
        taps = () if weight.ndim == 2 or weight.shape[2:] == (1, 1) else (weight.shape[2:].numel(),)
        down = normal(rank, *taps, weight.shape[1]) / weight[0].numel() ** 0.5
        up = normal(rank, len(weight)) * 0.3 / rank**0.5
        after = 1 + 0.1 * normal(len(weight)).tanh() if dora else None
        layers[name] = LayerFactors(
            down.to(weight), up.to(weight), 0.7, None if after is None else after.to(weight.device)
        )
    return LoraSet.of((seed, rank, wide, dora, share), layers, adaptable.places, device)
