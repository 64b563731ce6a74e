"""VAEs in files of their own: checked by their header, and loaded beside a model that has another one.

A file in diffusers' format has its config beside it, as `config.json`, and is scaled as that says. A single
file has none: it is read with the model's own config, as AUTOMATIC1111 reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from worker.contract.errors import InvalidJobError, RenderError, SettingsError, first_line
from worker.model.checkpoint import Part, identify_vae
from worker.model.headers import Tensor, read_header

#: Bytes of a file, at most: in fp32 the VAE of SDXL has 335 MB.
MAX_BYTES = 2 << 30
#: The config of a VAE in diffusers' format, beside its weights; bytes of it, at most.
CONFIG, MAX_CONFIG = "config.json", 64 << 10


def describe(path: Path) -> tuple[str, str]:
    """What a VAE fits, and why it cannot be used; empty where it can. Reads no weights."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            return "", f"it has {size:,} bytes, the limit is {MAX_BYTES:,}: it is no VAE"
        tensors = read_header(path).tensors
        part = _part(tensors, path)
        config_of(path)
    except (SettingsError, OSError, ValueError) as error:
        return "", str(error).rstrip(".")
    shape = tensors[part.names["decoder.conv_in.weight"]].shape
    if len(shape) != 4:
        return "", f"its first layer has the shape {shape}, a VAE of pictures has four sides"
    return f"{shape[1]} latent channels", ""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a VAE: of its file, or of that and its config where it has one beside it."""
    with path.open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    if not (config := _config_path(path)).is_file():
        return weights
    return hashlib.sha256(json.dumps([weights, config.read_text("utf-8")]).encode()).hexdigest()


def config_of(path: Path) -> dict[str, Any] | None:
    """The config beside a file in diffusers' format; None where there is none. Raises `ValueError`."""
    place = _config_path(path)
    if not place.is_file():
        return None
    if place.stat().st_size > MAX_CONFIG:
        raise ValueError(f"its {CONFIG} has more than {MAX_CONFIG:,} bytes")
    try:
        config = dict(json.loads(place.read_text("utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"its {CONFIG} is no JSON object: download it again") from None
    if (kind := config.get("_class_name")) != "AutoencoderKL":
        raise ValueError(f"it is a {kind}, an AutoencoderKL is needed")
    return config


def from_hub(repo: str) -> Path:
    """The folder of a VAE on the hub, in its cache; downloaded if it is not there. Raises `SettingsError`."""
    import huggingface_hub

    names = [CONFIG, "diffusion_pytorch_model.safetensors"]
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=names))
    except Exception as error:
        raise SettingsError(
            f"SMALLCAT_VAES names {repo}, which is neither here nor can be downloaded from the hub "
            f"({first_line(error)}): correct it, or name a folder or a file."
        ) from error


def config_name(path: PurePath) -> str:
    """What the config of a file is called that has one beside it; empty for others.

    They have nothing to do with a config that lies in their folder.
    """
    return CONFIG if path.stem.startswith("diffusion_pytorch_model") else ""


def _config_path(path: Path) -> Path:
    return path.with_name(config_name(path) or f".{path.name}.no-config")


def _part(tensors: Mapping[str, Tensor], path: Path) -> Part:
    try:
        part = identify_vae(tensors, str(path))
    except SettingsError as error:
        is_other = "lies beside the checkpoint" in str(error)
        raise SettingsError("it has no VAE that is read here" if is_other else str(error)) from None
    if "decoder.conv_in.weight" not in part.names:
        raise SettingsError("it has no VAE that is read here")
    return part


def load(path: Path, name: str, sha256: str, own: Mapping[str, Any]) -> Any:
    """The VAE of a file, an `AutoencoderKL` on the CPU. `own`: the config of the model's VAE.

    Raises `InvalidJobError` for a file that cannot be used, `RenderError` where it is gone or another one.
    """
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from safetensors.torch import load_file

    from worker.model.single_file_loader import as_today

    try:
        if sha256_of(path) != sha256:
            raise RenderError(f'The VAE "{name}" was replaced while a job asked for it.')
        config = config_of(path) or dict(own)
        part = _part(read_header(path).tensors, path)
        stored = load_file(path)
        tensors = {key: stored[stored_name] for key, stored_name in part.names.items()}
    except OSError as error:
        raise RenderError(f'The VAE "{name}" cannot be read: {error}.') from error
    except (SettingsError, ValueError) as error:
        raise InvalidJobError(f'The VAE "{name}" cannot be used: {str(error).rstrip(".")}.') from error
    try:
        # Without memory for its weights, which an author's config could make as large as it likes.
        with torch.device("meta"):
            vae = diffusers.AutoencoderKL.from_config(config)
        if any(key.startswith("decoder.mid_block.") for key in tensors):
            tensors = dict(as_today(key, tensor) for key, tensor in tensors.items())
        else:
            tensors = convert_ldm_vae_checkpoint(
                {f"first_stage_model.{key}": tensor for key, tensor in tensors.items()}, vae.config
            )
        vae.load_state_dict(tensors, strict=False, assign=True)
    except Exception as error:
        raise InvalidJobError(f'The VAE "{name}" does not fit its config: {first_line(error)}') from error
    missing = next((weight for weight, value in vae.named_parameters() if value.is_meta), None)
    if missing is not None:
        raise InvalidJobError(f'The VAE "{name}" cannot be used: it lacks {missing}.')
    return vae.eval().requires_grad_(False)
