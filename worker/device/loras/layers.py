"""A UNet whose layers add each row's own LoRAs: a copy of the model's modules that shares its weights.

The model itself is not touched: a batch without LoRAs runs what it ran before. In the copy stand other
modules for each linear layer, convolution and attention. They find the LoRAs of the present forward by their
`Site`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from worker.device import unet_patches
from worker.device.attention import Processor
from worker.device.fp8 import layers as fp8
from worker.device.loras import operators
from worker.device.loras.job_set import Places, RowLoras
from worker.device.loras.site import Context, Current, Site, each_job

#: Where the name of a layer of attention or feed-forward has this, the layer is one of the common ones.
_COMMON = (".transformer_blocks.", ".proj_in", ".proj_out")


class LoraUNet:
    """The copy of a UNet, and where its layers are in a table."""

    def __init__(self, unet: Any, device: torch.device) -> None:
        """`unet`: with its patches and its attention processors, which the copy takes over."""
        self._context = Context()
        self._has_kernels = operators.are_there(device.type)
        shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
        self._unet = copy.deepcopy(unet, shared)
        names = list(_layers(self._unet))
        #: Where each layer is, by its name in a UNet as diffusers builds it.
        self.places = Places(
            {name: index for index, name in enumerate(names)},
            frozenset(name for name in names if any(part in name for part in _COMMON)),
        )
        #: The weight of each layer, for DoRA.
        self.weights = _Weights(_layers(unet))
        self._replace(self._unet, "", once=False)

    def __call__(
        self, loras: RowLoras, prompted: torch.Tensor, job_of_row: torch.Tensor, *given: Any, **named: Any
    ) -> Any:
        """The UNet's output for `given` and `named`, with these LoRAs."""
        jobs = torch.arange(prompted.shape[0], device=prompted.device)
        by_kernel = self._has_kernels and not loras.needs_loop
        self._context.enter(Current(loras, job_of_row, jobs, by_kernel))
        if torch.compiler.is_compiling():
            output = self._unet(*given, **named)
            self._context.enter(None)
            return output
        try:
            return self._unet(*given, **named)
        finally:
            self._context.enter(None)

    def _replace(self, parent: torch.nn.Module, path: str, *, once: bool) -> None:
        """Put other modules in the place of `parent`'s children. `once`: they are computed once a job."""
        from diffusers.models.activations import GEGLU
        from diffusers.models.attention_processor import Attention

        for name, child in list(parent.named_children()):
            child_path = f"{path}.{name}" if path else name
            child_once = once or child_path == "down_blocks.0.original.resnets.0"
            new: torch.nn.Module | None = None
            if isinstance(child, Attention):
                site = self._site(f"{child_path}.to_q", child_once or child.processor.once_a_job)
                child.processor = _AttentionProcessor(child.processor, site)
                continue
            if isinstance(child, GEGLU):
                new = _Gate(child.proj, self._site(f"{child_path}.proj", child_once))
            elif isinstance(child, unet_patches.Upsample2D):
                new = _Upsampler(child, self._site(f"{child_path}.conv", child_once))
                self._replace(child.original, f"{child_path}.original", once=child_once)
            elif isinstance(child, fp8.Fp8Norm):
                # LoRAs take what is not quantised.
                new = child.plain()
            elif isinstance(child, torch.nn.Linear):
                new = _Linear(child, self._site(child_path, child_once))
            elif isinstance(child, torch.nn.Conv2d):
                new = _Conv(child, self._site(child_path, child_once))
            if new is None:
                self._replace(child, child_path, once=child_once)
            else:
                setattr(parent, name, new)

    def _site(self, path: str, once: bool) -> Site:
        name = _plain(path)
        return Site(self._context, self.places, name, once)


class _Weights(Mapping[str, torch.Tensor]):
    """The weights of layers by name. Those in FP8 are made when they are asked for."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self._layers = layers

    def __getitem__(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = self._layers[name].weight
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def _with_bias(output: torch.Tensor, layer: Any) -> torch.Tensor:
    result: torch.Tensor = output if layer.bias is None else output + layer.bias
    return result


class _Linear(torch.nn.Module):
    """A linear layer, of tokens or of one vector a row."""

    def __init__(self, original: torch.nn.Linear, site: Site) -> None:
        super().__init__()
        self.original, self._site = original, site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the original's."""
        if self._site.here() is None:
            result: torch.Tensor = self.original(x)
            return result
        (output,) = self._site.linears(x if x.ndim == 3 else x[:, None], [self.original])
        return _with_bias(output if x.ndim == 3 else output[:, 0], self.original)


