"""Makes models of full size with random weights, to measure without downloads.

    python -m worker.bench.shapes sd15 DIR

DIR becomes a diffusers folder, which a worker serves by `SMALLCAT_MODEL=DIR`. Its speed and memory are those
of the real model; its pictures are noise. The weights are drawn as torch's layers draw their own, which keeps
every activation finite in fp16. The same seed gives the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import click
import diffusers
import torch
import transformers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Imported for its effect: it must run before diffusers loads its models below and finds xformers.
import worker.device.attention  # noqa: F401
from worker.contract.errors import SettingsError

#: Stable Diffusion 1.5, SDXL base, and 1.5 distilled to a latent consistency model.
Shapes = Literal["sd15", "sdxl", "sd15-lcm"]
#: The file beside model_index.json that says how the folder was made.
MARK = "shapes.json"
#: CLIP's number of tokens in its vocabulary, and in a text.
VOCABULARY, TOKENS = 49_408, 77
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
#: Standard deviation of CLIP's token and position embeddings before training (`initializer_factor` 1).
_EMBEDDING_STD = 0.02
_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Architecture:
    """A pipeline without weights: the arguments of each component's class."""

    pipeline: type
    unet: dict[str, Any]
    vae: dict[str, Any]
    #: One text encoder, or SDXL's two.
    texts: tuple[dict[str, Any], ...]
    scheduler: Callable[..., Any]
    scheduler_options: dict[str, Any]
    #: Further arguments of the pipeline.
    options: dict[str, Any] = field(default_factory=dict)


#: The autoencoder of all three.
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
#: CLIP ViT-L/14's text encoder.
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
#: OpenCLIP ViT-bigG/14's text encoder.
_CLIP_BIGG = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}


def architecture(shapes: Shapes) -> Architecture:
    """The architecture as published (model_index.json and the configs in its repository on the hub)."""
    if shapes == "sdxl":
        return Architecture(
            pipeline=diffusers.StableDiffusionXLPipeline,
            unet={
                "sample_size": 128,
                "block_out_channels": (320, 640, 1280),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10),
                "attention_head_dim": (5, 10, 20),
                "cross_attention_dim": 768 + 1280,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 6 * 256 + 1280,
            },
            vae={**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
            texts=(_CLIP_L, _CLIP_BIGG),
            scheduler=diffusers.EulerDiscreteScheduler,
            scheduler_options={"steps_offset": 1, "timestep_spacing": "leading"},
            options={"force_zeros_for_empty_prompt": True, "add_watermarker": False},
        )
    is_lcm = shapes == "sd15-lcm"
    return Architecture(
        pipeline=diffusers.LatentConsistencyModelPipeline if is_lcm else diffusers.StableDiffusionPipeline,
        unet={
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "attention_head_dim": 8,  # the number of heads, by diffusers' old name
            "cross_attention_dim": 768,
            "time_cond_proj_dim": 256 if is_lcm else None,
        },
        vae={**_VAE, "sample_size": 512},
        texts=(_CLIP_L,),
        scheduler=diffusers.LCMScheduler if is_lcm else diffusers.PNDMScheduler,
        scheduler_options={}
        if is_lcm
        else {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False},
        options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    )


