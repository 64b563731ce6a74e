"""Loads a single .safetensors file, part by part, with configs that come with smallcat or from the user.

diffusers' own converters turn each part's tensors into a component. They get the names that they know.
Weights that are stored as scaled fp8 are multiplied by their scales on the way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import safe_open

from worker.contract.errors import SettingsError, first_line
from worker.model import index as model_index
from worker.model import prediction
from worker.model.checkpoint import SD2, SDXL, UNET, Checkpoint, Part, identify, identify_vae
from worker.model.headers import digest, read_header
from worker.model.prediction import Prediction

#: Configs of each family and CLIP's vocabulary; README.md there has their sources.
CONFIGS = Path(__file__).parent / "configs"
#: Suffixes of a single file.
SUFFIXES = (".safetensors", ".sft")
#: Prefixes of parts that diffusers' converters know.
_PREFIXES = {"unet": UNET, "vae": "first_stage_model."}
_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
_OPEN_CLIP_XL = "conditioner.embedders.1.model."
#: The tokens that fill a prompt up, by tokenizer: CLIP's last token, and OpenCLIP's first.
_PAD = {"sd1": ("<|endoftext|>",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}
#: The side of the pictures of the 2.x model that predicts noise, in latents.
_SD2_BASE_SIZE = 64
#: The projection of SDXL's second text encoder where a tool made a linear layer of it, which is transposed.
_PROJECTION = "text_projection.weight"
#: Names of a VAE's attention in diffusers' first versions, and today.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint in one file, with all that is needed to load it."""

    path: Path
    #: The value of `SMALLCAT_MODEL`, for messages.
    source: str
    checkpoint: Checkpoint
    #: The file with the VAE, and the VAE in it: the checkpoint's own, or one that lies beside it.
    vae: tuple[Path, Part]
    #: What the UNet predicts. None: the user's configs say.
    predicts: Prediction | None
    #: The folder of the configs.
    configs: Path
    #: One of `model_index.PIPELINES`.
    pipeline_class: str
    #: 16 hexadecimal digits.
    revision: str
    #: What was chosen, what it is, and why; for the log.
    notes: tuple[tuple[str, str, str], ...]


def find(path: Path, source: str, config_dir: str) -> SingleFile:
    """The checkpoint at `path`, checked by its header. Raises `SettingsError` if it is none that is served.

    `config_dir`: the user's folder with configs, or "".
    """
    header = read_header(path)
    checkpoint = identify(header.tensors, source)
    family = checkpoint.family
    vae, vae_note = _vae(path, source, checkpoint)
    files = {"": path} | ({"vae": vae[0]} if vae[0] != path else {})
    predicts: Prediction | None = None
    if config_dir:
        configs = Path(config_dir).expanduser()
        kind, texts = _user_configs(configs, source, checkpoint)
        files |= texts
        predicted = _predicted_by(configs)
        notes = [("prediction", predicted, prediction.reason_of_configs(header, predicted))]
    else:
        configs, kind = CONFIGS / family.configs, family.pipeline_class
        predicts = prediction.find(path, header, family)
        notes = [("prediction", str(predicts), predicts.reason)]
    if vae_note:
        notes.append(("VAE", vae[0].name if vae[0] != path else "the file's own", vae_note))
    if checkpoint.has_ema:
        reason = "as A1111, ComfyUI and Forge take; the averaged ones (model_ema) are left out"
        notes.append(("UNet weights", "the plain ones", reason))
    if checkpoint.scales:
        notes.append(
            ("scaled fp8", f"{len(checkpoint.scales):,} weights", "multiplied by their scales at the start")
        )
    revision = _revision(digest(files), checkpoint, predicts)
    return SingleFile(path, source, checkpoint, vae, predicts, configs, kind, revision, tuple(notes))


def load(single: SingleFile, dtype: torch.dtype, options: Mapping[str, Any]) -> Any:
    """The pipeline of `single` in `dtype`, on the CPU. `options` go to the pipeline.

    Raises `SettingsError` if the file does not fit its configs.
    """
    index = model_index.read_index(single.configs, single.source)
    classes = model_index.components(index)
    components: dict[str, Any] = {}
    for name, part in {**single.checkpoint.parts, "vae": single.vae[1]}.items():
        if name in classes:
            components[name] = _component(single, name, part, classes[name], dtype)
    if single.predicts is not None:
        tokens = components["text_encoder"].config.max_position_embeddings
        components |= tokenizers(single.checkpoint.family.configs, tokens)
        components["scheduler"] = _scheduler(single, classes["scheduler"][1], single.predicts)
    kind = getattr(diffusers, single.pipeline_class)
    return kind.from_pretrained(single.configs, **components, **options)


