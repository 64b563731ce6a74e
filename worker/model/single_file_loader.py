"""Loads a single file, part by part, into a pipeline.

diffusers' own converters turn each part's tensors into a component. They get the names that they know.
Weights that are stored as scaled fp8 are multiplied by their scales on the way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_TO_LDM_MAPPING,
    create_diffusers_clip_model_from_ldm,
)
from safetensors import safe_open

from worker.contract.errors import SettingsError, first_line
from worker.model import index as model_index
from worker.model.checkpoint import EMBEDS_GUIDANCE, SD2, UNET, Part
from worker.model.prediction import Prediction
from worker.model.single_file import SingleFile

# diffusers' table of a UNet's names lacks the one by which a latent consistency model takes the guidance.
DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"]["time_embedding.cond_proj.weight"] = EMBEDS_GUIDANCE[0]

#: Prefixes of parts that diffusers' converters know.
_PREFIXES = {"unet": UNET, "vae": "first_stage_model."}
_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
_OPEN_CLIP_XL = "conditioner.embedders.1.model."
#: The tokens that fill a prompt up, by tokenizer: CLIP's last token, and OpenCLIP's first.
_PAD = {"sd1": ("<|endoftext|>",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}
#: The side of the pictures of the 2.x model that predicts noise, in latents.
_SD2_BASE_SIZE = 64
#: The projection of SDXL's second text encoder where a tool made a linear layer of it, which is transposed.
_PROJECTION = "text_projection.weight"
#: Names of a VAE's attention in diffusers' first versions, and today.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load(single: SingleFile, dtype: torch.dtype, options: Mapping[str, Any]) -> Any:
    """The pipeline of `single` in `dtype`, on the CPU. `options` go to the pipeline.

    Raises `SettingsError` if the file does not fit its configs.
    """
    index = model_index.read_index(single.configs, single.source)
    classes = model_index.components(index)
    components: dict[str, Any] = {}
    for name, part in {**single.checkpoint.parts, "vae": single.vae[1]}.items():
        if name in classes:
            components[name] = _component(single, name, part, classes[name], dtype)
    if single.predicts is not None:
        tokens = components["text_encoder"].config.max_position_embeddings
        components |= tokenizers(single.configs, tokens)
        components["scheduler"] = _scheduler(single, classes["scheduler"][1], single.predicts)
    kind = getattr(diffusers, single.pipeline_class)
    return kind.from_pretrained(single.configs, **components, **options)


def _component(single: SingleFile, name: str, part: Part, kind: tuple[str, str], dtype: torch.dtype) -> Any:
    family, path = single.checkpoint.family, single.vae[0] if name == "vae" else single.path
    own = single.predicts is not None
    expected = f"that of {family.name}" if own else "what SMALLCAT_MODEL_CONFIG_DIR describes"
    try:
        tensors = _tensors(single, name, part, path, dtype)
        if name.startswith("text_encoder"):
            module = create_diffusers_clip_model_from_ldm(
                getattr(transformers, kind[1]),
                checkpoint=tensors,
                subfolder=name,
                config=str(single.configs),
                torch_dtype=dtype,
                local_files_only=True,
            )
        else:
            is_base = family is SD2 and single.predicts is not None and single.predicts.kind == "epsilon"
            changed = {"sample_size": _SD2_BASE_SIZE} if is_base and name == "unet" else {}
            if own and name == "unet" and (width := single.checkpoint.guidance_width):
                changed["time_cond_proj_dim"] = width
            if own and name == "unet" and (channels := single.checkpoint.inpainting_channels):
                changed["in_channels"] = channels
            module = getattr(diffusers, kind[1]).from_single_file(
                tensors,
                config=str(single.configs),
                subfolder=name,
                dtype=dtype,
                local_files_only=True,
                **changed,
            )
        _refuse_misfit(name, module, part)
    except Exception as error:
        # So torch says that some of the module's tensors are not among those of the file.
        lacks_some = isinstance(error, NotImplementedError) and "meta tensor" in str(error)
        why = f"{part.values:,} weights are too few" if lacks_some else first_line(error)
        raise SettingsError(
            f"The {name} of {path} is not {expected} ({why}): use another version of the "
            "model, or set SMALLCAT_MODEL_CONFIG_DIR to a folder with the configs of its components."
        ) from error
    return module


def _refuse_misfit(name: str, module: torch.nn.Module, part: Part) -> None:
    """Raise `ValueError` if the file has fewer tensors than the module needs, or more than it can use.

    diffusers leaves the first empty and the second out, without a word.
    """
    missing = next((weight for weight, value in module.named_parameters() if value.is_meta), None)
    if missing:
        raise ValueError(f"it lacks {missing}")
    more = part.values - sum(weight.numel() for weight in module.parameters())
    # Text encoders may have more than is used: 2.x leaves out the last layer.
    if more and not name.startswith("text_encoder"):
        raise ValueError(f"{abs(more):,} weights too {'many' if more > 0 else 'few'}")


def _tensors(
    single: SingleFile, name: str, part: Part, path: Path, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors of a part by the names that diffusers' converters know, still in the file."""
    read = _read(single, part, path, dtype)
    if name == "vae" and any(key.startswith("decoder.mid_block.") for key in part.names):
        return dict(as_today(key, tensor) for key, tensor in read)
    tensors = {f"{_prefix(single, name)}{key}": tensor for key, tensor in read}
    if (projection := tensors.pop(f"{_OPEN_CLIP_XL}{_PROJECTION}", None)) is not None:
        tensors[f"{_OPEN_CLIP_XL}text_projection"] = projection.T
    return tensors