def make(shapes: Shapes, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16) -> Path:
    """Make `folder` a model of `shapes` with random weights of `dtype`, unless it is one. Returns `folder`.

    The folder appears complete or not at all. Raises `SettingsError` if `folder` holds something else.
    """
    mark = {"shapes": shapes, "seed": seed, "dtype": str(dtype).removeprefix("torch.")}
    if _holds(folder, mark):
        return folder
    # The libraries would warn of missing safety checkers and of weights that are not drawn yet.
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        save(architecture(shapes), draft, seed=seed, dtype=dtype)
        (draft / MARK).write_text(json.dumps(mark))
        try:
            draft.rename(folder)
        except OSError:
            if not _holds(folder, mark):  # Another process may have made it meanwhile.
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def save(plan: Architecture, folder: Path, *, seed: int, dtype: torch.dtype) -> None:
    """Write `plan` with random weights to `folder`, in the format of diffusers."""
    # On torch's meta device nothing is drawn or stored, so that modules are built at once.
    with torch.device("meta"):
        modules = {
            "unet": diffusers.UNet2DConditionModel(**plan.unet),
            "vae": diffusers.AutoencoderKL(**plan.vae),
            **text_encoders(plan.texts),
        }
    for name, module in modules.items():
        fill(module.to(dtype).to_empty(device="cpu").requires_grad_(False), f"{seed} {name}")
    tokenizers = {name.replace("text_encoder", "tokenizer"): name for name in modules if "text" in name}
    pipeline = plan.pipeline(
        **modules,
        **{name: tokenizer(pad_token="!" if name.endswith("_2") else None) for name in tokenizers},
        scheduler=plan.scheduler(**_BETAS, **plan.scheduler_options),
        **plan.options,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def tokenizer(*, pad_token: str | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer without merges, which would need a download: a token per byte, and CLIP's ends."""
    characters = list(bytes_to_unicode().values())  # type: ignore[no-untyped-call]
    names = [*characters, *(f"{character}</w>" for character in characters)]
    names += [f"<|unused {index}|>" for index in range(len(names), VOCABULARY - 2)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    options = {"pad_token": pad_token} if pad_token else {}
    return CLIPTokenizer(
        vocab={name: index for index, name in enumerate(names)}, merges=[], model_max_length=TOKENS, **options
    )


def _holds(folder: Path, mark: dict[str, Any]) -> bool:
    """Whether `folder` was made as `mark` says, or does not exist. Raises `SettingsError` otherwise."""
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / MARK).read_text())
    except (OSError, ValueError):
        found = "something else"
    if found != mark:
        raise SettingsError(f"{folder} holds {found}, not {mark}: name another folder, or delete this one.")
    return True


def text_encoders(configs: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """CLIP's text encoders by their names in a pipeline. If there are two, the second has a projection."""
    ids: dict[str, Any] = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1}
    first, *second = (
        CLIPTextConfig(vocab_size=VOCABULARY, max_position_embeddings=TOKENS, **ids, **config)
        for config in configs
    )
    encoders: dict[str, Any] = {"text_encoder": CLIPTextModel(first)}
    if second:
        encoders["text_encoder_2"] = CLIPTextModelWithProjection(second[0])
    return encoders


def fill(model: torch.nn.Module, seed: str) -> None:
    """Draw all weights of `model`, each tensor from a seed of its own, on all cores.

    Raises `TypeError` for a weight that is not of a linear or convolution layer, an embedding or a norm.
    """

    def draw(weight: torch.Tensor, name: str, bound: float) -> None:
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        drawn = []
        for path, module in model.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
                    weight.fill_(1.0 if name == "weight" else 0.0)
                else:
                    drawn.append(pool.submit(draw, weight, f"{path}.{name}", _bound(module)))
        for each in drawn:
            each.result()


def _bound(module: torch.nn.Module) -> float:
    """The bound of the uniform distribution of the weights of `module`, -bound to bound."""
    if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
        # As torch initializes both: kaiming_uniform_ with a = sqrt(5).
        return 1 / math.sqrt(module.weight[0].numel())
    if isinstance(module, torch.nn.Embedding):
        return _EMBEDDING_STD * math.sqrt(3)
    raise TypeError(f"There is no rule for the weights of a {type(module).__name__}: add one.")


@click.command()
@click.argument("shapes", type=click.Choice(get_args(Shapes)))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Seed of the weights.")
@click.option("--dtype", default="fp16", show_default=True, type=click.Choice(list(_DTYPES)))
def main(shapes: Shapes, folder: Path, seed: int, dtype: str) -> None:
    """Make FOLDER a model of full size with random weights, for SMALLCAT_MODEL."""
    try:
        click.echo(make(shapes, folder, seed=seed, dtype=_DTYPES[dtype]))
    except SettingsError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