# --- finding ------------------------------------------------------------------------------------------------


def _vae(path: Path, source: str, checkpoint: Checkpoint) -> tuple[tuple[Path, Part], str]:
    """The file with the VAE and the VAE in it, and why, if that is worth a note.

    A1111's convention: NAME.vae.safetensors beside the checkpoint NAME.safetensors wins over its own.
    """
    own = checkpoint.parts.get("vae")
    stem = path.name.removesuffix(path.suffix)
    try:
        beside = {each.name.lower(): each for each in path.parent.iterdir()}
    except OSError:  # A folder that may not be listed.
        beside = {}
    for suffix in SUFFIXES:
        if (found := beside.get(f"{stem}.vae{suffix}".lower())) is not None and found.is_file():
            part = identify_vae(read_header(found).tensors, str(found))
            return (found, part), "it lies beside the checkpoint, as A1111 takes it"
    pickled = next(
        (f"{stem}.vae{each}" for each in (".pt", ".ckpt") if f"{stem}.vae{each}".lower() in beside), None
    )
    if own is None:
        rest = f"convert {pickled} to it" if pickled else "or use a version of the checkpoint with a VAE"
        raise SettingsError(
            f"The file {source} has no VAE: put one beside it as {stem}.vae.safetensors, {rest}."
        )
    if pickled:
        note = f"{pickled} beside it is pickled and left out: convert it to {stem}.vae.safetensors to use it"
        return (path, own), note
    return (path, own), ""


def _user_configs(configs: Path, source: str, checkpoint: Checkpoint) -> tuple[str, dict[str, Path]]:
    """The pipeline's class in the user's configs, and their files, by name."""
    where = f"in SMALLCAT_MODEL_CONFIG_DIR={configs}"
    index = model_index.read_index(configs, where)
    if (checkpoint.family is SDXL) != ("XL" in index["_class_name"]):
        raise SettingsError(
            f"The file {source} is for a {checkpoint.family.pipeline_class}, but SMALLCAT_MODEL_CONFIG_DIR="
            f"{configs} has the configs of a {index['_class_name']}: set it to a folder that fits, or unset "
            "it."
        )
    index.pop("safety_checker", None)  # A single file has no safety checker.
    names = [file.relative_to(configs).as_posix() for file in configs.rglob("*") if file.is_file()]
    model_index.refuse_incomplete(index, names, where)
    relevant = [
        name for name in model_index.relevant_files(index, names) if not name.endswith(".safetensors")
    ]
    return index["_class_name"], {name: configs / name for name in relevant}


