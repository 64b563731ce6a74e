"""All that runs on the device: text encoding, denoising steps over mixed jobs, decoding, safety check.

A job's pixels are what diffusers' own pipeline call gives for it with a CPU generator of its seed (within 1
of 255 in fp32), whatever other jobs are in its batches. Formulas and their order follow
`diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion.py`, its SDXL sibling and
`latent_consistency_models/pipeline_latent_consistency_text2img.py`. Latents and sampler arithmetic are fp32
also where the model runs in fp16: the noise is the same on every machine, and rounding does not add up.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Hashable, Iterator, Sequence
from typing import cast

import diffusers
import torch

from worker import attention, batch_cap
from worker import pipeline as pipelines
from worker.errors import (
    DeviceError,
    InvalidJobError,
    JobTooLargeError,
    NotFiniteError,
    OutOfMemoryError,
    RenderError,
    SettingsError,
    SmallcatError,
)
from worker.images import Picture
from worker.job import Job, Scheduler
from worker.pipeline import Choice, first_line
from worker.samplers import Sampler, Samplers
from worker.settings import WorkerSettings
from worker.text import Text, TextEncoder

#: Pixels that are decoded at once, at most: 8 pictures of 512 x 512 on a GPU; on a CPU, where more gain
#: nothing, 1 of them.
GPU_DECODE_PIXELS, CPU_DECODE_PIXELS = 8 * 512 * 512, 512 * 512


#: Seconds after which no larger batch is tried at warm-up; and forwards of each size, the fastest counts.
MEASURE_S, MEASURED_TIMES = 5.0, 3


class Render:
    """One job on board. Made by `ModelRunner.prepare`, changed by `ModelRunner.step` alone."""

    def __init__(
        self,
        job: Job,
        text: Text,
        conditions: dict[str, torch.Tensor],
        sampler: Sampler,
        latents: torch.Tensor,
    ) -> None:
        #: The job, with all that it left open filled in.
        self.job = job
        #: Rows in a forward of the UNet: 2 with guidance, else 1.
        self.rows = text.embeddings.shape[0]
        #: Steps done.
        self.step = 0
        #: Steps in all. Some schedulers take more than the job's: PNDM at least one.
        self.steps = len(sampler.timesteps)
        #: One sentence for each thing the caller should know.
        self.warnings = text.warnings
        #: Classifier-free guidance, the job's.
        self.guidance = job.guidance_scale or 0.0
        self._text = text
        self._conditions = conditions
        self._sampler = sampler
        #: (1, channels, height, width), float32.
        self._latents = latents

    @property
    def lane(self) -> Hashable:
        """Renders of equal lanes may share a step: the latents' (channels, height, width)."""
        return tuple(self._latents.shape[1:])


