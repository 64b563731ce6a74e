"""Tiny text-to-image models, built and saved on the spot: a few hundred KB each, the same bytes each time.

They have the shape of the real ones in everything that smallcat's code can get wrong (components, latent
channels, VAE factor, tokens, prediction type, second text encoder, distilled guidance) and random weights.
Each builder writes a folder that `diffusers` loads, and returns it. Pictures are 64 x 64 pixels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests import original_layout

#: Width of each tiny text encoder.
_TEXT_WIDTH = 32
_ATTENDS_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
}
#: The mask and the latents of the masked image besides the latents.
_INPAINTING = {"in_channels": 4 + 1 + 4}
#: Betas of Stable Diffusion.
_NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_sd1(
    folder: Path, *, safety_checker: str = "none", attends_first: bool = False, inpainting: bool = False
) -> Path:
    """Stable Diffusion 1.x: predicts noise, PNDM, 77 tokens, 4 latent channels, VAE factor 8.

    `attends_first`: in the UNet's first block, as the real ones do, not in the second; and two layers.
    `inpainting`: its UNet takes 9 channels, as Stable Diffusion 1.5 for inpainting has it.
    `safety_checker` is "none", or one that finds fault with "all" pictures or with "nothing".
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        checked = safety_checker != "none"
        kind: Any = diffusers.StableDiffusionPipeline
        if inpainting:
            kind = diffusers.StableDiffusionInpaintPipeline
        pipeline = kind(
            vae=vae(channels=4, levels=4),
            text_encoder=text_encoder(77),
            tokenizer=tokenizer(77),
            unet=_unet(
                channels=4,
                sample_size=8,
                **(_ATTENDS_FIRST if attends_first else {}),
                **(_INPAINTING if inpainting else {}),
            ),
            scheduler=diffusers.PNDMScheduler(
                **_NOISE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
            ),
            safety_checker=_safety_checker(finds_all=safety_checker == "all") if checked else None,
            feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
            if checked
            else None,
            requires_safety_checker=checked,
        )
    return _save(pipeline, folder)


