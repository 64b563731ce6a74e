"""LoRAs of text encoders, which change the texts of their own job alone."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from worker.device.loras.job_set import LayerFactors
from worker.device.loras.site import with_factors


@dataclass(frozen=True, eq=False)
class TextLoras:
    """What a job's LoRAs change of the text encoders. Jobs of equal LoRAs share it, and nobody changes it."""

    #: Equal for those of equal LoRAs at equal weights.
    key: Hashable
    #: For each text encoder, by the name of its layer.
    encoders: Sequence[Mapping[str, LayerFactors]]

    @contextlib.contextmanager
    def within(self, models: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Meanwhile `models`, the text encoders, have them. One thread at a time."""
        hooks = []
        try:
            for model, layers in zip(models, self.encoders, strict=True):
                for name, factors in layers.items():
                    hooks.append(model.get_submodule(name).register_forward_hook(_hook(factors)))
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _hook(factors: LayerFactors) -> Any:
    def after(layer: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        bias = 0 if layer.bias is None else layer.bias
        linear = functional.linear
        plain = linear(given[0], layer.weight)
        # An encoder may run on the host.
        own = factors.beside(given[0])
        return with_factors(plain, given[0], layer.weight, own, linear, linear) + bias

    return after
