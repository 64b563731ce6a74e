"""Loads the diffusers pipeline of `SMALLCAT_MODEL` onto a device, without running the model's own code.

Served are the pipelines of the Stable Diffusion UNet family (1.x, 2.x, XL and their latent consistency
models) for text to image and for inpainting, from safetensors only. Any other model raises a `SettingsError`
of one sentence.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker.contract.errors import SettingsError, first_line
from worker.contract.job_parameters import (
    DEFAULT_MODEL,
    MAX_GUIDANCE,
    MAX_MODEL,
    MAX_SIZE,
    MAX_STEPS,
    MIN_SIZE,
    SIZE_STEP,
)
from worker.contract.served_model import Defaults, ServedModel
from worker.contract.settings import WorkerSettings
from worker.model import files as model_files
from worker.model import half_vae, own_vae, single_file_loader
from worker.model.beside import lora_header
from worker.model.checkpoint import inpainting_channels
from worker.model.memory_plan import UNPLANNED, MemoryPlan, Texts
from worker.model.moved_weights import MovedWeights
from worker.model.placement import (
    Choice,
    choose_device,
    choose_dtype,
    choose_precision,
    choose_safety_checker,
    device_name,
    share_gpu,
    take_gpu,
)
from worker.model.planning import planned

#: Steps and guidance if neither the settings nor the model set them.
DEFAULT_STEPS, DEFAULT_GUIDANCE = 30, 7.5
#: The defaults of diffusers for a latent consistency model, which does not improve with more steps.
LCM_STEPS, LCM_GUIDANCE = 4, 8.5


#: What follows for jobs from a model that was made for inpainting.
INPAINTING = (
    "its UNet takes the mask and the masked image; a job without a mask is drawn as if all were masked, as "
    "AUTOMATIC1111 does"
)


class Recommended(BaseModel):
    """The job defaults that a model's author recommends, from `smallcat.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Denoising steps, 1 to 150.
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    #: Classifier-free guidance, 0 to 30; at 1 and below there is none.
    guidance_scale: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE)


@dataclass(frozen=True)
class Loaded:
    """A pipeline on its device, ready to run, with all choices that were made."""

    pipeline: Any
    served: ServedModel
    device: torch.device
    dtype: torch.dtype
    choices: tuple[Choice, ...]
    #: The config of the VAE that the model came with; None: the pipeline has it.
    own_vae: Any = None
    #: What is where on the device, and how much of it may be used.
    plan: MemoryPlan = UNPLANNED
    #: Whether linear layers are to be computed in FP8.
    is_fp8: bool = False


def load(
    settings: WorkerSettings, *, gpu: int | None = None, found: Future[model_files.ModelFiles] | None = None
) -> Loaded:
    """The pipeline that the settings name, on its device, in evaluation mode.

    `gpu`: the index of one that belongs to this process' parent; None: one that no other worker uses.
    `found`: the files, sought already, as for a GPU unless the settings say otherwise.
    Raises `SettingsError` if the model is missing, cannot be downloaded, is truncated, pickled or not served,
    or if the machine does not support the device or the dtype of the settings.
    """
    device, device_reason = choose_device(settings.device)
    if device.type == "cuda":
        device, device_reason = take_gpu(settings.gpu_memory) if gpu is None else share_gpu(gpu)
    dtype, dtype_reason = choose_dtype(settings.dtype, device)
    precision = choose_precision(settings, device, dtype)
    half = dtype == torch.float16
    if found is not None and half == (settings.dtype in ("auto", "fp16") and settings.device != "cpu"):
        files = found.result()
    else:
        files = model_files.find(settings, half=half)
    plan, memory = planned(files, settings, device, dtype, helps=gpu is not None)
    _silence_libraries()
    pipeline = _load_pipeline(files, settings, dtype)
    _check_pipeline(pipeline, files)
    came_with = pipeline.vae.config
    of_vae, chosen_vae = own_vae.put(pipeline, settings.model_vae)
    placed = _to_device(pipeline, device, plan, compiled=settings.compile and plan.compile)
    served = ServedModel(
        name=_name(settings, files),
        revision=f"{_revision(files, settings)}{of_vae}{'-fp8' if precision else ''}",
        defaults=_defaults(pipeline, files, settings),
        inpainting=pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels,
        architecture=lora_header.architecture_of(pipeline.unet.config.cross_attention_dim),
    )
    choices = (
        Choice("device", device_name(device), device_reason),
        *memory,
        Choice("dtype", str(dtype).removeprefix("torch."), dtype_reason),
        *((Choice("precision", "fp8", precision),) if precision else ()),
        Choice(
            "model",
            f"{served.name} at {served.revision}",
            f"{type(pipeline).__name__}, {files.source}: {files.reason}",
        ),
        *(Choice(*note) for note in (files.single.notes if files.single else ())),
        *((Choice("made for", "inpainting", INPAINTING),) if served.inpainting else ()),
        Choice("safety checker", *choose_safety_checker(settings, ships_one=files.ships_checker)),
        *chosen_vae,
        *placed,
    )
    return Loaded(pipeline, served, device, dtype, choices, came_with, plan, bool(precision))


