"""LoRAs as the tools write them, made up for a model; and the model's weights with one merged in.

What a LoRA changes is said once, by the modules' names in diffusers; each tool has a function that names the
tensors as it does. Merging is written here from the published formulas (Hu et al., 2021; LyCORIS'
Algo-Details; Liu et al., 2024), and shares nothing with the code that is tested.

    kohya        sd-scripts 0.9, networks/lora.py: diffusers' names, SD 1.x and 2.x
    kohya_xl     the same for SDXL: the names of Stable Diffusion's first release
    onetrainer   dots and OMI's prefixes; `kohya` is what it writes by default
    diffusers    `save_lora_weights` of 0.42
    processors   diffusers before 0.17: `save_attn_procs`, and its text encoders
    layers       diffusers 0.17 to 0.24
    comfyui      ComfyUI's node that saves a LoRA
    peft         PEFT's `save_pretrained`
    lycoris      LyCORIS' `create_lycoris`, as SimpleTuner saves it
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests import original_layout

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Change:
    """What a LoRA does to one module."""

    #: (rank, in) or (rank, in, height, width); with `mid` (rank of it, in, 1, 1).
    down: torch.Tensor
    #: (out, rank) or (out, rank, 1, 1).
    up: torch.Tensor
    #: None: the rank.
    alpha: float | None = None
    #: (rank, rank of `down`, height, width): LoCon with a Tucker decomposition.
    mid: torch.Tensor | None = None
    #: DoRA: (out, 1, ...) or (1, in, ...).
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """By which alpha is divided."""
        return int(self.down.shape[0])

    def difference(self, shape: Iterable[int]) -> torch.Tensor:
        """What is added to a weight of that shape, float64."""
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        up, down = self.up.double().flatten(1), self.down.double()
        if self.mid is None:
            product = up @ down.flatten(1)
        else:
            product = torch.einsum("pi,ijkl,jr->prkl", up, self.mid.double(), down.flatten(1))
        return scale * product.reshape(tuple(shape))


#: What a LoRA changes: by part ("unet", "text_encoder", "text_encoder_2") and module.
Changes = Mapping[str, Mapping[str, Change]]


def merged(
    weights: Mapping[str, torch.Tensor], changes: Mapping[str, Change], weight: float = 1.0
) -> Tensors:
    """A model's state dict with a LoRA of that weight merged in, dtypes as they were.

    A magnitude counts in full whatever the weight, as in PEFT: W' = m (W + w D) / |W + w D|.
    """
    found = dict(weights)
    for name, change in changes.items():
        key = f"{name}.weight"
        own = weights[key]
        new = own.double() + weight * change.difference(own.shape)
        if (magnitude := change.magnitude) is not None:
            kept = 0 if magnitude.shape[0] == own.shape[0] and magnitude.shape[1] == 1 else 1
            sides = [side for side in range(own.dim()) if side != kept]
            norm = new.square().sum(dim=sides, keepdim=True).sqrt()
            new = magnitude.double() * new / norm
        found[key] = new.to(own.dtype)
    return found


def modules(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of all weights that a LoRA may change."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: each.weight.shape for name, each in model.named_modules() if isinstance(each, kinds)}


def made_up(
    shapes: Mapping[str, Iterable[int]],
    *,
    seed: int = 0,
    ranks: Iterable[int] = (4,),
    alphas: Iterable[float | None] = (None,),
    share: float = 1.0,
    tucker: bool = False,
    dora: str = "",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Change]:
    """Changes of modules with weights of these `shapes`.

    Ranks and alphas are drawn from those given. `share`: of the modules, one at least. `dora`: "out", "in".
    """
    drawn = random.Random(seed)
    numbers = torch.Generator().manual_seed(seed)
    names = sorted(shapes)
    kept = drawn.sample(names, max(1, round(share * len(names))))

    def some(*shape: int) -> torch.Tensor:
        return (0.2 * torch.randn(shape, generator=numbers)).to(dtype)

    found = {}
    for name in sorted(kept):
        out, into, *kernel = shapes[name]
        rank, alpha = drawn.choice(list(ranks)), drawn.choice(list(alphas))
        ones, mid = [1] * len(kernel), None
        down = some(rank, into, *kernel)
        if tucker and kernel not in ([], [1, 1]):
            down, mid = some(rank, into, *ones), some(rank, rank, *kernel)
        sides = {"out": (out, 1, *ones), "in": (1, into, *ones)}
        magnitude = some(*sides[dora]).abs() + 0.5 if dora else None
        found[name] = Change(down, some(out, rank, *ones), alpha, mid, magnitude)
    return found


# --- as the tools name them ---------------------------------------------------------------------------------


def _kohya(changes: Changes, name_of: Callable[[str, str], str]) -> Tensors:
    found: Tensors = {}
    for part, of_part in changes.items():
        for module, change in of_part.items():
            name = name_of(part, module)
            found[f"{name}.lora_down.weight"] = change.down
            found[f"{name}.lora_up.weight"] = change.up
            if change.mid is not None:
                found[f"{name}.lora_mid.weight"] = change.mid
            if change.alpha is not None:
                found[f"{name}.alpha"] = torch.tensor(change.alpha)
            if change.magnitude is not None:
                found[f"{name}.dora_scale"] = change.magnitude
    return found


def _long(module: str) -> str:
    """A module of a text encoder as every tool calls it: transformers 5 has shortened it."""
    return module if module.startswith(("text_model.", "text_projection")) else f"text_model.{module}"


def kohya(changes: Changes) -> Tensors:
    """SD 1.x and 2.x; OneTrainer's default as well."""
    return _kohya(
        changes,
        lambda part, module: (
            f"lora_unet_{module}" if part == "unet" else f"lora_te_{_long(module)}"
        ).replace(".", "_"),
    )


