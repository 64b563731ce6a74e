"""Trains the LoRAs of the bundled model: `python -m worker.demo.training.loras --out OUT`, minutes a style.

The pictures are those that the model was trained on, as a style's filter (`styles.py`) makes them, with the
captions that they have without it. Only the UNet learns: a LoRA changes how things are drawn, not what a
prompt means.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from worker.demo.training.captions import SceneWriter
from worker.demo.training.denoiser import signal_shares, tokens_of
from worker.demo.training.evaluate import MODEL
from worker.demo.training.scenes import Composer, SceneBatch
from worker.demo.training.styles import STYLES
from worker.demo.training.subjects import load_subjects

#: The UNet's layers that learn: attention, and the convolutions of the ResNet blocks.
LAYERS = re.compile(r".*\.(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|conv1|conv2|conv_shortcut)")
#: Steps between two lines of what was printed.
_SAY_EVERY = 50


@dataclass(frozen=True)
class LoraRecipe:
    """Sizes, amounts of data and times. The defaults are those of the bundled LoRAs."""

    #: Seed of scenes, noise and initial weights.
    seed: int = 0
    #: Pixels a side of the pictures.
    size: int = 128
    #: Pictures of a style. Each is drawn and encoded once.
    pictures: int = 1_024
    #: Of each layer's factors.
    rank: int = 8
    #: Steps, and pictures in each.
    steps: int = 1_000
    batch: int = 16
    #: The highest learning rate: it rises over a tenth of the steps, and falls to 0 as a cosine.
    rate: float = 2e-3


@dataclass(frozen=True)
class Examples:
    """The pictures of a style, as the UNet sees them."""

    #: float32 (n, channels, size / 8, size / 8).
    latents: torch.Tensor
    #: What the text encoder makes of their captions: float32 (n, MAX_TOKENS, width).
    text: torch.Tensor


class LowRank(nn.Module):
    """A weight with the product of two factors added, at scale 1; at first the product is 0.

    It is added before the layer is computed: on a CPU that takes half the time of PEFT's two small layers
    beside the layer.
    """

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, *weight.shape[1:]) / weight[0].numel() ** 0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the product."""
        return weight + (self.up @ self.down.flatten(1)).view(weight.shape)


@torch.no_grad()
def examples(
    style: Callable[[torch.Tensor], torch.Tensor],
    pipeline: StableDiffusionPipeline,
    writer: SceneWriter,
    composer: Composer,
    recipe: LoraRecipe,
) -> Examples:
    """Draws scenes, filters and encodes them."""
    scenes = [writer.draw() for _ in range(recipe.pictures)]
    batch = SceneBatch.of(scenes, composer.device)
    latents = []
    for part in torch.arange(len(scenes)).split(32):
        drawn = composer.draw(batch[part].layout(recipe.size, recipe.size), recipe.size, recipe.size)
        latents.append(pipeline.vae.encode(style(drawn)).latent_dist.mode())
    tokens = tokens_of([scene.caption for scene in scenes], pipeline.tokenizer)
    text = [pipeline.text_encoder(part)[0] for part in tokens.split(64)]
    return Examples(torch.cat(latents) * pipeline.vae.config.scaling_factor, torch.cat(text))


def train_lora(
    unet: UNet2DConditionModel, data: Examples, recipe: LoraRecipe, name: str
) -> dict[str, torch.Tensor]:
    """The LoRA's tensors, in diffusers' names. The UNet is as it was, afterwards."""
    unet.requires_grad_(False)
    layers: dict[str, nn.Module] = {
        path: layer for path, layer in unet.named_modules() if LAYERS.fullmatch(path)
    }
    factors = {path: LowRank(layer.get_parameter("weight"), recipe.rank) for path, layer in layers.items()}
    for path, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", factors[path])
    try:
        _fit(unet, list(factors.values()), data, recipe, name)
    finally:
        for layer in layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    tensors = {}
    for path, each in factors.items():
        up = each.up.detach()
        tensors[f"unet.{path}.lora_A.weight"] = each.down.detach()
        tensors[f"unet.{path}.lora_B.weight"] = up if each.down.ndim == 2 else up[..., None, None]
    return tensors


def _fit(
    unet: UNet2DConditionModel, factors: list[LowRank], data: Examples, recipe: LoraRecipe, name: str
) -> None:
    """Trains the factors."""
    learning = [parameter for each in factors for parameter in each.parameters()]
    optimizer = torch.optim.AdamW(learning, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.01)
    alphas = signal_shares(data.latents.device)
    start, losses = time.process_time(), []
    for step in range(recipe.steps):
        progress = step / recipe.steps
        rise, fall = min(1, 10 * progress + 0.01), (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * rise * fall
        loss = _velocity_loss(unet, data, alphas, recipe.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if len(losses) == _SAY_EVERY:
            spent = time.process_time() - start
            mean = sum(losses) / len(losses)
            print(f"{name} step {step + 1} loss {mean:.4f}, {spent:.0f} s of CPU time", flush=True)
            losses.clear()


def _velocity_loss(
    unet: UNet2DConditionModel, data: Examples, alphas: torch.Tensor, count: int
) -> torch.Tensor:
    """The loss of the denoiser's training, over `count` of the latents."""
    chosen = torch.randint(len(data.latents), (count,))
    latents = data.latents[chosen].contiguous(memory_format=torch.channels_last)
    # Spread evenly over the batch, not independent: the gradient has less noise.
    timesteps = ((torch.randperm(count) + torch.rand(count)) / count * len(alphas)).long()
    alpha = alphas[timesteps][:, None, None, None]
    noise = torch.randn_like(latents)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    predicted = unet(noisy, timesteps, data.text[chosen], return_dict=False)[0]
    return functional.mse_loss(predicted, velocity)


def save_lora(tensors: Mapping[str, torch.Tensor], name: str, path: Path) -> None:
    """Writes the factors in fp16. There is no alpha: the scale is 1."""
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": name,
        "modelspec.license": "MIT",
        "modelspec.description": f"{STYLES[name].__doc__} For the model that is bundled with smallcat.",
    }
    save_file({key: tensor.half().contiguous() for key, tensor in tensors.items()}, path, metadata)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the LoRAs")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data"),
        help="folder for the npm tarballs, which are downloaded if missing",
    )
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES), help="default: all")
    parser.add_argument("--steps", type=int, default=LoraRecipe.steps, help="steps of each (default 1000)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = LoraRecipe(steps=arguments.steps)
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    subjects = [subject for subject in load_subjects(arguments.data) if subject.common]
    composer = Composer(subjects, arguments.data, torch.device("cpu"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.styles:
        torch.manual_seed(recipe.seed)
        start, spent = time.monotonic(), time.process_time()
        writer = SceneWriter(subjects, recipe.seed)
        data = examples(STYLES[name], pipeline, writer, composer, recipe)
        tensors = train_lora(pipeline.unet, data, recipe, name)
        save_lora(tensors, name, arguments.out / f"{name}.safetensors")
        took, spent = (time.monotonic() - start) / 60, time.process_time() - spent
        print(f"{name}: saved after {took:.1f} min, {spent:.0f} s of CPU time", flush=True)


if __name__ == "__main__":
    main()
