"""What a single file is, by the names of its tensors; and the sentence for each file that is no model.

The names are those that the formats' tools write.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import original_layout
from worker.contract.errors import SettingsError
from worker.contract.settings import WorkerSettings
from worker.model import checkpoint, headers
from worker.model import files as model_files

Shapes = dict[str, tuple[int, ...]]

UNET: Shapes = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
}
VAE: Shapes = {"first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3)}
CLIP: Shapes = {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (9, 8)}
XL: Shapes = {
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (9, 8),
    "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": (8, 8),
    "model.diffusion_model.label_emb.0.0.weight": (8, 8),
}
SD1, SDXL = UNET | VAE | CLIP, UNET | VAE | XL


def one(*names: str) -> Shapes:
    return dict.fromkeys(names, (1,))


def inputs(channels: int) -> Shapes:
    return {"model.diffusion_model.input_blocks.0.0.weight": (320, channels, 3, 3)}


def without(shapes: Shapes, start: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not name.startswith(start)}


REFUSED: dict[str, tuple[Shapes, str]] = {
    # Small files for a model.
    "LoRA of kohya's": (one("lora_unet_mid_block_attentions_0.lora_down.weight"), "is a LoRA, which changes"),
    "LoRA of text encoders": (one("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"), "is a LoRA"),
    "LoRA of PEFT": (one("unet.down_blocks.1.attentions.0.proj_in.lora_A.weight"), "is a LoRA"),
    "LoRA of diffusers before PEFT": (one("unet.mid_block.attentions.0.to_q_lora.up.weight"), "is a LoRA"),
    "LoRA for FLUX": (one("transformer.single_transformer_blocks.0.attn.to_k.lora_B.weight"), "is a LoRA"),
    "LoRA for FLUX in its own layout": (one("double_blocks.0.img_attn.qkv.lora_A.weight"), "is a LoRA"),
    "LoHa": (one("lora_unet_x.hada_w1_a"), "is a LoRA.* LoRAs are not served yet"),
    "LoKr of LyCORIS": (one("lycoris_transformer.lokr_w1"), "is a LoRA"),
    "ControlNet": (one("control_model.time_embed.0.weight"), "is a ControlNet, which steers"),
    "ControlNet with its model": (SD1 | one("control_model.input_blocks.0.0.weight"), "is a ControlNet"),
    "ControlNet of diffusers": (
        one(
            "controlnet_cond_embedding.conv_in.weight", "conv_in.weight", "down_blocks.0.resnets.0.conv1.bias"
        ),
        "ControlNets are not served yet",
    ),
    "Control-LoRA": (one("lora_controlnet", "input_hint_block.0.weight"), "is a ControlNet"),
    "IP-Adapter": (one("image_proj.norm.bias", "ip_adapter.1.to_k_ip.weight"), "is an IP-Adapter"),
    "T2I-Adapter": (one("body.0.block1.weight", "conv_in.weight"), "is a T2I-Adapter"),
    "textual inversion": (one("emb_params"), "is a textual inversion"),
    "textual inversion of SDXL": (one("clip_g", "clip_l"), "is a textual inversion"),
    "motion module": (one("down_blocks.0.motion_modules.0.temporal_transformer.norm.bias"), "AnimateDiff"),
    # Parts.
    "VAE": (
        one("encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"),
        "is a VAE alone: .*vae.safe",
    ),
    "VAE of diffusers": (one("decoder.mid_block.resnets.0.conv1.bias", "encoder.conv_in.bias"), "VAE alone"),
    "VAE with its prefix": (VAE, "is a VAE alone"),
    "CLIP": (one("text_model.encoder.layers.0.mlp.fc1.bias"), "is a text encoder alone: use the complete"),
    "OpenCLIP": (one("transformer.resblocks.0.attn.in_proj_weight"), "is a text encoder alone"),
    "CLIP's image encoder": (one("vision_model.encoder.layers.0.mlp.fc1.bias"), "is CLIP's image encoder"),
    "T5": (one("encoder.block.0.layer.0.SelfAttention.k.weight"), "is a text encoder alone"),
    "language model": (one("model.layers.0.self_attn.k_proj.weight"), "is a text encoder alone"),
    "UNet": (one("input_blocks.0.0.weight"), "is a UNet alone: use the complete checkpoint"),
    "UNet with its prefix": (UNET, "has a UNet and no text encoder: use the complete checkpoint"),
    "UNet and VAE": (UNET | VAE, "has a UNet and no text encoder"),
    "UNet of diffusers": (
        one("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
        r"is the UNet of a folder in the format of diffusers.*the folder with model_index\.json",
    ),
    "UNet with another prefix": (
        {name.replace("model.diffusion_model.", "unet."): shape for name, shape in SD1.items()},
        "is a UNet alone",
    ),
    "diffusers' names in one file": (
        one(
            "unet.conv_in.weight",
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
            "vae.decoder.conv_in.weight",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.bias",
        ),
        "all components in one file: set SMALLCAT_MODEL to the folder",
    ),
    "TAESD of diffusers": (one("encoder.layers.0.weight", "decoder.layers.3.conv.0.weight"), "is a tiny VAE"),
    "TAESD": (one("taesd_encoder.0.weight"), "is a tiny VAE"),
    "averaged weights alone": (
        VAE | CLIP | one("model_ema.diffusion_modelinput_blocks00weight"),
        "nothing but averaged weights",
    ),
    "SDXL without its first text encoder": (
        without(SDXL, "conditioner.embedders.0."),
        "lacks SDXL's first text encoder",
    ),
    "SDXL without its second text encoder": (
        without(SDXL, "conditioner.embedders.1."),
        "lacks SDXL's second text encoder",
    ),
    "upscaler": (one("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"), "is an upscaler"),
    # Other models.
    "SD 3": (
        one("model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"),
        "is a Stable Diffusion 3 model, which is not served yet",
    ),
    "FLUX": (one("double_blocks.0.img_attn.norm.key_norm.scale"), "is a FLUX model or of its kind"),
    "FLUX from ComfyUI": (
        one("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"),
        "is a FLUX model",
    ),
    "Stable Cascade": (one("clip_txt_mapper.weight"), "is a Stable Cascade model"),
    "PixArt": (one("transformer_blocks.0.scale_shift_table"), "is a transformer for diffusion"),
    "Wan": (one("model.diffusion_model.blocks.0.cross_attn.k.weight"), "is a transformer for diffusion"),
    "Qwen-Image": (one("transformer_blocks.0.img_mlp.net.0.proj.bias"), "is a transformer for diffusion"),
    "SVD": (
        UNET | one("model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.bias"),
        "is a video model",
    ),
    "AltDiffusion": (
        UNET | one("cond_stage_model.roberta.embeddings.word_embeddings.weight"),
        "is an AltDiffusion model",
    ),
    "unCLIP": (SD1 | one("embedder.model.ln_final.weight"), "is an unCLIP model"),
    "Zero123": (SD1 | inputs(8) | one("cc_projection.weight"), "is a Zero123 model"),
    "depth": (SD1 | inputs(5) | one("depth_model.model.scratch.output_conv.0.bias"), "is a depth-to-image"),
    "Playground 2.5": (SDXL | one("edm_mean", "edm_std"), "is Playground 2.5 .*EDM"),
    "CosXL": (SDXL | one("edm_vpred.sigma_max"), "is CosXL .*EDM"),
    "SSD-1B": (
        {name: shape for name, shape in SDXL.items() if "middle_block" not in name},
        "is a smaller SDXL .*folder in the format of diffusers",
    ),
    "LCM of SDXL with diffusers' name": (
        SDXL | one("model.diffusion_model.time_embedding.cond_proj.weight"),
        "is a latent consistency model of SDXL.*folder in the format of diffusers",
    ),
    "LCM of SDXL": (
        SDXL | one("model.diffusion_model.time_embed.cond_proj.weight"),
        "is a latent consistency model of SDXL",
    ),
    # Other uses of the same family.
    "InstructPix2Pix": (
        SD1 | inputs(8),
        "is a model that edits pictures.* not served: use a version for text to image or inpainting",
    ),
    "upscaler of 2.x": (SD1 | inputs(7), "is an upscaler .* takes 7 channels and gives 4"),
    "SDXL refiner": (
        UNET
        | VAE
        | one(
            "conditioner.embedders.0.model.transformer.resblocks.0.mlp.c_fc.weight",
            "model.diffusion_model.label_emb.0.0.weight",
        ),
        "is SDXL's refiner, .*: use SDXL's base model",
    ),
    # None of all that.
    "something else": (one("a", "b", "c"), r"is not a Stable Diffusion checkpoint \(it has a, b\): use a"),
    "nothing": ({}, r"is not a Stable Diffusion checkpoint \(it has no tensors\)"),
    "a UNet in part": (
        without(SD1, "model.diffusion_model.out."),
        "has an incomplete UNet: use the complete checkpoint",
    ),
    "a scale for nothing": (
        SD1 | one("model.diffusion_model.x.scale_weight"),
        "has the scale .*fits no weight",
    ),
    "scales of blocks": (
        SD1
        | {
            "model.diffusion_model.x.weight": (64, 64),
            "model.diffusion_model.x.weight_scale": (64, 4),
        },
        "has the scale .*fits no weight: use a version in fp16",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_no_model_to_serve(tmp_path: Path, kind: str) -> None:
    shapes, sentence = REFUSED[kind]
    path = original_layout.write_header(tmp_path / "given.safetensors", shapes)
    with pytest.raises(SettingsError, match=sentence) as caught:
        model_files.find(WorkerSettings(model=str(path)), half=False)
    text = str(caught.value)
    assert text.startswith(f"The file {path} ")
    assert text.endswith(".")
    assert "\n" not in text
    assert "again" not in text, "another download would be the same file"


@pytest.mark.parametrize("dtype", ["U8", "I8"])
def test_a_quantised_file(tmp_path: Path, dtype: str) -> None:
    """As bitsandbytes, GPTQ or ComfyUI's int8 and nvfp4 leave it."""
    path = original_layout.write_header(tmp_path / "given.safetensors", SD1, dtype)
    with pytest.raises(
        SettingsError, match=rf"is quantised \(\S+ is {dtype}\), which is not read: use a ver"
    ):
        checkpoint.identify(headers.read_header(path).tensors, str(path))


