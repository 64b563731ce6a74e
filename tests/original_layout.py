"""Stable Diffusion's original layout: the tensors of a diffusers pipeline under the names of single files.

The opposite of what diffusers' converters do, for any number of blocks and layers; so a pipeline on torch's
meta device gives the names and shapes of a full-size checkpoint. The names are those of CompVis' and
Stability AI's releases: SD 1.5, SD 2.1 and SDXL 1.0.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModelWithProjection

Tensors = dict[str, torch.Tensor]

#: Bytes of a number, by safetensors' name of its dtype.
SIZES = {"F32": 4, "F16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1}

_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_OUTSIDE = (
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)


def unet(model: Any) -> Tensors:
    """A `UNet2DConditionModel`, without prefix."""
    per_block, blocks = model.config.layers_per_block, len(model.config.block_out_channels)
    places: dict[str, str] = {}
    for block in range(blocks):
        attends = "CrossAttn" in model.config.up_block_types[block]
        for layer in range(per_block):
            at = 1 + block * (per_block + 1) + layer
            places[f"down_blocks.{block}.resnets.{layer}."] = f"input_blocks.{at}.0."
            places[f"down_blocks.{block}.attentions.{layer}."] = f"input_blocks.{at}.1."
        after = (block + 1) * (per_block + 1)
        places[f"down_blocks.{block}.downsamplers.0.conv."] = f"input_blocks.{after}.0.op."
        for layer in range(per_block + 1):
            at = block * (per_block + 1) + layer
            places[f"up_blocks.{block}.resnets.{layer}."] = f"output_blocks.{at}.0."
            places[f"up_blocks.{block}.attentions.{layer}."] = f"output_blocks.{at}.1."
        last = block * (per_block + 1) + per_block
        places[f"up_blocks.{block}.upsamplers.0.conv."] = f"output_blocks.{last}.{1 + attends}.conv."
    places |= {
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
    }
    found = {}
    for name, tensor in model.state_dict().items():
        new = name
        for start, place in places.items():
            if name.startswith(start):
                new = place + name.removeprefix(start)
                break
        for old, original in _OUTSIDE:
            new = re.sub(rf"^{re.escape(old)}\.", f"{original}.", new)
        if ".resnets." in name:
            for old, original in _RESNET:
                new = re.sub(rf"\.{old}\.", f".{original}.", new)
        found[new] = tensor
    return found


def vae(model: Any) -> Tensors:
    """An `AutoencoderKL`, without prefix."""
    last = len(model.config.block_out_channels) - 1
    found = {}
    for name, tensor in model.state_dict().items():
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{last - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_shortcut", "nin_shortcut")
        new = new.replace("conv_norm_out", "norm_out").replace("group_norm", "norm")
        new = re.sub(r"\.to_([qkv])\.", r".\1.", new).replace(".to_out.0.", ".proj_out.")
        is_attention = ".attentions." in name and tensor.ndim == 2
        found[new] = tensor[:, :, None, None] if is_attention else tensor
    return found


def clip(model: Any) -> Tensors:
    """A `CLIPTextModel` as transformers names it, from `embeddings.` on."""
    return {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}


def open_clip(model: Any, *, layers: int = 0) -> Tensors:
    """A text encoder in the layout of OpenCLIP. `layers`: unused layers at the end, as 2.x has one."""
    state = clip(model)
    found: Tensors = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.zeros(()),
    }
    width = state["embeddings.token_embedding.weight"].shape[1]
    projection = state.get("text_projection.weight")
    found["text_projection"] = torch.eye(width) if projection is None else projection.T
    count = model.config.num_hidden_layers
    for layer in range(count + layers):
        old, new = f"encoder.layers.{min(layer, count - 1)}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            joined = [state[f"{old}self_attn.{each}_proj.{kind}"] for each in "qkv"]
            found[f"{new}attn.in_proj_{kind}"] = torch.cat(joined)
            for theirs, ours in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                found[f"{new}{ours}.{kind}"] = state[f"{old}{theirs}.{kind}"]
    return found


def checkpoint(pipeline: Any) -> Tensors:
    """A pipeline of SD 1.x, 2.x or SDXL as its first release names its tensors."""
    parts = {"model.diffusion_model.": unet(pipeline.unet), "first_stage_model.": vae(pipeline.vae)}
    text = pipeline.text_encoder
    if (second := getattr(pipeline, "text_encoder_2", None)) is not None:
        assert isinstance(second, CLIPTextModelWithProjection)
        parts["conditioner.embedders.0.transformer.text_model."] = clip(text)
        parts["conditioner.embedders.1.model."] = open_clip(second)
    elif pipeline.unet.config.use_linear_projection:
        parts["cond_stage_model.model."] = open_clip(text, layers=1)
    else:
        parts["cond_stage_model.transformer.text_model."] = clip(text)
    return under(parts)


def under(parts: Mapping[str, Tensors]) -> Tensors:
    """All tensors of `parts`, below their prefixes, each with memory of its own."""
    return {
        f"{prefix}{name}": tensor.clone().contiguous()
        for prefix, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def write_header(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> Path:
    """A .safetensors file of these tensors, all zero, that is a hole on the disk."""
    size, at, entries = SIZES[dtype], 0, {}
    for name, shape in shapes.items():
        end = at + size * torch.Size(shape).numel()
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path
