"""What the device code asks of a family of models. `worker.device.unet_family` is the only one so far.

A family knows one kind of denoising model: its latents, its conditions, its forward, its VAE. Everything else
is the same for all families: steps of mixed jobs, samplers, compiling, CUDA graphs, batched decoding. A new
family is a class with the methods of `ModelFamily`, and a line in `worker.device.families.family_of`.

Words. The **latents** of a job are one float32 tensor of any number of axes, in the layout in which the model
takes them: (channels, height, width) for a UNet, packed (tokens, channels) for a transformer. A **row** is
one sample in a forward; J is the number of jobs in a batch, R that of rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from worker.contract.a1111_syntax import Piece
from worker.contract.choices import Scheduler
from worker.contract.errors import InvalidJobError
from worker.contract.job import Job
from worker.device.attention import Layer
from worker.device.loras.job_set import Adaptable, RowLoras
from worker.device.text.embeddings import NO_OPTIONS, EmbeddingRoom, TextOptions
from worker.device.text.job_text import Row

#: What jobs must have in common to share a step: whole numbers, in every family so far (channels, height,
#: width) of the latents before packing. Jobs of one lane have latents and conditions of equal shapes.
Lane = tuple[int, ...]


def lane_name(lane: Lane) -> str:
    """The lane in log and metrics: 4x64x64."""
    return "x".join(str(side) for side in lane)


#: A class of diffusers' schedulers, and what it takes besides the config of the model's own scheduler.
SchedulerClass = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Text:
    """The texts of a job, encoded. Jobs of equal texts share it, and nobody changes it."""

    #: What the model takes of the texts, by name: (rows, ...) each, on the device, in the model's dtype. Two
    #: rows where the job is guided, the negative prompt's first; else the prompt's alone.
    conditions: Mapping[str, torch.Tensor]
    #: One sentence for each part of a text that the model does not see.
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schedulers:
    """The noise schedulers that fit a model."""

    #: The model's own: a diffusers scheduler with its config. It is never stepped.
    own: Any
    #: The others, by the name that a job asks for.
    classes: Mapping[Scheduler, SchedulerClass]
    #: What the model is, with its article, to complete "this is ..." where a job asks for a name not in
    #: `classes`.
    kind: str
    #: How diffusers' tables of Align Your Steps for the model begin (`AysSchedules`); empty: there is none.
    align_your_steps: str = ""


class ModelFamily(Protocol):
    """A model of one kind on its device. Methods may be called from several threads, but for `encode`.

    A family that inherits from this has the defaults of what few have.
    """

    @property
    def size_multiple(self) -> int:
        """Pixels, > 0: the width and the height of a picture must be multiples of it."""

    @property
    def schedulers(self) -> Schedulers:
        """The noise schedulers that fit."""

    def lane(self, width: int, height: int) -> Lane:
        """The lane of jobs of `width` x `height` pixels, which are multiples of `size_multiple`."""

    def area(self, lane: Lane) -> int:
        """Latent pixels or tokens of one row of `lane`, > 0: a step's cost is about proportional to them."""

    def size(self, lane: Lane) -> tuple[int, int]:
        """Width and height in pixels of the pictures of `lane`."""

    def initial_noise(self, lane: Lane, generator: torch.Generator) -> torch.Tensor:
        """The latents of a job before its first step, float32 on the CPU, drawn from `generator`.

        Standard normal: the scheduler's scale is applied afterwards. Schedulers that add noise in a step draw
        theirs in the shape of this tensor.
        """

    def timestep_options(self, lane: Lane, steps: int) -> Mapping[str, Hashable]:
        """What the schedulers' `set_timesteps` takes besides `steps`; {} for most families.

        Flow-matching models shift their timesteps by the size of the picture, for example: {"mu": 0.8}.
        """

    def rows(self, guidance_scale: float) -> int:
        """Rows of a job in a forward: 2 where classifier-free guidance takes one without the prompt, else 1.

        A model that has guidance embedded takes one row, and the scale among its `conditions`.
        """

    @property
    def embedding_room(self) -> EmbeddingRoom:
        """What embeddings must be like; by default the model takes none."""
        return EmbeddingRoom((), 0)

    def encode(self, prompt: str, negative: str, *, guided: bool, options: TextOptions = NO_OPTIONS) -> Text:
        """Encode a job's texts: two rows if `guided`, else one. An empty `negative` is no negative prompt.

        One call at a time: tokenizers are not safe to use from several threads. Raises `InvalidJobError` for
        options that the family does not have.
        """

    def encode_pieces(
        self,
        texts: Sequence[Sequence[Piece]],
        counts: Sequence[int],
        *,
        is_none: bool,
        options: TextOptions = NO_OPTIONS,
    ) -> Sequence[Row]:
        """Encode the texts, in AUTOMATIC1111's syntax, that one prompt is by step, each `counts` times.

        `is_none`: it is a negative prompt that is empty. One call at a time. Raises `InvalidJobError` as
        `encode`, also where the family knows plain prompts alone.
        """

    def adaptable(self) -> Adaptable | None:
        """What LoRAs may change; by default the model takes none. Called when attention is chosen."""
        return None

    def unused_in_a1111(self, options: TextOptions) -> tuple[str, ...]:
        """A sentence for each of the options that the syntax `a1111` has no use for here; by default none."""
        return ()

    def conditions(self, job: Job, rows: int) -> Mapping[str, torch.Tensor]:
        """What the model takes besides latents, timestep and text: (rows, ...) each, the same for all rows.

        `job` has all its fields filled in. There may be more rows than two. Names differ from those of the
        texts. Examples are SDXL's sizes (micro-conditioning), embedded guidance, and the positions of tokens.
        """

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
        """The model's output for R rows of J jobs, each with a timestep of its own: float32, as `latents`.

        `latents`: (R, *shape) float32, scaled as the scheduler says. `times`: (R,) float32, timesteps of the
        scheduler. `conditions`: (R, ...) each, those of the texts, of `conditions` and of `seen` together,
        and maybe `worker.device.text.job_text.TEXT_BIAS`.
        `prompted`: (J,) int64, a row of each job that has its prompt; `job_of_row`: (R,) int64. With these
        two, layers that depend on no prompt may be computed once for each job. `loras`: those of the jobs, of
        a family that is `adaptable`; None where no job has one.

        Traced by torch.compile in one piece, for any R and J from 2 on, and captured in a CUDA graph: no
        data goes to the CPU, and nothing depends on a tensor's values.
        """

    def attentions(self) -> Iterable[Layer]:
        """All attention modules, the VAE's included, for which a backend is chosen: maybe none.

        Raises `SettingsError` for attention of a kind that is not supported.
        """

    def to_encoder(self, pixels: torch.Tensor) -> torch.Tensor:
        """A picture, (3, height, width) float32 of -1 to 1 on the CPU, as `encode_picture` takes it.

        (1, 3, height, width) on the device, in the VAE's dtype. Raises `InvalidJobError`, by default for any.
        """
        raise InvalidJobError("image: this model draws from text alone; leave it out.")

    def encode_picture(self, pixels: torch.Tensor, *, in_tiles: bool = False) -> torch.Tensor:
        """Run the VAE's encoder, for `drawn_latents`. Traced as `forward` is. `in_tiles`: see `has_tiles`."""
        raise NotImplementedError

    def drawn_latents(self, encoded: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A job's scaled latents, (*shape) float32, of what `encode_picture` returned.

        What the VAE leaves to chance is drawn from `generator`.
        """
        raise NotImplementedError

    @property
    def draws_to_encode(self) -> bool:
        """Whether the VAE leaves something to chance in `drawn_latents`; by default it does."""
        return True

    def larger_latents(self, latents: torch.Tensor, lane: Lane, larger: Lane) -> torch.Tensor:
        """Finished latents of `lane`, (*shape) float32, resized for those of the lane `larger`.

        Raises `InvalidJobError`, by default for any.
        """
        raise InvalidJobError(
            'upscaler is "latent", but this model\'s latents cannot be resized: use "lanczos".'
        )

    def latent_mask(self, lane: Lane, mask: torch.Tensor) -> torch.Tensor:
        """A mask of zeros and ones, (height, width) float32, for the latents of `lane`: (*shape)."""
        raise InvalidJobError("mask: this model draws from text alone; leave it out.")

    @property
    def sees_masks(self) -> bool:
        """Whether the model was made for inpainting, and takes `seen` in each forward; by default not."""
        return False

    def seen(self, mask: torch.Tensor, masked: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """A job's mask and its image without what is drawn as `conditions`, of a model that `sees_masks`.

        `mask`: as `latent_mask` gives it. `masked`: as `drawn_latents` does. Both are on the device. Returns
        (1, ...) each, the same for all rows, under names that no other condition has.
        """
        raise NotImplementedError

    def to_vae(self, lane: Lane, latents: torch.Tensor) -> torch.Tensor:
        """Finished latents of `lane`, (J, *shape) float32, unpacked and unscaled, as `decode` takes them.

        Returns (J, channels, height, width) in the VAE's dtype.
        """

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Run the VAE: (J, 3, height, width) in pixels, about -1 to 1. Traced as `forward` is, for any J."""

    @property
    def has_tiles(self) -> bool:
        """Whether the VAE takes pictures in tiles, too: the same but for rounding, in less memory, slower.

        By default it does not. Asked for tiles all the same, `encode_picture` and `decode_in_tiles` may fail.
        """
        return False

    def decode_in_tiles(self, latents: torch.Tensor) -> torch.Tensor:
        """As `decode`, one picture in tiles."""
        raise NotImplementedError

    def to_rgb(self, lane: Lane, latents: torch.Tensor) -> torch.Tensor | None:
        """A job's latents of `lane`, (*shape) float32, as a tiny picture by one linear map, for previews.

        Returns (3, height, width), about -1 to 1, on the same device. None: no map is known for the VAE.
        """

    def with_vae(self, path: Path, name: str, sha256: str) -> ModelFamily:
        """This model with the VAE of a file, which jobs call `name`, in the place of its own.

        Raises `InvalidJobError` for one that does not fit it, by default for any, and `RenderError` where it
        is gone or another one.
        """
        raise InvalidJobError(f'vae is "{name}", but this model has none beside its own: leave it out.')

    def check_safety(self, images: torch.Tensor) -> tuple[torch.Tensor, list[bool]] | None:
        """Run the safety checker over `images`, as `decode` returned them. None: the model has none.

        Returns the images, all zeros where it objects, and whether it objects to each.
        """