def _read(
    single: SingleFile, part: Part, path: Path, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    scales = single.checkpoint.scales if path == single.path else {}
    with safe_open(path, framework="pt") as file:
        for name, stored in part.names.items():
            tensor = file.get_tensor(stored)
            if (scale := scales.get(stored)) is not None:
                factor = file.get_tensor(scale).float().reshape(-1, *[1] * (tensor.ndim - 1))
                tensor = (tensor.float() * factor).to(dtype)
            yield name, tensor


def _prefix(single: SingleFile, name: str) -> str:
    if name == "text_encoder":
        return _OPEN_CLIP if single.checkpoint.family is SD2 else _CLIP
    # Below the prefix of 2.x, the converter would leave out a layer of SDXL's second text encoder.
    return _OPEN_CLIP_XL if name == "text_encoder_2" else _PREFIXES[name]


def as_today(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A tensor of a VAE in diffusers' own layout, without the names and shapes of its first versions."""
    name = ".".join(_OLD_ATTENTION.get(word, word) for word in name.split("."))
    return name, tensor[..., 0, 0] if "attentions" in name and tensor.ndim == 4 else tensor


def tokenizers(configs: Path, tokens: int) -> dict[str, Any]:
    """The tokenizers of the family with these configs, by name, for a window of `tokens` tokens."""
    return {
        name: transformers.CLIPTokenizer.from_pretrained(
            configs.parent / "clip", model_max_length=tokens, pad_token=pad
        )
        for name, pad in zip(("tokenizer", "tokenizer_2"), _PAD[configs.name], strict=False)
    }


def _scheduler(single: SingleFile, kind: str, predicts: Prediction) -> Any:
    """The family's scheduler for what the UNet predicts.

    Zero terminal SNR takes the whole schedule, from its last step on: "trailing" in Lin et al. (2023).
    """
    config = json.loads((single.configs / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    config["prediction_type"] = predicts.kind
    if single.checkpoint.guidance_width:
        # As latent consistency models are published; the schedule is that of the model they were made from.
        return diffusers.LCMScheduler.from_config(config, set_alpha_to_one=True)
    if predicts.zero_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if predicts.zero_snr and kind == "PNDMScheduler":
        kind = "DDIMScheduler"  # PNDM, the scheduler of 1.x, knows no zero terminal SNR.
    if single.checkpoint.family is SD2 and predicts.kind == "epsilon":
        kind = "PNDMScheduler"  # As the 2.x of 512 pixels has it.
    return getattr(diffusers, kind).from_config(config)