def tiny_sd2(folder: Path, *, zero_terminal_snr: bool = False) -> Path:
    """Stable Diffusion 2.x: predicts v, DDIM, 16 tokens, 8 latent channels, VAE factor 4."""
    zero: dict[str, Any] = (
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_terminal_snr else {}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        pipeline = diffusers.StableDiffusionPipeline(
            vae=vae(channels=8, levels=3),
            text_encoder=text_encoder(16),
            tokenizer=tokenizer(16),
            unet=_unet(channels=8, sample_size=16, use_linear_projection=True, upcast_attention=True),
            scheduler=diffusers.DDIMScheduler(
                **_NOISE, **zero, prediction_type="v_prediction", clip_sample=False, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _save(pipeline, folder)


def tiny_sdxl(folder: Path, *, latents_mean: bool = False, inpainting: bool = False) -> Path:
    """SDXL: two text encoders, pooled text, time ids, Euler, zeros for an empty negative prompt.

    `inpainting`: its UNet takes 9 channels, as SDXL 0.1 for inpainting has it.
    """
    moments: dict[str, Any] = (
        {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.1, 0.9, 1.2, 0.8]} if latents_mean else {}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        kind: Any = diffusers.StableDiffusionXLPipeline
        if inpainting:
            kind = diffusers.StableDiffusionXLInpaintPipeline
        pipeline = kind(
            vae=vae(channels=4, levels=4, **moments),
            text_encoder=text_encoder(77),
            tokenizer=tokenizer(77),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(77, projection_dim=_TEXT_WIDTH)),
            tokenizer_2=tokenizer(77, pad_token="!"),
            unet=_unet(
                channels=4,
                sample_size=8,
                cross_attention_dim=2 * _TEXT_WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + _TEXT_WIDTH,
                use_linear_projection=True,
                **(_INPAINTING if inpainting else {}),
            ),
            scheduler=diffusers.EulerDiscreteScheduler(**_NOISE, steps_offset=1, timestep_spacing="leading"),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
    return _save(pipeline, folder)


def tiny_lcm(folder: Path, *, pipeline_class: str = "LatentConsistencyModelPipeline") -> Path:
    """A latent consistency model: its UNet takes the guidance as an embedding, and one row does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        pipeline = getattr(diffusers, pipeline_class)(
            vae=vae(channels=4, levels=4),
            text_encoder=text_encoder(77),
            tokenizer=tokenizer(77),
            unet=_unet(channels=4, sample_size=8, time_cond_proj_dim=16),
            scheduler=diffusers.LCMScheduler(**_NOISE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _save(pipeline, folder)


def tiny_single_file(folder: Path) -> tuple[Path, Path]:
    """`tiny_sd1` as one .safetensors file in the original layout, and the folder with its configs.

    The configs' folder has no weights. diffusers gives the same pictures for the file and for `tiny_sd1`.
    """
    configs = tiny_sd1(folder / "configs")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(configs, safety_checker=None)
    path = folder / "tiny.safetensors"
    save_file(original_layout.checkpoint(pipeline), path)
    for weights in configs.rglob("*.safetensors"):
        weights.unlink()
    return path, configs


def _unet(*, channels: int, sample_size: int, **more: Any) -> diffusers.UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": _TEXT_WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return diffusers.UNet2DConditionModel(**config | more)


def vae(*, channels: int, levels: int, **more: Any) -> diffusers.AutoencoderKL:
    """A VAE that uses the whole range of pixel values, so that pictures differ where latents do."""
    model = diffusers.AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        sample_size=64,
        **more,
    )
    with torch.no_grad():
        model.decoder.conv_out.weight *= 2
    return model


def tiny_vae(*, channels: int = 4, levels: int = 4, seed: int = 5, **more: Any) -> diffusers.AutoencoderTiny:
    """A VAE of TAESD's kind, of 8 channels, that uses the whole range of pixel values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options: dict[str, Any] = {
            "encoder_block_out_channels": (8,) * levels,
            "decoder_block_out_channels": (8,) * levels,
            "num_encoder_blocks": (1,) * levels,
            "num_decoder_blocks": (1,) * levels,
        }
        model: Any = diffusers.AutoencoderTiny(latent_channels=channels, **options | more)
    with torch.no_grad():
        for layer, scale in ((model.decoder.layers[-1], 6.0), (model.encoder.layers[-1], 8.0)):
            layer.weight *= scale
    return model.eval()


def _text_config(tokens: int, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=_TEXT_WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        bos_token_id=512,
        eos_token_id=513,
        **more,
    )


def text_encoder(tokens: int) -> CLIPTextModel:
    """CLIP's text encoder, for so many tokens."""
    return CLIPTextModel(_text_config(tokens)).eval()


def tokenizer(tokens: int, **more: Any) -> CLIPTokenizer:
    """CLIP's tokenizer without merges: a token a byte."""
    characters = list(bytes_to_unicode().values())
    names = [
        *characters,
        *(f"{character}</w>" for character in characters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {name: index for index, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=tokens, **more)


def _safety_checker(*, finds_all: bool) -> StableDiffusionSafetyChecker:
    """One whose thresholds on the cosine, -2 or 2, no picture can miss or reach."""
    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    config = CLIPConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        text_config={**tower, "vocab_size": 16},
        projection_dim=8,
    )
    checker = StableDiffusionSafetyChecker(config).eval()
    with torch.no_grad():
        checker.concept_embeds.copy_(torch.randn(17, 8))
        checker.special_care_embeds.copy_(torch.randn(3, 8))
        checker.concept_embeds_weights.fill_(-2.0 if finds_all else 2.0)
        checker.special_care_embeds_weights.fill_(2.0)
    return checker


def _save(pipeline: diffusers.DiffusionPipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def set_defaults(folder: Path, **values: float) -> None:
    """Write the model's own steps and guidance_scale beside its model_index.json."""
    (folder / "smallcat.json").write_text(json.dumps(values))