def original_names(unet: Any) -> dict[str, str]:
    """The UNet's modules in the layout of Stable Diffusion's first release, by diffusers' names."""
    names = list(unet.state_dict())
    pairs = zip(names, original_layout.unet(unet), strict=True)
    return {old.removesuffix(".weight"): new.removesuffix(".weight") for old, new in pairs}


def kohya_xl(changes: Changes, unet: Any) -> Tensors:
    """SDXL."""
    original = original_names(unet)
    prefixes = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    return _kohya(
        changes,
        lambda part, module: (
            f"lora_unet_{original[module]}" if part == "unet" else f"{prefixes[part]}_{_long(module)}"
        ).replace(".", "_"),
    )


def lycoris(changes: Mapping[str, Change]) -> Tensors:
    """Of one model that it wraps."""
    return _kohya({"unet": changes}, lambda _, module: f"lycoris_{module}".replace(".", "_"))


def onetrainer(changes: Changes, unet: Any) -> Tensors:
    """OMI's format, with dots."""
    original = original_names(unet)
    prefixes = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    return _kohya(
        changes,
        lambda part, module: (
            f"unet.{original[module]}" if part == "unet" else f"{prefixes[part]}.{_long(module)}"
        ),
    )


def diffusers(changes: Changes) -> Tensors:
    """What `save_lora_weights` writes."""
    found: Tensors = {}
    for part, of_part in changes.items():
        for module, change in of_part.items():
            name = f"{part}.{module if part == 'unet' else _long(module)}"
            found[f"{name}.lora_A.weight"] = change.down
            found[f"{name}.lora_B.weight"] = change.up
            if (magnitude := change.magnitude) is not None:
                shape = (1, -1, 1, 1) if magnitude.dim() == 4 else (-1,)
                found[f"{name}.lora_magnitude_vector"] = magnitude.reshape(shape)
    return found


def processors(changes: Changes) -> Tensors:
    """The attention's four products, as diffusers' attention processors named them; without alpha."""
    text = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    found: Tensors = {}
    for part, of_part in changes.items():
        for module, change in of_part.items():
            place, _, last = module.removesuffix(".0").rpartition(".")
            name = f"{part}.{place}.processor.{last}_lora"
            if part != "unet":
                name = f"{part}.{_long(place)}.{text[last]}_lora"
            found[f"{name}.down.weight"], found[f"{name}.up.weight"] = change.down, change.up
    return found


def layers(changes: Changes) -> Tensors:
    """As diffusers named them before it took PEFT's names; without alpha."""
    found = {}
    for name, tensor in diffusers(changes).items():
        middle = "lora" if name.startswith("unet.") or "text_projection" in name else "lora_linear_layer"
        new = name.replace("lora_A", f"{middle}.down").replace("lora_B", f"{middle}.up")
        found[new] = tensor
    return found


def comfyui(changes: Changes, unet: Any) -> Tensors:
    """With the names of its models."""
    original = original_names(unet)
    prefixes = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    return _kohya(
        changes,
        lambda part, module: (
            f"diffusion_model.{original[module]}"
            if part == "unet"
            else f"text_encoders.{prefixes[part]}.transformer.{_long(module)}"
        ),
    )


def peft(changes: Mapping[str, Change]) -> Tensors:
    """What PEFT writes of one part into `adapter_model.safetensors`."""
    named = diffusers({"unet": changes})
    return {f"base_model.model.{name.removeprefix('unet.')}": tensor for name, tensor in named.items()}
