"""Modules that stay in the host's memory, and come to the GPU layer by layer when they are used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

Tensors = list[tuple[torch.Tensor, torch.Tensor]]


class MovedWeights:
    """Moves the layers of modules, one at a time, each right before it is used.

    For one thread at a time. A layer's weights are on the GPU until the next layer's are: copies are launched
    on the current stream, where the work that needs them follows, and nobody waits. There is nothing to copy
    back. What a module is given is brought to the GPU, so callers need not know where it runs.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        """`modules` are on the CPU."""
        self._device = device
        #: The tensors of the layer that is on the GPU, each with its copy on the host.
        self._there: Tensors = []
        for module in modules:
            module.register_forward_pre_hook(self._bring_inputs, with_kwargs=True)
            for layer in _layers(module):
                tensors = _on_host(layer)
                layer.register_forward_pre_hook(self._bring(tensors))

    def _bring(self, tensors: Tensors) -> Callable[[nn.Module, Any], None]:
        def before(_module: nn.Module, _inputs: Any) -> None:
            if self._there is tensors:
                return
            self.release()
            # All or none: memory may run out.
            moved = [self._fetched(host) for _, host in tensors]
            for (tensor, _), there in zip(tensors, moved, strict=True):
                tensor.data = there
            self._there = tensors

        return before

    def _fetched(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self._device, non_blocking=True)

    def release(self) -> None:
        """Give the memory on the GPU back."""
        for tensor, host in self._there:
            tensor.data = host
        self._there = []

    def _bring_inputs(
        self, _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def there(value: Any) -> Any:
            return value.to(self._device) if isinstance(value, torch.Tensor) else value

        return tuple(map(there, inputs)), {name: there(value) for name, value in named.items()}


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a module that are moved together: members of its lists, and what is beside the lists."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif any(isinstance(each, nn.ModuleList) for each in child.modules()):
            yield from _layers(child)
        else:
            yield child


def _on_host(layer: nn.Module) -> Tensors:
    """The layer's tensors, each with its copy in page-locked memory, from which the GPU reads by itself."""
    tensors = []
    for tensor in (*layer.parameters(), *layer.buffers()):
        # A machine without a GPU locks none, and one may run out of what it may lock.
        with contextlib.suppress(RuntimeError):
            tensor.data = tensor.data.pin_memory()
        tensors.append((tensor, tensor.data))
    return tensors
