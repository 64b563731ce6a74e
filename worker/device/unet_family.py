"""The family of Stable Diffusion's UNets: SD 1.x and 2.x, SDXL, and their latent consistency models.

Formulas and their order follow `diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion.py`, its SDXL
sibling and `latent_consistency_models/pipeline_latent_consistency_text2img.py`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import diffusers
import torch

from worker.contract.a1111_syntax import Piece
from worker.contract.choices import PromptSyntax, Scheduler
from worker.contract.errors import InvalidJobError
from worker.contract.job import Job
from worker.device import latent_rgb, unet_patches
from worker.device.attention import Layer, shape_of
from worker.device.family import Lane, Schedulers, Text
from worker.device.loras.job_set import Adaptable, RowLoras
from worker.device.loras.layers import LoraUNet
from worker.device.schedulers.samplers import CLASSES
from worker.device.text.clip import ClipTexts, Encoded, encoders_of
from worker.device.text.embeddings import NO_OPTIONS, EmbeddingRoom, TextOptions
from worker.device.text.encoder import cut_warning, unknown_words_warning
from worker.device.text.job_text import TEXT_BIAS, Row
from worker.device.vae import tiles
from worker.model.beside import vae_files
from worker.model.beside.lora_names import Targets
from worker.model.checkpoint import inpainting_channels

#: The name of the text embeddings among a row's conditions: (rows, tokens, width).
TEXT = "encoder_hidden_states"
#: That of what a UNet made for inpainting takes besides the latents: the mask and the masked image's latents,
#: (rows, 1 + channels, height, width).
SEEN = "seen"
#: The warning of a job of SDXL that skips layers as AUTOMATIC1111 does.
SKIPS_NONE = (
    "clip_skip {} has no effect on SDXL in the syntax a1111, as in AUTOMATIC1111: its text is that of the "
    "last layer but one in any case."
)


class UNetFamily:
    """A diffusers pipeline with a UNet, as a `worker.device.family.ModelFamily`."""

    def __init__(
        self,
        pipeline: Any,
        device: torch.device,
        dtype: torch.dtype,
        *,
        patched: bool = False,
        own_vae: Any = None,
    ) -> None:
        """`pipeline` is on `device`. `dtype` is that of its UNet and its text encoders.

        `patched`: put the modules of `unet_patches` into the pipeline. They are for compiled steps alone.
        `own_vae`: the config of the VAE that the model came with, where the pipeline has another one.
        """
        self._pipeline, self._unet = pipeline, pipeline.unet
        self._device, self._dtype = device, dtype
        self._vae = pipeline.vae
        self._is_xl = isinstance(pipeline, diffusers.StableDiffusionXLPipeline)
        self._own_vae = own_vae or pipeline.vae.config
        # A tiny VAE takes latents of the same scale and says of itself that there is none.
        self._latent_rgb = latent_rgb.of_vae(pipeline.vae.config if self.draws_to_encode else self._own_vae)
        self._clip = ClipTexts(tuple(encoders_of(pipeline)))
        # `attentions` depends on it: choosing a backend replaces the processor of every layer, so what the
        # patches need of a processor must be part of the layer's description.
        self._is_patched = patched
        # Before patches change what the UNet's modules are called.
        self._targets = Targets.of(self._unet, [encoder.model for encoder in self._clip.encoders])
        self._lora_unet: LoraUNet | None = None
        self._lora_lock = threading.Lock()
        if patched:
            unet_patches.install(pipeline)

    @property
    def size_multiple(self) -> int:
        """The VAE's scale factor: 8 for the released models."""
        return int(self._pipeline.vae_scale_factor)

    @property
    def schedulers(self) -> Schedulers:
        """All of `CLASSES`; for a latent consistency pipeline its own alone.

        Its scheduler takes arguments that no other one does, and its UNet was distilled for it.
        """
        own = self._pipeline.scheduler
        if isinstance(self._pipeline, diffusers.LatentConsistencyModelPipeline):
            classes = {Scheduler.LCM: CLASSES[Scheduler.LCM]}
            return Schedulers(own, classes, "a latent consistency model")
        tables = "StableDiffusionXL" if self._is_xl else "StableDiffusion"
        return Schedulers(own, CLASSES, "a Stable Diffusion model", tables)

    # --- latents --------------------------------------------------------------------------------------------

    def lane(self, width: int, height: int) -> Lane:
        """(channels, height, width) of the latents. A UNet made for inpainting takes more channels."""
        factor = self.size_multiple
        return self._pipeline.vae.config.latent_channels, height // factor, width // factor

    def area(self, lane: Lane) -> int:
        """Latent pixels."""
        _, height, width = lane
        return height * width

    def size(self, lane: Lane) -> tuple[int, int]:
        """Width and height in pixels."""
        _, height, width = lane
        return width * self.size_multiple, height * self.size_multiple

    def initial_noise(self, lane: Lane, generator: torch.Generator) -> torch.Tensor:
        """(channels, height, width), as diffusers' `prepare_latents` draws it."""
        return torch.randn((1, *lane), generator=generator)[0]

    def timestep_options(self, lane: Lane, steps: int) -> Mapping[str, Hashable]:
        """None: timesteps depend on nothing but their number."""
        return {}

    # --- conditions -----------------------------------------------------------------------------------------

    def rows(self, guidance_scale: float) -> int:
        """2 with guidance, unless the UNet has it embedded (LCM)."""
        embeds_guidance = self._unet.config.time_cond_proj_dim is not None
        return 2 if guidance_scale > 1 and not embeds_guidance else 1

    @property
    def embedding_room(self) -> EmbeddingRoom:
        """The sizes of the text encoders' first layers, and of the first one's window without its marks."""
        layers = [encoder.model.get_input_embeddings() for encoder in self._clip.encoders]
        room = self._clip.encoders[0].tokenizer.model_max_length - 2
        return EmbeddingRoom(tuple(layer.embedding_dim for layer in layers), room)

    def encode(self, prompt: str, negative: str, *, guided: bool, options: TextOptions = NO_OPTIONS) -> Text:
        """As diffusers' `encode_prompt` encodes them: layers are skipped of the prompt alone.

        An SDXL model may take zeros where there is no negative prompt.
        """
        self._check_layers(options)
        rows = [self._clip.encode_plain(prompt, options)]
        if guided and not negative and getattr(self._pipeline.config, "force_zeros_for_empty_prompt", False):
            rows.insert(0, _zeros_like(rows[0]))
        elif guided:
            rows.insert(0, self._clip.encode_plain(negative, replace(options, clip_skip=1)))
        first = self._clip.encoders[0]
        warnings = cut_warning(first.tokenizer, "prompt", first.plain_ids(prompt, options))
        parts = options.split(prompt, PromptSyntax.PLAIN)
        words = " ".join(part for part in parts if isinstance(part, str))
        warnings += unknown_words_warning(first.tokenizer, words)
        if guided:
            warnings += cut_warning(first.tokenizer, "negative prompt", first.plain_ids(negative, options))
        return Text({name: torch.cat(tensors) for name, tensors in self._named(rows).items()}, warnings)

    def encode_pieces(
        self,
        texts: Sequence[Sequence[Piece]],
        counts: Sequence[int],
        *,
        is_none: bool,
        options: TextOptions = NO_OPTIONS,
    ) -> Sequence[Row]:
        """As the web UI encodes them, and for SDXL zeros for a negative prompt that is empty."""
        self._check_layers(options)
        encoded = self._clip.encode(texts, counts, options)
        if self._is_xl and is_none:
            encoded = _zeros_like(encoded)
        named = {name: tensor for name, [tensor] in self._named([encoded]).items()}
        return [{name: tensor[[row]] for name, tensor in named.items()} for row in range(len(texts))]

    def unused_in_a1111(self, options: TextOptions) -> tuple[str, ...]:
        """The web UI takes SDXL's last layer but one, whatever CLIP skip says."""
        clip_skip = options.clip_skip
        return (SKIPS_NONE.format(clip_skip),) if self._is_xl and clip_skip > 1 else ()

    def _named(self, rows: Sequence[Encoded]) -> dict[str, list[torch.Tensor]]:
        """What the UNet takes of encoded texts, by name, on its device and in its dtype."""
        found = {TEXT: [hidden for hidden, _ in rows]}
        if self._is_xl:
            found["text_embeds"] = [pooled for _, pooled in rows if pooled is not None]
        return {
            name: [each.to(self._device, self._dtype) for each in tensors] for name, tensors in found.items()
        }

    def _check_layers(self, options: TextOptions) -> None:
        if options.clip_skip > (layers := self._clip.layers):
            raise InvalidJobError(
                f"clip_skip is {options.clip_skip}, but this model's text encoder has {layers} layers: use 1 "
                f"to {layers}."
            )

    def conditions(self, job: Job, rows: int) -> Mapping[str, torch.Tensor]:
        """Embedded guidance as `timestep_cond` (LCM), and sizes as `time_ids` (SDXL)."""
        conditions: dict[str, torch.Tensor] = {}
        width = self._unet.config.time_cond_proj_dim
        if width is not None:
            scale = torch.tensor([(job.guidance_scale or 0.0) - 1])
            conditions["timestep_cond"] = self._pipeline.get_guidance_scale_embedding(
                scale, embedding_dim=width
            ).to(self._device, self._dtype)
        if self._is_xl:
            # Micro-conditioning: original size, crop, target size (Podell et al., 2023, section 2.2).
            sizes = torch.tensor([[job.height, job.width, 0, 0, job.height, job.width]] * rows)
            conditions["time_ids"] = sizes.to(self._device, self._dtype)
        return conditions

    # --- the model ------------------------------------------------------------------------------------------

    def forward(
        self,
        latents: torch.Tensor,
        times: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
        *,
        prompted: torch.Tensor,
        job_of_row: torch.Tensor,
        loras: RowLoras | None = None,
    ) -> torch.Tensor:
        """The UNet's output, (R, channels, height, width) float32."""
        added = dict(conditions)
        text, seen = added.pop(TEXT), added.pop(SEEN, None)
        timestep_cond, text_bias = added.pop("timestep_cond", None), added.pop(TEXT_BIAS, None)
        taken = latents.to(text.dtype)
        if seen is not None:
            taken = torch.cat([taken, seen], dim=1)
        unet = self._unet
        if loras is not None:
            assert self._lora_unet is not None  # noqa: S101 - made before the first of them was loaded
            unet = partial(self._lora_unet, loras, prompted, job_of_row)
        output: torch.Tensor = unet(
            taken,
            times,
            encoder_hidden_states=text,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added or None,
            cross_attention_kwargs={"prompted": prompted, "job_of_row": job_of_row, "text_bias": text_bias},
            return_dict=False,
        )[0]
        return output.float()

    def adaptable(self) -> Adaptable:
        """The linear layers and convolutions of the UNet, and the text encoders."""
        with self._lora_lock:
            made = self._lora_unet = self._lora_unet or LoraUNet(self._unet, self._device)
        encoders = [encoder.model for encoder in self._clip.encoders]
        return Adaptable(self._targets, made.places, made.weights, encoders)

    def attentions(self) -> Iterator[Layer]:
        """Each attention of the UNet, in the order in which it is computed, and of the VAE."""
        # Not at the top: diffusers' models must be imported after worker.device.attention.
        from diffusers.models.attention_processor import Attention

        first = self._is_patched and unet_patches.shares_first_layers(self._unet)
        for part, tokens in self._parts():
            for module in part.modules():
                if isinstance(module, Attention):
                    is_cross = cast(bool, module.is_cross_attention)
                    keys = self._pipeline.tokenizer.model_max_length if is_cross else tokens
                    # At 512 px, the first one is a tenth of the time that a step spends in attention.
                    yield Layer(module, shape_of(module, tokens, keys), once_a_job=first and not is_cross)
                    first = False

    def _parts(self) -> Iterator[tuple[torch.nn.Module, int]]:
        """The blocks of the UNet and the VAE, with the tokens of each in a picture of the default size."""
        unet = self._unet
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        lowest = len(unet.down_blocks) - 1
        levels = [(block, level) for level, block in enumerate(unet.down_blocks)]
        levels += [(unet.mid_block, lowest)] if unet.mid_block is not None else []
        levels += [(block, lowest - level) for level, block in enumerate(unet.up_blocks)]
        for block, level in levels:
            yield block, -(-height // 2**level) * -(-width // 2**level)
        yield self._pipeline.vae, height * width

    # --- pictures -------------------------------------------------------------------------------------------

    def to_encoder(self, pixels: torch.Tensor) -> torch.Tensor:
        """In the dtype of the encoder, which may be another one than the decoder's."""
        return pixels[None].to(self._device, _dtype_of(self._vae.encoder))

    def encode_picture(self, pixels: torch.Tensor, *, in_tiles: bool = False) -> torch.Tensor:
        """Mean and logarithm of the variance, (1, 2 * channels, ...); of a tiny VAE its latents."""
        vae = self._vae
        found: Any = (tiles.encode(vae, pixels) if in_tiles else vae.encode(pixels, return_dict=False))[0]
        encoded: torch.Tensor = found.parameters if self.draws_to_encode else found
        return encoded

    def drawn_latents(self, encoded: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """As diffusers' image-to-image pipelines; the VAE's noise is float32 in every dtype."""
        vae, latents = self._vae, encoded.float()
        if self.draws_to_encode:
            # A deviation may be too small for fp16.
            mean, log_variance = latents.chunk(2, dim=1)
            noise = torch.randn(mean.shape, generator=generator).to(self._device)
            latents = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
        factor = float(vae.config.scaling_factor)
        if (moments := self._moments(latents)) is None:
            scaled: torch.Tensor = factor * latents
        else:
            scaled = (latents - moments[0]) * factor / moments[1]
        return scaled[0]

    @property
    def draws_to_encode(self) -> bool:
        """A tiny VAE leaves nothing to chance."""
        return not isinstance(self._vae, diffusers.AutoencoderTiny)

    def larger_latents(self, latents: torch.Tensor, lane: Lane, larger: Lane) -> torch.Tensor:
        """Bilinearly, as AUTOMATIC1111's upscaler "Latent"."""
        return torch.nn.functional.interpolate(latents[None], size=larger[1:], mode="bilinear")[0]

    def latent_mask(self, lane: Lane, mask: torch.Tensor) -> torch.Tensor:
        """By the nearest pixel, as diffusers' `prepare_mask_latents`."""
        found = torch.nn.functional.interpolate(mask[None, None], size=lane[1:])
        return found[0].expand(lane)

    @property
    def sees_masks(self) -> bool:
        """Whether the UNet takes 9 channels: the latents, the mask, and the masked image's latents."""
        channels = self._pipeline.vae.config.latent_channels
        return bool(self._unet.config.in_channels == inpainting_channels(channels))

    def seen(self, mask: torch.Tensor, masked: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The mask first, as in diffusers' inpainting pipelines. No scheduler scales them."""
        return {SEEN: torch.cat([mask[:1], masked])[None].to(self._dtype)}

    def to_vae(self, lane: Lane, latents: torch.Tensor) -> torch.Tensor:
        """Unscaled latents. diffusers reads mean and deviation in its SDXL pipeline alone."""
        vae = self._vae
        if (moments := self._moments(latents)) is None:
            return (latents / float(vae.config.scaling_factor)).to(_dtype_of(vae.decoder))
        mean, deviation = moments
        unscaled: torch.Tensor = latents * deviation / float(vae.config.scaling_factor) + mean
        return unscaled.to(_dtype_of(vae.decoder))

    def _moments(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mean and deviation of each channel of the VAE's latents, where the config has them."""
        names = ("latents_mean", "latents_std")
        mean, deviation = (getattr(self._vae.config, name, None) for name in names)
        if not self._is_xl or mean is None or deviation is None:
            return None
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, deviation))
        return mean, deviation

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's output."""
        images: torch.Tensor = self._vae.decode(latents, return_dict=False)[0]
        return images

    @property
    def has_tiles(self) -> bool:
        """Whether the VAE is built as `worker.device.vae.tiles` knows it."""
        return tiles.is_known(self._vae)

    def decode_in_tiles(self, latents: torch.Tensor) -> torch.Tensor:
        """As the whole, but for rounding."""
        return tiles.decode(self._vae, latents)

    def to_rgb(self, lane: Lane, latents: torch.Tensor) -> torch.Tensor | None:
        """By the factors of its VAE (`latent_rgb`)."""
        return self._latent_rgb(latents) if self._latent_rgb else None

    def with_vae(self, path: Path, name: str, sha256: str) -> UNetFamily:
        """The same UNet and text encoders, with an `AutoencoderKL` or an `AutoencoderTiny` of a file."""
        vae = vae_files.load(path, name, sha256, self._own_vae)
        # As the loader does: the VAE that SDXL came with overflows in fp16.
        upcast = self._is_xl and vae.config.force_upcast and self._dtype == torch.float16
        vae.to(self._device, torch.float32 if upcast else self._dtype)
        vae.to(memory_format=torch.channels_last)
        family = copy.copy(self)
        family._vae = vae
        if family.draws_to_encode:
            family._latent_rgb = latent_rgb.of_vae(vae.config)
        return family

    def check_safety(self, images: torch.Tensor) -> tuple[torch.Tensor, list[bool]] | None:
        """By the pipeline's own checker, which SDXL has none of."""
        if getattr(self._pipeline, "safety_checker", None) is None:
            return None
        checked, verdicts = self._pipeline.run_safety_checker(images, self._device, self._dtype)
        return checked, list(verdicts)


def _dtype_of(part: torch.nn.Module) -> torch.dtype:
    """That of a VAE's encoder or decoder, of which one may be in fp32 and the other one in fp16."""
    return next(part.parameters()).dtype


def _zeros_like(encoded: Encoded) -> Encoded:
    hidden, pooled = encoded
    return torch.zeros_like(hidden), None if pooled is None else torch.zeros_like(pooled)
