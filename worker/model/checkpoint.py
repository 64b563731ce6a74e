"""What a single .safetensors file is: its family, its parts, and how they are to be read. No torch here.

A checkpoint has the layout of Stable Diffusion's first release, in which UNet, VAE and text encoders have
prefixes of their own. Tools write several prefixes for the same part; all of them are read here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from worker.contract.errors import SettingsError
from worker.model.foreign import refuse_foreign
from worker.model.headers import Tensor

#: Prefix of the UNet in every checkpoint.
UNET = "model.diffusion_model."
#: The tensor by which a latent consistency model's UNet takes the guidance (Luo et al., 2023): in the
#: original layout's manner, and as diffusers' script that converts to it leaves its name.
EMBEDS_GUIDANCE = ("time_embed.cond_proj.weight", "time_embedding.cond_proj.weight")
#: Prefixes of the VAE.
VAES = ("first_stage_model.", "vae.")
#: Suffixes that a weight's scale has in a checkpoint whose weights are stored as scaled fp8. ComfyUI's first
#: way to write it, and its second.
SCALES = (".scale_weight", ".weight_scale")
#: What such a checkpoint has besides: marks, and scales for inputs, which arithmetic in fp16 does not need.
_MARKS = ("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant")
#: How weights may be stored. Others are quantised in a way that is not read.
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
#: What of a VAE is loaded; the rest is from its training.
_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
#: What OpenCLIP's and CLIP's text encoders may have besides what is used.
_UNUSED_TEXT = ("position_ids", "logit_scale", "attn_mask")


@dataclass(frozen=True)
class Family:
    """An architecture that is served."""

    #: As messages name it.
    name: str
    #: The folder of its configs.
    configs: str
    #: Its pipeline in diffusers.
    pipeline_class: str
    #: What its first release predicts: "epsilon" or "v_prediction".
    prediction: str


SD1 = Family("Stable Diffusion 1.x", "sd1", "StableDiffusionPipeline", "epsilon")
SD2 = Family("Stable Diffusion 2.x", "sd2", "StableDiffusionPipeline", "v_prediction")
SDXL = Family("SDXL", "sdxl", "StableDiffusionXLPipeline", "epsilon")

#: CLIP's text encoder, as transformers and old tools name its tensors, and OpenCLIP's.
_CLIP, _OPEN_CLIP = "text_model.", "resblocks."


@dataclass(frozen=True)
class Part:
    """One component of a checkpoint."""

    #: Name in the file by name as diffusers' converters want it, without prefix.
    names: Mapping[str, str]
    #: How many numbers its tensors have.
    values: int


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, by its header."""

    family: Family
    #: By component: "unet", "vae" where it has one, "text_encoder" and, for SDXL, "text_encoder_2".
    parts: Mapping[str, Part]
    #: Names of the scales by the names of their weights. Empty unless the weights are scaled fp8.
    scales: Mapping[str, str]
    #: Whether it has averaged weights (EMA) besides the UNet's own.
    has_ema: bool
    #: In how many numbers its UNet takes the guidance: a latent consistency model. 0: it does not.
    guidance_width: int = 0
    #: How many channels its UNet takes, where it was made for inpainting. 0: it was not.
    inpainting_channels: int = 0


def inpainting_channels(latents: int) -> int:
    """How many channels a UNet made for inpainting takes, whose latents have so many channels.

    The latents, the mask and the latents of the masked image: 9 for latents of 4.
    """
    return latents + 1 + latents


def identify(tensors: Mapping[str, Tensor], source: str) -> Checkpoint:
    """What the checkpoint with these `tensors` is. Raises `SettingsError` if it is none that is served."""
    has_unet = any(name.startswith(f"{UNET}input_blocks.") for name in tensors)
    refuse_foreign(tensors, source, has_unet=has_unet)
    family, prefixes = _family(tensors, source)
    taken = _inpainting_channels(tensors, source)
    guidance = next((name for name in EMBEDS_GUIDANCE if f"{UNET}{name}" in tensors), None)
    if guidance and family is not SD1:
        raise SettingsError(
            f"The file {source} is a latent consistency model of {family.name}: use its folder in the format "
            "of diffusers."
        )
    if family is SDXL and not any(f"{UNET}middle_block.1.transformer_blocks." in name for name in tensors):
        raise SettingsError(
            f"The file {source} is a smaller SDXL (SSD-1B, Segmind Vega, KOALA): use its folder in the "
            "format of diffusers."
        )
    scales = _scales(tensors, source)
    names = [name for name in tensors if not _is_aside(name)]
    of_unet = {name.removeprefix(UNET): name for name in names if name.startswith(UNET)}
    if guidance:
        of_unet[EMBEDS_GUIDANCE[0]] = of_unet.pop(guidance)
    parts = {"unet": _part(tensors, of_unet)}
    for component, prefix in prefixes.items():
        parts[component] = _part(tensors, _text_names(names, prefix))
    if vae := vae_names(names):
        parts["vae"] = _part(tensors, vae)
    _refuse_quantised(tensors, parts, source)
    has_ema = any(name.startswith("model_ema.diffusion_model") for name in tensors)
    guidance_width = tensors[f"{UNET}{guidance}"].shape[-1] if guidance else 0
    return Checkpoint(family, parts, scales, has_ema, guidance_width, taken)


def identify_vae(tensors: Mapping[str, Tensor], source: str) -> Part:
    """The VAE in a file with these `tensors`, in any layout. Raises `SettingsError` if it has none."""
    names = vae_names(name for name in tensors if not _is_aside(name))
    if not any(name.startswith("decoder.conv_in.") for name in names):
        raise SettingsError(
            f"The file {source} lies beside the checkpoint as its VAE, but has none: remove it or rename it."
        )
    refuse_scaled(tensors, source)
    return _part(tensors, names)


