"""A toy of another family of models, to prove the seam: a flow-matching transformer over packed latents.

Like SD3 and Flux in everything that the device code could get wrong: latents are packed into (tokens,
channels), two text encoders give a sequence and a vector, tokens have positions, timesteps are shifted by the
picture's size, and there is no UNet. The weights are random and the same each time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_processor import Attention
from torch import nn

from tests import tiny_models
from worker.contract.a1111_syntax import Piece
from worker.contract.choices import Scheduler
from worker.contract.errors import InvalidJobError
from worker.contract.job import Job
from worker.contract.served_model import Defaults, ServedModel
from worker.device.attention import Layer, shape_of
from worker.device.family import Lane, ModelFamily, Schedulers, Text
from worker.device.text.embeddings import NO_OPTIONS, TextOptions
from worker.device.text.encoder import cut_warning
from worker.device.text.job_text import Row
from worker.model.loader import Loaded

CHANNELS, PATCH, VAE_FACTOR = 4, 2, 8
#: Width of a token in the transformer, of the text encoders, and of an embedded number.
WIDTH, TEXT_WIDTH, NUMBER_WIDTH, TEXT_TOKENS = 32, 32, 16, 77


def embedded(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers from 0 to 1 as sines and cosines, (..., NUMBER_WIDTH)."""
    frequencies = 2.0 ** torch.arange(NUMBER_WIDTH // 2, device=numbers.device)
    angles = numbers[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Block(nn.Module):
    """Attention over text and picture together, then an MLP, both modulated by a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(WIDTH, heads=4, dim_head=8)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, tokens: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """(R, tokens, WIDTH) and (R, WIDTH) to (R, tokens, WIDTH)."""
        scale, shift = self.modulation(vector)[:, None].chunk(2, dim=-1)
        normed = nn.functional.layer_norm(tokens, (WIDTH,)) * (1 + scale) + shift
        tokens = tokens + self.attention(normed)
        return tokens + self.mlp(nn.functional.layer_norm(tokens, (WIDTH,)))


class Transformer(nn.Module):
    """The velocity of each latent token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS * PATCH**2, WIDTH)
        self.embed_position = nn.Linear(2 * NUMBER_WIDTH, WIDTH)
        self.embed_text = nn.Linear(TEXT_WIDTH, WIDTH)
        self.embed_vector = nn.Linear(TEXT_WIDTH + NUMBER_WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(WIDTH, CHANNELS * PATCH**2)

    def forward(
        self,
        tokens: torch.Tensor,
        times: torch.Tensor,
        text: torch.Tensor,
        pooled: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """(R, tokens, channels) at the times (R,), 0 to 1, as their velocities, of the same shape."""
        vector = self.embed_vector(torch.cat([pooled, embedded(times)], dim=-1))
        picture = self.embed(tokens) + self.embed_position(embedded(positions).flatten(2))
        together = torch.cat([self.embed_text(text), picture], dim=1)
        for block in self.blocks:
            together = block(together, vector)
        velocity: torch.Tensor = self.out(together[:, text.shape[1] :])
        return velocity


class ToyFlow(ModelFamily):
    """The toy as a `worker.device.family.ModelFamily`."""

    size_multiple = VAE_FACTOR * PATCH

    def __init__(self, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.transformer = Transformer()
            self.sequence_encoder, self.pooled_encoder = (
                tiny_models.text_encoder(TEXT_TOKENS) for _ in range(2)
            )
            self.vae = tiny_models.vae(channels=CHANNELS, levels=4)
        self.tokenizer = tiny_models.tokenizer(TEXT_TOKENS)
        self.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        self._device = device
        for model in (self.transformer, self.sequence_encoder, self.pooled_encoder, self.vae):
            model.eval().requires_grad_(False).to(device)

    @property
    def schedulers(self) -> Schedulers:
        classes = {Scheduler.EULER: ("FlowMatchEulerDiscreteScheduler", {})}
        return Schedulers(self.scheduler, classes, "a flow-matching model")

    def lane(self, width: int, height: int) -> Lane:
        return CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR

    def area(self, lane: Lane) -> int:
        return lane[1] * lane[2] // PATCH**2

    def size(self, lane: Lane) -> tuple[int, int]:
        return lane[2] * VAE_FACTOR, lane[1] * VAE_FACTOR

    def initial_noise(self, lane: Lane, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn((1, *lane), generator=generator)
        return nn.functional.pixel_unshuffle(noise, PATCH)[0].flatten(1).T

    def timestep_options(self, lane: Lane, steps: int) -> Mapping[str, Hashable]:
        return {"mu": self.area(lane) / 32}

    def rows(self, guidance_scale: float) -> int:
        return 2 if guidance_scale > 1 else 1

    def encode(self, prompt: str, negative: str, *, guided: bool, options: TextOptions = NO_OPTIONS) -> Text:
        texts = [negative, prompt] if guided else [prompt]
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        sequence = self.sequence_encoder(ids.to(self._device)).last_hidden_state
        pooled = self.pooled_encoder(ids.to(self._device)).pooler_output
        warnings = cut_warning(self.tokenizer, "prompt", self.tokenizer(prompt, verbose=False).input_ids)
        return Text({"text": sequence, "pooled": pooled}, warnings)

    def encode_pieces(
        self,
        texts: Sequence[Sequence[Piece]],
        counts: Sequence[int],
        *,
        is_none: bool,
        options: TextOptions = NO_OPTIONS,
    ) -> Sequence[Row]:
        raise InvalidJobError("prompt_syntax is a1111, but this model knows plain prompts alone.")

    def conditions(self, job: Job, rows: int) -> Mapping[str, torch.Tensor]:
        _, height, width = self.lane(job.width or 0, job.height or 0)
        sides = (torch.linspace(0, 1, side // PATCH, device=self._device) for side in (height, width))
        return {"positions": torch.cartesian_prod(*sides).repeat(rows, 1, 1)}

    def forward(
        self,
        latents: torch.Tensor,
        times: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
        *,
        prompted: torch.Tensor,
        job_of_row: torch.Tensor,
    ) -> torch.Tensor:
        velocity: torch.Tensor = self.transformer(latents, times / 1000, **conditions)
        return velocity

    def attentions(self) -> Iterator[Layer]:
        tokens = TEXT_TOKENS + self.area(self.lane(64, 64))
        for block in self.transformer.blocks:
            yield Layer(block.attention, shape_of(block.attention, tokens, tokens))

    def to_vae(self, lane: Lane, latents: torch.Tensor) -> torch.Tensor:
        packed = latents.transpose(1, 2).unflatten(2, (lane[1] // PATCH, lane[2] // PATCH))
        return nn.functional.pixel_shuffle(packed, PATCH) / self.vae.config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = self.vae.decode(latents, return_dict=False)[0]
        return images

    def to_rgb(self, lane: Lane, latents: torch.Tensor) -> None:
        """No map is known."""

    def check_safety(self, images: torch.Tensor) -> None:
        return None


def loaded_toy(device: torch.device) -> Loaded:
    """The toy as a loader would give it, but that its family is made apart."""
    defaults = Defaults(width=64, height=64, steps=4, guidance_scale=4.0)
    served = ServedModel(name="toy", revision="1", defaults=defaults)
    return Loaded(None, served, device, torch.float32, choices=())