class ModelRunner:
    """The one door to the device.

    `step` and `decode` are called from one thread. `prepare` may be called from any number of others at the
    same time: it shares only the text cache and the tokenizers with them, behind a lock.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        """Load the model. Raises `SettingsError` with one sentence when that cannot be done."""
        loaded = pipelines.load(settings)
        self._pipeline = loaded.pipeline
        self._device, self._dtype = loaded.device, loaded.dtype
        self._is_xl = isinstance(self._pipeline, diffusers.StableDiffusionXLPipeline)
        self._samplers = Samplers(self._pipeline)
        self._texts = TextEncoder(self._pipeline, self._device, self._dtype)
        #: The model as it is announced.
        self.served = loaded.served
        self._asked_rows = settings.max_batch
        #: Rows worth having in a step of the default size; measured by `warm_up` unless asked for.
        self.max_rows = settings.max_batch or batch_cap.LEAST
        #: Each choice made at start, with its reason.
        self.choices = (
            *loaded.choices,
            attention.install(self._pipeline, settings.attention_backend, self._device),
        )

    def warm_up(self) -> Choice:
        """One small render through everything, then the cost of batches, which sets `max_rows`.

        Returns that choice. Raises `SettingsError` when the render fails.
        """
        # A GPU picks its kernels by shape, so it is warmed with the one most jobs have.
        side = None if self._device.type == "cuda" else 64
        job = Job(prompt="a small cat", seed=0, steps=4, width=side, height=side)
        try:
            render = self.prepare(job)
            while render.step < render.steps:
                (failure,) = self.step([render])
                if failure is not None:
                    raise failure
            (picture,) = self.decode([render])
            if isinstance(picture, SmallcatError):
                raise picture
        except SmallcatError as error:
            raise SettingsError(
                f"The model {self.served.name} failed to render at start ({error}): try another "
                "SMALLCAT_DTYPE, SMALLCAT_ATTENTION or SMALLCAT_MODEL."
            ) from error
        if self._asked_rows is not None:
            return Choice("max rows", str(self.max_rows), "SMALLCAT_MAX_BATCH asks for it")
        self.max_rows, reason = batch_cap.choose(self._measure())
        return Choice("max rows", str(self.max_rows), reason)

    def cap(self, lane: Hashable) -> int:
        """Rows worth having in one step of `lane`: as many latent pixels as in the measured one, >= 1."""
        if self._asked_rows is not None:
            return self._asked_rows
        _, height, width = cast("tuple[int, int, int]", lane)
        return batch_cap.scaled(self.max_rows, self._default_area, height * width)

    @property
    def _default_area(self) -> int:
        """Latent pixels of the default size."""
        factor = int(self._pipeline.vae_scale_factor)
        return (self.served.defaults.width // factor) * (self.served.defaults.height // factor)

    @torch.inference_mode()
    def _measure(self) -> list[tuple[int, float]]:
        """Seconds of a forward of the default size by its rows, as far as they fit and seem to pay."""
        render = self.prepare(Job(prompt="a small cat", seed=0, guidance_scale=1.0))
        curve: list[tuple[int, float]] = []
        started_s = time.monotonic()
        for rows in batch_cap.ROWS:
            try:
                with _mapped("measure"):
                    # The first is a warm-up: kernels are picked by shape.
                    seconds = min(self._seconds_of([render] * rows) for _ in range(MEASURED_TIMES))
            except OutOfMemoryError:
                break
            curve.append((rows, seconds))
            if batch_cap.is_over(curve) or time.monotonic() - started_s > MEASURE_S:
                break
        return curve

    def _seconds_of(self, renders: Sequence[Render]) -> float:
        started_s = time.perf_counter()
        self._predict(renders)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started_s

    @torch.inference_mode()
    def prepare(self, job: Job) -> Render:
        """`job` with its text encoded, its noise drawn and its scheduler made, ready for its first step.

        Raises `InvalidJobError` for what the model cannot do, `RenderError` when the text encoder fails, and
        `OutOfMemoryError` when it does not fit. No other render is affected.
        """
        job = job.resolved(self.served)
        assert job.width and job.height and job.steps  # noqa: S101, PT018 - resolved, which mypy cannot know
        assert job.guidance_scale is not None  # noqa: S101
        factor = int(self._pipeline.vae_scale_factor)
        if job.width % factor or job.height % factor:
            raise InvalidJobError(
                f"The size is {job.width} x {job.height}, but this model's sizes are multiples of {factor}."
            )
        generator = torch.Generator("cpu").manual_seed(job.seed)
        sampler = self._samplers.make(Scheduler(job.scheduler), job.steps, generator)
        embeds_guidance = self._pipeline.unet.config.time_cond_proj_dim is not None
        guided = job.guidance_scale > 1 and not embeds_guidance
        with _mapped("encode the prompt"):
            text = self._texts.encode(job.prompt, job.negative_prompt, guided=guided)
        shape = (1, self._pipeline.unet.config.in_channels, job.height // factor, job.width // factor)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32) * sampler.noise_scale
        conditions = self._conditions(job, text)
        return Render(job, text, conditions, sampler, noise.to(self._device))

    def _conditions(self, job: Job, text: Text) -> dict[str, torch.Tensor]:
        """What the UNet takes besides text and timestep: (rows, width) each, in the model's dtype."""
        conditions: dict[str, torch.Tensor] = {}
        width = self._pipeline.unet.config.time_cond_proj_dim
        if width is not None:
            scale = torch.tensor([(job.guidance_scale or 0.0) - 1])
            conditions["timestep_cond"] = self._pipeline.get_guidance_scale_embedding(
                scale, embedding_dim=width
            ).to(self._device, self._dtype)
        if text.pooled is not None:
            # SDXL's micro-conditioning: original size, crop, target size (Podell et al., 2023, section 2.2).
            sizes = torch.tensor([[job.height, job.width, 0, 0, job.height, job.width]] * len(text.pooled))
            conditions["text_embeds"] = text.pooled
            conditions["time_ids"] = sizes.to(self._device, self._dtype)
        return conditions

    @torch.inference_mode()
    def step(self, renders: Sequence[Render]) -> list[SmallcatError | None]:
        """One denoising step for `renders`, of one lane and none of them done, in one forward of the UNet.

        Returns each one's outcome: None when it is a step further, else its error; then it is as it was.
        Raises `OutOfMemoryError` when they do not fit together, `RenderError` when the forward they share
        fails. Then all are as they were, and fewer of them may be tried.
        """
        with _mapped("denoise"):
            predictions = self._predict(renders)
            advanced = [_advanced(render, guess) for render, guess in zip(renders, predictions, strict=True)]
            # One look at the device for all of them.
            finite = _finite([pair[0] for pair in advanced if isinstance(pair, tuple)])
        outcomes: list[SmallcatError | None] = []
        checks = iter(finite)
        for render, pair in zip(renders, advanced, strict=True):
            if isinstance(pair, SmallcatError):
                outcomes.append(pair)
            elif not next(checks):
                outcomes.append(
                    NotFiniteError(
                        f"The latents are no longer finite after step {render.step + 1} of {render.steps}: "
                        "try another scheduler, less guidance, or a worker with SMALLCAT_DTYPE=fp32."
                    )
                )
            else:
                render._latents, render._sampler = pair
                render.step += 1
                outcomes.append(None)
        return outcomes

    def _predict(self, renders: Sequence[Render]) -> list[torch.Tensor]:
        """The UNet's guided prediction for each render, (1, channels, height, width) float32."""
        inputs, times = [], []
        for render in renders:
            scaled = render._sampler.model_input(render._latents, render.step)
            inputs += [scaled] * render.rows
            times += [float(render._sampler.timesteps[render.step])] * render.rows
        conditions = {
            name: torch.cat([render._conditions[name] for render in renders])
            for name in renders[0]._conditions
        }
        timestep_cond = conditions.pop("timestep_cond", None)
        output: torch.Tensor = self._pipeline.unet(
            torch.cat(inputs).to(self._dtype),
            torch.tensor(times, dtype=torch.float32, device=self._device),
            encoder_hidden_states=torch.cat([render._text.embeddings for render in renders]),
            timestep_cond=timestep_cond,
            added_cond_kwargs=conditions or None,
            return_dict=False,
        )[0].float()
        predictions = []
        groups = torch.split_with_sizes(output, [render.rows for render in renders])
        for render, rows in zip(renders, groups, strict=True):
            if render.rows == 2:
                # Ho and Salimans (2022), equation 6, in the parametrisation of Saharia et al. (2022).
                without, with_text = rows.chunk(2)
                predictions.append(without + render.guidance * (with_text - without))
            else:
                predictions.append(rows)
        return predictions

    @torch.inference_mode()
    def decode(self, renders: Sequence[Render]) -> list[Picture | SmallcatError]:
        """The picture of each render, or its error; they may be of different lanes.

        Decoded in chunks of a bounded number of pixels. What does not fit or fails in company is tried alone.
        """
        budget = GPU_DECODE_PIXELS if self._device.type == "cuda" else CPU_DECODE_PIXELS
        pictures: dict[int, Picture | SmallcatError] = {}
        lanes: dict[Hashable, list[int]] = {}
        for place, render in enumerate(renders):
            lanes.setdefault(render.lane, []).append(place)
        for places in lanes.values():
            job = renders[places[0]].job
            size = max(1, budget // ((job.width or 1) * (job.height or 1)))
            for start in range(0, len(places), size):
                chunk = places[start : start + size]
                pictures |= zip(chunk, self._decode_chunk([renders[place] for place in chunk]), strict=True)
        return [pictures[place] for place in range(len(renders))]

    def _decode_chunk(self, renders: Sequence[Render]) -> list[Picture | SmallcatError]:
        try:
            with _mapped("decode"):
                return self._decode_together(renders)
        except (OutOfMemoryError, RenderError) as error:
            if len(renders) > 1:
                return [picture for render in renders for picture in self._decode_chunk([render])]
            if isinstance(error, RenderError):
                return [error]
            job = renders[0].job
            return [
                JobTooLargeError(
                    f"A picture of {job.width} x {job.height} pixels does not fit in the device's memory "
                    "while it is decoded: ask for a smaller one."
                )
            ]

    def _decode_together(self, renders: Sequence[Render]) -> list[Picture | SmallcatError]:
        vae = self._pipeline.vae
        latents = self._unscaled(torch.cat([render._latents for render in renders]))
        images: torch.Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        finite = _finite([images])
        verdicts: list[bool | None] = [None] * len(renders)
        if getattr(self._pipeline, "safety_checker", None) is not None:
            images, verdicts = self._pipeline.run_safety_checker(images, self._device, self._dtype)
        # Exactly VaeImageProcessor.postprocess, which does not denormalise what the checker blacked out, and
        # numpy_to_pil; only uint8 leaves the device.
        if any(verdicts):
            images = torch.stack(
                [
                    image if bad else (image * 0.5 + 0.5).clamp(0, 1)
                    for image, bad in zip(images, verdicts, strict=True)
                ]
            )
        else:
            images = (images * 0.5 + 0.5).clamp(0, 1)
        pixels = (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return [
            Picture(pixels[place], None if verdict is None else bool(verdict))
            if is_finite
            else NotFiniteError(
                "The VAE gave values that are not finite: use a worker with SMALLCAT_DTYPE=fp32."
            )
            for place, (verdict, is_finite) in enumerate(zip(verdicts, finite, strict=True))
        ]

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE takes them. diffusers reads mean and deviation in its SDXL call alone."""
        config = self._pipeline.vae.config
        mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if not self._is_xl or mean is None or deviation is None:
            return latents / float(config.scaling_factor)
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, deviation))
        return latents * deviation / float(config.scaling_factor) + mean


def _advanced(render: Render, prediction: torch.Tensor) -> tuple[torch.Tensor, Sampler] | SmallcatError:
    """The render's next latents and sampler, or the error of its own scheduler."""
    try:
        return render._sampler.advance(prediction, render._latents, render.step)
    except Exception as error:
        if _is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        return RenderError(
            f'Scheduler "{render.job.scheduler}" failed at step {render.step + 1} of {render.steps} '
            f"({first_line(error)}): use another scheduler or another number of steps."
        )


def _finite(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Whether each row of the tensors, alike but for their rows, is finite throughout."""
    if not tensors:
        return []
    answers: list[bool] = torch.cat(list(tensors)).isfinite().flatten(1).all(1).tolist()
    return answers


@contextlib.contextmanager
def _mapped(doing: str) -> Iterator[None]:
    """The one place where torch's errors become ours."""
    try:
        yield
    except SmallcatError:
        raise
    except Exception as error:
        # The frames of the failed forward hold its tensors for as long as somebody holds the error, and the
        # engine tries again with fewer rows while it does.
        traceback.clear_frames(error.__traceback__)
        if _is_out_of_memory(error):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise OutOfMemoryError(f"Out of memory while trying to {doing}: {first_line(error)}") from error
        if isinstance(error, torch.AcceleratorError):
            raise DeviceError(f"The device failed to {doing}: {first_line(error)}") from error
        raise RenderError(f"The model failed to {doing}: {first_line(error)}") from error


def _is_out_of_memory(error: Exception) -> bool:
    """torch has a class for it on a GPU; on a CPU the text tells."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