@pytest.mark.parametrize(
    ("shapes", "family", "texts"),
    [
        (SD1, checkpoint.SD1, {"text_encoder"}),
        (SDXL, checkpoint.SDXL, {"text_encoder", "text_encoder_2"}),
        (
            UNET | VAE | one("cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.bias"),
            checkpoint.SD2,
            {"text_encoder"},
        ),
        (
            UNET | VAE | one("conditioner.embedders.0.model.transformer.resblocks.0.mlp.c_fc.bias"),
            checkpoint.SD2,
            {"text_encoder"},
        ),
    ],
)
def test_the_family_of_a_checkpoint(
    tmp_path: Path, shapes: Shapes, family: checkpoint.Family, texts: set[str]
) -> None:
    path = original_layout.write_header(tmp_path / "given.safetensors", shapes)
    found = checkpoint.identify(headers.read_header(path).tensors, "a file")
    assert found.family is family
    assert set(found.parts) == {"unet", "vae", *texts}
    assert not found.has_ema
    assert not found.scales
    assert not found.inpainting_channels


@pytest.mark.parametrize("shapes", [SD1, SDXL])
def test_a_checkpoint_made_for_inpainting(shapes: Shapes, tmp_path: Path) -> None:
    path = original_layout.write_header(tmp_path / "given.safetensors", shapes | inputs(9))
    assert checkpoint.identify(headers.read_header(path).tensors, "a file").inpainting_channels == 9