def refuse_scaled(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise `SettingsError` if weights in a folder, or of a VAE beside a checkpoint, are quantised."""
    for name, tensor in tensors.items():
        # Without its scales a weight is read wrongly, and without a word.
        if name.endswith(SCALES) or (name.endswith(".weight") and tensor.dtype not in _FLOATS):
            raise SettingsError(
                f"The file {source} is quantised (it has {name}, {tensor.dtype}), which is not read here: "
                "use a version in fp16, bf16 or plain fp8."
            )


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """Names of a VAE's tensors in a file, by name without prefix."""
    names = list(names)
    for prefix in (*VAES, ""):
        found = {
            name.removeprefix(prefix): name
            for name in names
            if name.startswith(prefix) and name.removeprefix(prefix).startswith(_VAE_PARTS)
        }
        if found:
            return found
    return {}


def _family(tensors: Mapping[str, Tensor], source: str) -> tuple[Family, dict[str, str]]:
    """The family, by its text encoders, and their prefixes."""

    def has(prefix: str, mark: str) -> bool:
        return any(name.startswith(prefix) and mark in name for name in tensors)

    if has("conditioner.embedders.1.model.", _OPEN_CLIP):
        first = _clip_prefix(tensors, "conditioner.embedders.0.")
        if first is None:
            raise SettingsError(
                f"The file {source} lacks SDXL's first text encoder: use the complete checkpoint."
            )
        return SDXL, {"text_encoder": first, "text_encoder_2": "conditioner.embedders.1.model."}
    for place in ("cond_stage_model.", "conditioner.embedders.0."):
        if has(f"{place}model.", _OPEN_CLIP):
            if f"{UNET}label_emb.0.0.weight" in tensors:
                raise SettingsError(
                    f"The file {source} is SDXL's refiner, which finishes the pictures of another model: use "
                    "SDXL's base model, or one that was made from it."
                )
            return SD2, {"text_encoder": f"{place}model."}
    is_xl = f"{UNET}label_emb.0.0.weight" in tensors
    for place in ("cond_stage_model.", "conditioner.embedders.0."):
        prefix = _clip_prefix(tensors, place)
        if prefix is not None and is_xl:
            raise SettingsError(
                f"The file {source} lacks SDXL's second text encoder: use the complete checkpoint."
            )
        if prefix is not None:
            return SD1, {"text_encoder": prefix}
    raise SettingsError(
        f"The file {source} has a UNet and no text encoder: use the complete checkpoint, with UNet, VAE and "
        "text encoder."
    )


def _clip_prefix(tensors: Mapping[str, Tensor], place: str) -> str | None:
    """The prefix of CLIP's text encoder at `place`: as tools have written it since 2023, or as before."""
    for prefix in (f"{place}transformer.{_CLIP}", f"{place}transformer."):
        if f"{prefix}embeddings.token_embedding.weight" in tensors:
            return prefix
    return None


def _text_names(names: Iterable[str], prefix: str) -> dict[str, str]:
    return {
        name.removeprefix(prefix): name
        for name in names
        if name.startswith(prefix) and not name.endswith(_UNUSED_TEXT)
    }


def _inpainting_channels(tensors: Mapping[str, Tensor], source: str) -> int:
    """How many channels the UNet takes, where it was made for inpainting; 0 where it takes latents alone.

    Raises `SettingsError` if it takes something else besides the latents, such as a picture.
    """
    first, last = (tensors.get(f"{UNET}{name}.weight") for name in ("input_blocks.0.0", "out.2"))
    if first is None or last is None or len(first.shape) != 4:
        raise SettingsError(f"The file {source} has an incomplete UNet: use the complete checkpoint.")
    takes, gives = first.shape[1], last.shape[0]
    if takes == gives:
        return 0
    if takes == inpainting_channels(gives):
        return takes
    kinds = {
        gives * 2: "a model that edits pictures, such as InstructPix2Pix",
        gives + 3: "an upscaler",
        gives + 1: "a depth-to-image model",
    }
    raise SettingsError(
        f"The file {source} is {kinds.get(takes, 'a model for something else')} (its UNet takes {takes} "
        f"channels and gives {gives}), and is not served: use a version for text to image or inpainting."
    )


def _is_aside(name: str) -> bool:
    return name.endswith((*_MARKS, *SCALES))


def _scales(tensors: Mapping[str, Tensor], source: str) -> dict[str, str]:
    """The scales of scaled fp8, by the names of their weights."""
    found = {}
    for name in tensors:
        suffix = next((each for each in SCALES if name.endswith(each)), None)
        if suffix is None:
            continue
        weight = f"{name.removesuffix(suffix)}.weight"
        scale, scaled = tensors[name], tensors.get(weight)
        rows = scaled.shape[:1] if scaled else ()
        if scaled is None or not (scale.values == 1 or scale.shape[:1] == rows == (scale.values,)):
            raise SettingsError(
                f"The file {source} has the scale {name}, which fits no weight: use a version in fp16, or "
                "one in fp8 with one scale for each weight."
            )
        found[weight] = name
    return found


def _part(tensors: Mapping[str, Tensor], names: dict[str, str]) -> Part:
    return Part(names, sum(tensors[name].values for name in names.values()))


def _refuse_quantised(tensors: Mapping[str, Tensor], parts: Mapping[str, Part], source: str) -> None:
    for part in parts.values():
        for name in part.names.values():
            dtype = tensors[name].dtype
            if dtype not in _FLOATS:
                raise SettingsError(
                    f"The file {source} is quantised ({name} is {dtype}), which is not read: use a version "
                    "in fp16, bf16 or fp8."
                )