def _predicted_by(configs: Path) -> str:
    try:
        config = dict(json.loads((configs / "scheduler" / "scheduler_config.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return "epsilon"  # What is wrong with the file is said when it is loaded.
    return str(config.get("prediction_type", "epsilon"))


def _revision(of_files: str, checkpoint: Checkpoint, predicts: Prediction | None) -> str:
    """The digest of the files, and of how they are read where earlier versions read them otherwise."""
    reading = ["scaled fp8"] if checkpoint.scales else []
    if predicts is not None and (predicts.kind != checkpoint.family.prediction or predicts.zero_snr):
        reading.append(str(predicts))
    if not reading:
        return of_files
    return hashlib.sha256(json.dumps([of_files, *reading]).encode()).hexdigest()[:16]


# --- loading ------------------------------------------------------------------------------------------------


def _component(single: SingleFile, name: str, part: Part, kind: tuple[str, str], dtype: torch.dtype) -> Any:
    family, path = single.checkpoint.family, single.vae[0] if name == "vae" else single.path
    own = single.predicts is not None
    expected = f"that of {family.name}" if own else "what SMALLCAT_MODEL_CONFIG_DIR describes"
    try:
        tensors = _tensors(single, name, part, path, dtype)
        if name.startswith("text_encoder"):
            module = create_diffusers_clip_model_from_ldm(
                getattr(transformers, kind[1]),
                checkpoint=tensors,
                subfolder=name,
                config=str(single.configs),
                torch_dtype=dtype,
                local_files_only=True,
            )
        else:
            is_base = family is SD2 and single.predicts is not None and single.predicts.kind == "epsilon"
            module = getattr(diffusers, kind[1]).from_single_file(
                tensors,
                config=str(single.configs),
                subfolder=name,
                dtype=dtype,
                local_files_only=True,
                **({"sample_size": _SD2_BASE_SIZE} if is_base and name == "unet" else {}),
            )
        missing = next((weight for weight, value in module.named_parameters() if value.is_meta), None)
        needed = sum(weight.numel() for weight in module.parameters())
        # Text encoders may have more than is used: 2.x leaves out the last layer.
        if missing or (part.values != needed and not name.startswith("text_encoder")):
            what = f"it lacks {missing}" if missing else f"it has {part.values:,} of {needed:,} weights"
            raise ValueError(what)
    except Exception as error:
        # So torch says that some of the module's tensors are not among those of the file.
        lacks_some = isinstance(error, NotImplementedError) and "meta tensor" in str(error)
        why = f"{part.values:,} weights are too few" if lacks_some else first_line(error)
        raise SettingsError(
            f"The {name} of {path} is not {expected} ({why}): use a complete version of the "
            "model, or set SMALLCAT_MODEL_CONFIG_DIR to a folder with the configs of its components."
        ) from error
    return module


def _tensors(
    single: SingleFile, name: str, part: Part, path: Path, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors of a part by the names that diffusers' converters know, still in the file."""
    read = _read(single, part, path, dtype)
    if name == "vae" and any(key.startswith("decoder.mid_block.") for key in part.names):
        return dict(_as_today(key, tensor) for key, tensor in read)
    tensors = {f"{_prefix(single, name)}{key}": tensor for key, tensor in read}
    if (projection := tensors.pop(f"{_OPEN_CLIP_XL}{_PROJECTION}", None)) is not None:
        tensors[f"{_OPEN_CLIP_XL}text_projection"] = projection.T
    return tensors


def _read(
    single: SingleFile, part: Part, path: Path, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    scales = single.checkpoint.scales if path == single.path else {}
    with safe_open(path, framework="pt") as file:
        for name, stored in part.names.items():
            tensor = file.get_tensor(stored)
            if (scale := scales.get(stored)) is not None:
                factor = file.get_tensor(scale).float().reshape(-1, *[1] * (tensor.ndim - 1))
                tensor = (tensor.float() * factor).to(dtype)
            yield name, tensor


def _prefix(single: SingleFile, name: str) -> str:
    if name == "text_encoder":
        return _OPEN_CLIP if single.checkpoint.family is SD2 else _CLIP
    # Below the prefix of 2.x, the converter would leave out a layer of SDXL's second text encoder.
    return _OPEN_CLIP_XL if name == "text_encoder_2" else _PREFIXES[name]


def _as_today(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A tensor of a VAE in diffusers' own layout, without the names and shapes of its first versions."""
    name = ".".join(_OLD_ATTENTION.get(word, word) for word in name.split("."))
    return name, tensor[..., 0, 0] if "attentions" in name and tensor.ndim == 4 else tensor


def tokenizers(family: str, tokens: int) -> dict[str, Any]:
    """The tokenizers of the family with these configs, by name, for a window of `tokens` tokens."""
    return {
        name: transformers.CLIPTokenizer.from_pretrained(
            CONFIGS / "clip", model_max_length=tokens, pad_token=pad
        )
        for name, pad in zip(("tokenizer", "tokenizer_2"), _PAD[family], strict=False)
    }


def _scheduler(single: SingleFile, kind: str, predicts: Prediction) -> Any:
    """The family's scheduler for what the UNet predicts.

    Zero terminal SNR takes the whole schedule, from its last step on: "trailing" in Lin et al. (2023).
    """
    config = json.loads((single.configs / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    config["prediction_type"] = predicts.kind
    if predicts.zero_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if predicts.zero_snr and kind == "PNDMScheduler":
        kind = "DDIMScheduler"  # PNDM, the scheduler of 1.x, knows no zero terminal SNR.
    if single.checkpoint.family is SD2 and predicts.kind == "epsilon":
        kind = "PNDMScheduler"  # As the 2.x of 512 pixels has it.
    return getattr(diffusers, kind).from_config(config)