class _Gate(torch.nn.Module):
    """The first layer of a feed-forward, with its gate: diffusers' GEGLU."""

    def __init__(self, proj: torch.nn.Linear, site: Site) -> None:
        super().__init__()
        self.proj, self._site = proj, site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the original's."""
        found = self._site.here()
        if found is not None and found[0].by_kernel and self.proj.bias is not None:
            current, job_of_row = found
            loras = current.loras
            rows = loras.table, job_of_row, loras.room, self._site.index
            gated: torch.Tensor
            if isinstance(self.proj, fp8.Fp8Linear):
                given = fp8.arguments(x, [self.proj])
                gated = torch.ops.smallcat.lora_fp8_gate(x, *given, self.proj.bias, *rows)
            else:
                gated = torch.ops.smallcat.lora_gate(x, self.proj.weight, self.proj.bias, *rows)
            return gated
        (output,) = self._site.linears(x, [self.proj])
        value, gate = _with_bias(output, self.proj).chunk(2, dim=-1)
        return value * functional.gelu(gate)


class _Conv(torch.nn.Module):
    """A convolution."""

    def __init__(self, original: torch.nn.Conv2d, site: Site) -> None:
        super().__init__()
        self.original, self._site = original, site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the original's."""
        conv, found = self.original, self._site.here()
        if found is None:
            result: torch.Tensor = conv(x)
            return result
        current, job_of_row = found
        loras, weight = current.loras, conv.weight
        if not current.by_kernel:
            output = each_job(x, weight, self._site.names[0], loras, job_of_row, self._convolved, self._low)
        elif conv.kernel_size == (1, 1) and conv.stride == (1, 1):
            flat = x.permute(0, 2, 3, 1)
            (product,) = torch.ops.smallcat.lora_linears(
                flat.flatten(1, 2), [weight.flatten(1)], loras.table, job_of_row, loras.room, self._site.index
            )
            output = product.unflatten(1, flat.shape[1:3]).permute(0, 3, 1, 2)
        else:
            output = torch.ops.smallcat.lora_conv(
                x,
                weight,
                loras.table,
                job_of_row,
                loras.room,
                self._site.index,
                conv.stride[0],
                int(conv.padding[0]),
            )
        return output if conv.bias is None else output + conv.bias[:, None, None]

    def _convolved(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, weight, stride=self.original.stride, padding=self.original.padding)

    def _low(self, x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return self._convolved(x, as_kernel(down, self.original.kernel_size))


def as_kernel(down: torch.Tensor, kernel: tuple[int, ...]) -> torch.Tensor:
    """(rank, taps, in), or (rank, in) of a kernel of one pixel, as (rank, in, height, width)."""
    return down.reshape(len(down), *kernel, -1).permute(0, 3, 1, 2)


class _Upsampler(torch.nn.Module):
    """`unet_patches.Upsample2D`, which has added up the weights of its convolution by where they fall."""

    def __init__(self, patched: unet_patches.Upsample2D, site: Site) -> None:
        super().__init__()
        self.patched, self._site = patched, site

    def forward(self, x: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        """As the original's."""
        found = self._site.here()
        if found is None or output_size is not None:
            result: torch.Tensor = self.patched(x, output_size)
            return result
        current, job_of_row = found
        loras = current.loras
        bias = self.patched.bias[: len(self.patched.bias) // 4, None, None]
        if current.by_kernel:
            output: torch.Tensor = torch.ops.smallcat.lora_upsampler(
                self.patched(x) - bias, x, loras.table, job_of_row, loras.room, self._site.index
            )
            return output + bias
        weight = self.patched.original.conv.original.weight
        larger = functional.interpolate(x, scale_factor=2.0)
        return each_job(larger, weight, self._site.names[0], loras, job_of_row, _padded, _padded_low) + bias


def _padded(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.conv2d(x, weight, padding=1)


def _padded_low(x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return _padded(x, as_kernel(down, (3, 3)))


class _AttentionProcessor(Processor):
    """The processor of an attention, whose products of one input are one operator."""

    def __init__(self, original: Processor, site: Site) -> None:
        """`site`: of the queries' layer; those of keys, values and output follow it."""
        vars(self).update(vars(original))
        self._site = site

    def _projected(
        self, attn: Any, hidden_states: torch.Tensor, context: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        layers = (attn.to_q, attn.to_k, attn.to_v)
        if context is hidden_states:
            outputs = list(self._site.linears(hidden_states, layers))
        else:
            outputs = [*self._site.linears(hidden_states, layers[:1])]
            outputs += self._site.linears(context, layers[1:], 1)
        return [_with_bias(output, layer) for output, layer in zip(outputs, layers, strict=True)]

    def _output(self, attn: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        (output,) = self._site.linears(hidden_states, [attn.to_out[0]], 3)
        return _with_bias(output, attn.to_out[0])


def _plain(path: str) -> str:
    """The name of a layer without the modules that patches put around it."""
    return path.replace(".original", "")


def _layers(unet: Any) -> dict[str, Any]:
    """The linear layers and convolutions of a UNet by name, those of an attention one behind another."""
    found = {}
    for path, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            found[_plain(path)] = module
    return {name: found[name] for name in _in_order(found)}


def _in_order(names: dict[str, Any]) -> Iterator[str]:
    ends = (".to_q", ".to_k", ".to_v", ".to_out.0")
    for name in names:
        if name.endswith(ends[0]):
            yield from (name.removesuffix(ends[0]) + end for end in ends)
        elif not name.endswith(ends):
            yield name