def _silence_libraries() -> None:
    """Let the libraries log only errors.

    Other things that matter are choices here or warnings of a job. And the libraries' warnings quote prompts.
    """
    for library in (diffusers.utils.logging, transformers.utils.logging):
        logging: Any = library
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _load_pipeline(files: model_files.ModelFiles, settings: WorkerSettings, dtype: torch.dtype) -> Any:
    kind = getattr(diffusers, files.pipeline_class)
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if "XL" in files.pipeline_class:
        # A watermark changes pixels, and whether diffusers adds one depends on the installed packages.
        options["add_watermarker"] = False
    elif not (files.ships_checker and settings.safety_checker):
        options |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        if files.single:
            return single_file_loader.load(files.single, dtype, options)
        return kind.from_pretrained(files.path, variant=files.variant, use_safetensors=True, **options)
    except SettingsError:
        raise
    except Exception as error:
        single = files.single
        remedy = f"correct the configs in {single.configs}" if single else "download its files again"
        raise SettingsError(
            f"The model {files.source} does not load ({first_line(error)}): {remedy}."
        ) from error


def _check_pipeline(pipeline: Any, files: model_files.ModelFiles) -> None:
    """Raise `SettingsError` if the model is for neither text to image nor inpainting, or lacks weights."""
    source, kind = files.source, type(pipeline.unet)
    if not issubclass(kind, diffusers.UNet2DConditionModel):
        raise SettingsError(f"The model {source} has a {kind.__name__}: use one with a UNet2DConditionModel.")
    takes, has = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if takes not in (has, inpainting_channels(has)):
        raise SettingsError(
            f"The model {source} has a UNet of {takes} input channels and a VAE of {has}, and is not served: "
            "use a text-to-image or an inpainting model."
        )
    for name, component in pipeline.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        weights = list(component.parameters())
        needed = sum(weight.numel() for weight in weights)
        # For a tensor that is not in the files, the libraries only warn, and leave it empty or random.
        if any(weight.is_meta for weight in weights) or files.values.get(name, needed) < needed:
            raise SettingsError(
                f"The {name} of {source} has {files.values.get(name, 0):,} of {needed:,} weights: download "
                "its files again."
            )


