"""Random LoRAs, made without files. What they change is large enough to see, and stays finite."""

from __future__ import annotations

import torch

from worker.device.lora_set import Adaptable, LayerFactors, LoraSet


def random_set(
    adaptable: Adaptable, seed: int, rank: int, *, wide: bool = False, dora: bool = False, share: float = 1.0
) -> LoraSet:
    """A set that changes a `share` of the model's layers; convolutions too if `wide`."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, weight in adaptable.weights.items():
        if name not in adaptable.places.common and not wide:
            continue
        if torch.rand(1, generator=generator).item() > share:
            continue
        taps = () if weight.ndim == 2 or weight.shape[2:] == (1, 1) else (weight.shape[2:].numel(),)
        down = torch.randn(rank, *taps, weight.shape[1], generator=generator) / weight[0].numel() ** 0.5
        up = torch.randn(rank, len(weight), generator=generator) * 0.3 / rank**0.5
        after = torch.rand(len(weight), generator=generator) * 0.2 + 0.9 if dora else None
        layers[name] = LayerFactors(
            down.to(weight), up.to(weight), 0.7, None if after is None else after.to(weight.device)
        )
    device = next(iter(adaptable.weights.values())).device
    return LoraSet.of((seed, rank, wide, dora, share), layers, adaptable.places, device)
