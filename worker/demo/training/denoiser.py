"""The UNet and the text encoder, trained together to predict the velocity of the diffusion.

v-prediction: Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UniPCMultistepScheduler
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from worker.demo.training.captions import Scene
from worker.demo.training.recipe import Clock, Recipe, rate_factor, searched_convolutions
from worker.demo.training.scenes import Composer, SceneBatch
from worker.demo.training.tokenizer import MAX_TOKENS

#: Share of captions that training blanks, beside the scenes that have none: guidance needs both predictions.
_BLANKED = 0.04
#: The noise schedule: the first 750 of the 1000 steps of DDPM's (Ho et al. 2020). At its end 6% of the signal
#: is left, as in Stable Diffusion. The steps above it add nothing to a picture, and with strong guidance
#: multistep solvers diverge there.
_STEPS = 750
_BETA_START = 1e-4
_BETA_END = _BETA_START + (0.02 - _BETA_START) * (_STEPS - 1) / 999


def signal_shares(device: torch.device) -> torch.Tensor:
    """The cumulative products of alpha, float32 (750,)."""
    betas = torch.linspace(_BETA_START, _BETA_END, _STEPS, dtype=torch.float64)
    return (1 - betas).cumprod(dim=0).float().to(device)


def build_scheduler() -> UniPCMultistepScheduler:
    """The model's own scheduler: of diffusers' the one with the best score in 20 steps.

    Its configuration also has the settings that only other schedulers read, so that `from_config` makes each
    of them right. The most important is that nothing is clipped: latents go beyond 1.
    """
    settings = {
        "num_train_timesteps": _STEPS,
        "beta_start": _BETA_START,
        "beta_end": _BETA_END,
        "beta_schedule": "linear",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
    scheduler: UniPCMultistepScheduler = UniPCMultistepScheduler.from_config(settings)
    return scheduler


def build_unet(recipe: Recipe) -> UNet2DConditionModel:
    """An untrained UNet. The finest level has no attention: there it costs most and improves least."""
    return UNet2DConditionModel(
        sample_size=recipe.size // 8,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        block_out_channels=recipe.denoiser_channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=recipe.text_width,
        attention_head_dim=6,
        norm_num_groups=16,
    )


def build_text_encoder(recipe: Recipe, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=4 * recipe.text_width,
            projection_dim=recipe.text_width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=6,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokens_of(captions: list[str], tokenizer: CLIPTokenizer) -> torch.Tensor:
    """The captions' token ids, padded as the pipeline pads them: int64 (n, MAX_TOKENS)."""
    # The tokenizer's own batch call takes twice as long, which matters for 400,000 captions.
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(MAX_TOKENS)
    rows = torch.full((len(captions), MAX_TOKENS), tokenizer.pad_token_id)
    for row, encoding in zip(rows.numpy(), backend.encode_batch_fast(captions), strict=True):
        row[: len(encoding.ids)] = encoding.ids
    return rows