def _to_device(pipeline: Any, device: torch.device, plan: MemoryPlan, *, compiled: bool) -> list[Choice]:
    """Move all components to the device, ready for inference. Returns what was chosen."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    vae = pipeline.vae
    texts = [each for each in map(pipeline.components.get, ("text_encoder", "text_encoder_2")) if each]
    # The VAE is tried while the UNet is still being copied: it saves half a second of a start.
    with ThreadPoolExecutor(1) as thread:
        halves = thread.submit(_vae_to, pipeline, device)
        for component in pipeline.components.values():
            is_text = component in texts and plan.texts is not Texts.GPU
            if isinstance(component, torch.nn.Module) and component is not vae and not is_text:
                component.to(device)
    if plan.texts is Texts.MOVED:
        MovedWeights(texts, device)
    elif plan.texts is Texts.HOST:
        for text_encoder in texts:
            text_encoder.to(torch.float32)  # CPUs are slow in fp16.
        # The thread of the steps keeps a core.
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    pipeline.set_progress_bar_config(disable=True)
    choices = [Choice(*half) for half in halves.result()]
    if device.type == "cuda" and not compiled:
        why = "channels_last is faster on a GPU only if the UNet is compiled"
        return [*choices, Choice("memory layout", "contiguous", why)]
    pipeline.unet.to(memory_format=torch.channels_last)
    vae.to(memory_format=torch.channels_last)
    why = "convolutions take up to a third less time on a CPU"
    if device.type == "cuda":
        why = "the layout of the tensor cores; compiled code needs no conversions"
    return [*choices, Choice("memory layout", "channels_last", why)]


def _vae_to(pipeline: Any, device: torch.device) -> list[half_vae.Half]:
    """Move the VAE to the device, and bring SDXL's to fp16 so that it works there. Returns what was done."""
    vae = pipeline.vae.to(device)
    if not isinstance(pipeline, diffusers.StableDiffusionXLPipeline) or vae.dtype != torch.float16:
        return []
    if vae.config.force_upcast:
        # diffusers converts such a VAE to fp32 for each call.
        return half_vae.to_half(vae)
    # What its config says is of the decoder: some were trained for fp16, with the encoder left as it was.
    return [half_vae.encoder_to_half(vae)]


def _name(settings: WorkerSettings, files: model_files.ModelFiles) -> str:
    name = settings.model_name or files.name
    if name == DEFAULT_MODEL or len(name) > MAX_MODEL or not name.isprintable():
        raise SettingsError(
            f'The model\'s name is "{name[:60]}", which no job can name: set SMALLCAT_MODEL_NAME to another '
            f"one, of at most {MAX_MODEL} printable characters."
        )
    return name


def _revision(files: model_files.ModelFiles, settings: WorkerSettings) -> str:
    """The revision of the files. Without its safety checker, a model returns other pictures."""
    if files.ships_checker and not settings.safety_checker:
        return f"{files.revision}-unchecked"
    return files.revision


def _defaults(pipeline: Any, files: model_files.ModelFiles, settings: WorkerSettings) -> Defaults:
    """The defaults of jobs: from the settings, else from the model, else 30 steps and guidance 7.5."""
    recommended = _recommended(files)
    is_lcm = isinstance(pipeline, diffusers.LatentConsistencyModelPipeline)
    steps = (settings.default_steps, recommended.steps, LCM_STEPS if is_lcm else DEFAULT_STEPS)
    guidance = (
        settings.default_guidance_scale,
        recommended.guidance_scale,
        LCM_GUIDANCE if is_lcm else DEFAULT_GUIDANCE,
    )
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return Defaults(
        width=_job_side(width * pipeline.vae_scale_factor),
        height=_job_side(height * pipeline.vae_scale_factor),
        steps=next(value for value in steps if value is not None),
        guidance_scale=next(value for value in guidance if value is not None),
    )


def _recommended(files: model_files.ModelFiles) -> Recommended:
    path = files.path / model_files.RECOMMENDED
    if files.single or not path.is_file():
        return Recommended()
    try:
        return Recommended.model_validate(json.loads(path.read_text("utf-8")))
    except (ValidationError, ValueError) as error:
        raise SettingsError(
            f'{path} must be like {{"steps": 8, "guidance_scale": 2.0}} and nothing else: {error}'
        ) from None


def _job_side(side: int) -> int:
    """`side` in pixels, as a job may have it: within the limits, and rounded down to the step."""
    return max(MIN_SIZE, min(MAX_SIZE, side // SIZE_STEP * SIZE_STEP))
