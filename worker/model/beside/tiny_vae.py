"""Tiny VAEs (TAESD): diffusers' `AutoencoderTiny`, which decodes in a fraction of a VAE's time and memory.

Read is diffusers' layout, with its config or without. What its authors publish besides, an encoder and a
decoder in a file each, is refused with a word on what to use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worker.contract.errors import SettingsError
from worker.model.headers import Tensor

#: The class in a config.
CLASS = "AutoencoderTiny"
#: The first layers of its decoder and of its encoder.
_FIRST, _FIRST_OF_ENCODER = "decoder.layers.0.weight", "encoder.layers.0.weight"
#: Those of a file with one half of it, in the authors' own layout: the decoder's first layer has no weights.
_HALVES = (frozenset(("0.weight", "0.bias")), frozenset(("1.weight", "1.bias")))


def is_tiny(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file with these tensors is a tiny VAE. Raises `SettingsError` for one half of one."""
    is_half = any(half <= tensors.keys() for half in _HALVES) and not any(
        name.startswith(("decoder.", "encoder.", "first_stage_model.", "model.")) for name in tensors
    )
    has = _FIRST in tensors, _FIRST_OF_ENCODER in tensors
    if is_half or (any(has) and not all(has)):
        raise SettingsError(
            "it is the encoder or the decoder of a tiny VAE (TAESD) alone: use its folder in the format of "
            "diffusers, which has both"
        )
    return all(has)


def channels_of(tensors: Mapping[str, Tensor]) -> int:
    """How many channels its latents have. Raises `SettingsError` where its first layer is of another kind."""
    shape = tensors[_FIRST].shape
    if len(shape) != 4:
        raise SettingsError(f"its first layer has the shape {shape}, a VAE of pictures has four sides")
    return int(shape[1])


def config_for(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config of a file that has none: TAESD's, with the width and the channels of its first layer."""
    width = tensors[_FIRST].shape[0]
    return {
        "latent_channels": channels_of(tensors),
        "encoder_block_out_channels": (width,) * 4,
        "decoder_block_out_channels": (width,) * 4,
    }


def problem_of(config: Any) -> str:
    """Why pipelines cannot use a VAE with this config, as the end of "The VAE has"; empty where they can."""
    encoder, decoder = config.encoder_block_out_channels, config.decoder_block_out_channels
    if len(encoder) != len(decoder):
        return f"an encoder of {len(encoder)} levels and a decoder of {len(decoder)}"
    if config.upsampling_scaling_factor != 2:
        return f"steps of upsampling by {config.upsampling_scaling_factor}, not by 2"
    if (config.in_channels, config.out_channels) != (3, 3):
        return f"pictures of {config.in_channels} and {config.out_channels} channels, not of 3"
    # Of the pipelines served here none applies it.
    if config.shift_factor:
        return f"latents that are shifted by {config.shift_factor}, as those of another kind of model are"
    return ""