class LatentPool:
    """Scenes of one canvas size with their latents, all encoded once and then renewed `CHUNK` at a time."""

    #: Scenes drawn and encoded at a time. Always as many, so that one compilation is enough.
    CHUNK = 256

    def __init__(
        self,
        scenes: list[Scene],
        tokens: torch.Tensor,
        canvas: tuple[int, int],
        composer: Composer,
        vae: AutoencoderKL,
        compiled: bool,
    ) -> None:
        def encode(pictures: torch.Tensor) -> torch.Tensor:
            return vae.encode(pictures).latent_dist.mode()  # type: ignore[no-any-return]

        self.scenes = SceneBatch.of(scenes, composer.device)
        self.tokens = tokens.to(composer.device)
        self._canvas = canvas
        self._composer = composer
        self._encode = torch.compile(encode, dynamic=False) if compiled else encode
        self._scaling = float(vae.config.scaling_factor)
        self._next = 0
        half = torch.bfloat16 if composer.device.type == "cuda" else torch.float32
        width, height = canvas
        shape = (len(scenes), vae.config.latent_channels, height // 8, width // 8)
        self.latents = torch.empty(shape, dtype=half, device=composer.device)

    def __len__(self) -> int:
        return len(self.latents)

    @torch.no_grad()
    def renew(self) -> None:
        """Draws the next `CHUNK` scenes again, at other random sizes, and encodes them."""
        device = self.latents.device
        count = min(self.CHUNK, len(self))
        index = torch.arange(self._next, self._next + count, device=device) % len(self)
        self._next = (self._next + count) % len(self)
        pictures = self._composer.draw(self.scenes[index].layout(*self._canvas), *self._canvas)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents = self._encode(pictures)
        self.latents[index] = (latents * self._scaling).to(self.latents.dtype)

    def fill(self) -> None:
        """Encodes every scene once."""
        for _ in range(0, len(self), self.CHUNK):
            self.renew()


@dataclass
class Denoiser:
    """UNet and text encoder with the running averages of their weights. The averages are what is saved."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel

    def __post_init__(self) -> None:
        self.parameters: list[nn.Parameter] = [*self.unet.parameters(), *self.text_encoder.parameters()]
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def update_average(self) -> None:
        """Moves the averages towards the weights. Their horizon grows to 500 steps.

        A longer average would lag behind the progress of the last steps, at low learning rates.
        """
        decay = min(0.998, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, [parameter.data for parameter in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges weights and averages. Call it before and after drawing or saving."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            kept = parameter.data.clone()
            parameter.data.copy_(average)
            average.copy_(kept)


class DenoiserTrainer:
    """The training loop, with its optimiser."""

    def __init__(self, denoiser: Denoiser, recipe: Recipe, blank: torch.Tensor, device: torch.device) -> None:
        """`blank`: the tokens of the empty caption, (1, MAX_TOKENS)."""
        self._denoiser = denoiser
        self._recipe = recipe
        self._blank = blank.to(device)
        self._alphas = signal_shares(device)
        self.optimizer = torch.optim.AdamW(
            denoiser.parameters,
            lr=recipe.denoiser_rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=device.type == "cuda",
        )
        #: Steps before this run. Adam's averages start again with every run, and so does the warm-up.
        self._first = denoiser.steps
        self._fast: Any = torch.compile(denoiser.unet, dynamic=False) if recipe.compiled else denoiser.unet

    def step(self, pool: LatentPool, count: int, unet: Any = None) -> torch.Tensor:
        """One optimiser step on `count` of the latents; returns the loss. `unet`: the UNet, uncompiled."""
        device = pool.latents.device
        chosen = torch.randint(len(pool), (count,), device=device)
        latents = pool.latents[chosen].float().contiguous(memory_format=torch.channels_last)
        blanked = torch.rand(count, 1, device=device) < _BLANKED
        tokens = torch.where(blanked, self._blank, pool.tokens[chosen])
        # Spread evenly over the batch, not independent: the gradient has less noise.
        spread = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
        timesteps = (spread[torch.randperm(count, device=device)] * len(self._alphas)).long()
        alpha = self._alphas[timesteps][:, None, None, None]
        noise = torch.randn_like(latents)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = self._denoiser.text_encoder(tokens)[0]
            predicted = (unet or self._fast)(noisy, timesteps, hidden, return_dict=False)[0]
        loss = functional.mse_loss(predicted.float(), velocity)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._denoiser.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._denoiser.update_average()
        return loss.detach()

    def train(self, pool: LatentPool, others: list[LatentPool], clock: Clock) -> None:
        """Trains until the clock is over; `others` are the pools of the other canvases."""
        recipe, denoiser = self._recipe, self._denoiser
        losses: list[torch.Tensor] = []
        cells = pool.latents[0, 0].numel()
        while not clock.over:
            rate = recipe.denoiser_rate * rate_factor(denoiser.steps - self._first, clock.progress)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            turn, other = divmod(denoiser.steps, recipe.other_size_every)
            if others and clock.progress >= recipe.other_sizes_from and other == recipe.other_size_every - 1:
                # Not compiled, because each canvas would need a minute of compilation. Therefore slower, so
                # half the usual number of latent cells.
                canvas = others[turn % len(others)]
                count = recipe.denoiser_batch * cells // (2 * canvas.latents[0, 0].numel())
                self.step(canvas, max(1, count), denoiser.unet)
            else:
                with searched_convolutions():
                    losses.append(self.step(pool, recipe.denoiser_batch))
            if denoiser.steps % recipe.renew_every == 0:
                pool.renew()
            denoiser.steps += 1
            if denoiser.steps % 500 == 0:
                mean = float(torch.stack(losses).mean())
                print(f"denoiser step {denoiser.steps} {clock.elapsed:.2f} min loss {mean:.4f}", flush=True)
                losses.clear()
        print(f"denoiser: {denoiser.steps} steps", flush=True)
