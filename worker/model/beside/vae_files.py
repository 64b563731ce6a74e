"""VAEs in files of their own: checked by their header, and loaded beside a model that has another one.

An `AutoencoderKL`, or an `AutoencoderTiny` (TAESD).

A file in diffusers' format has its config beside it, as `config.json`, and is scaled as that says. A single
file has none: it is read with the model's own config, as AUTOMATIC1111 reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from worker.contract.errors import InvalidJobError, SettingsError, first_line
from worker.model.beside import file_content, tiny_vae
from worker.model.beside.file_content import json_object, text_beside
from worker.model.checkpoint import Part, identify_vae
from worker.model.headers import Tensor, read_header

#: Bytes of a file, at most: in fp32 the VAE of SDXL has 335 MB.
MAX_BYTES = 2 << 30
#: The config of a VAE in diffusers' format, beside its weights; bytes of it, at most.
CONFIG, MAX_CONFIG = "config.json", 64 << 10
#: What the names of its layers begin with.
_LAYERS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
#: The largest factor by which latents are scaled; published ones are below 1.
_MOST = 1_000
#: What may be a VAE's name on the hub.
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def describe(path: Path) -> tuple[str, str]:
    """What a VAE fits, and why it cannot be used; empty where it can. Reads no weights."""
    try:
        if problem := file_content.size_problem(path, MAX_BYTES):
            return "", f"{problem}: it is no VAE"
        tensors = read_header(path).tensors
        _config_in(_config_text(path))
        if tiny_vae.is_tiny(tensors):
            return _fits(tiny_vae.channels_of(tensors)), ""
        part = _part(tensors, path)
    except (SettingsError, OSError, ValueError) as error:
        return "", str(error).rstrip(".")
    shape = tensors[part.names["decoder.conv_in.weight"]].shape
    if len(shape) != 4:
        return "", f"its first layer has the shape {shape}, a VAE of pictures has four sides"
    return _fits(shape[1]), ""


def _fits(channels: int) -> str:
    return f"{channels} latent channels"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a VAE: of its file, or of that and its config where it has one beside it.

    Raises `OSError`, and `ValueError` for a config that cannot be read.
    """
    return file_content.sha256_of(path, _config_text)


def _config_in(text: str | None) -> dict[str, Any] | None:
    """The config that `text` is, of a file in diffusers' format; None: of none. Raises `ValueError`."""
    if text is None:
        return None
    config = json_object(text, f"its {CONFIG}", "download it again")
    if (kind := config.get("_class_name")) not in ("AutoencoderKL", tiny_vae.CLASS):
        raise ValueError(f"it is a {str(kind)[:40]}, an AutoencoderKL or an {tiny_vae.CLASS} is needed")
    return config


def _config_text(path: Path) -> str | None:
    return text_beside(path, config_name(path), MAX_CONFIG)


def from_hub(repo: str, setting: str = "SMALLCAT_VAES") -> Path:
    """The folder of a VAE on the hub, in its cache; downloaded if it is not there. Raises `SettingsError`.

    `setting`: the one that names it.
    """
    import huggingface_hub

    names = [CONFIG, "diffusion_pytorch_model.safetensors"]
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=names))
    except Exception as error:
        raise SettingsError(
            f"{setting} names {repo}, which is neither here nor can be downloaded from the hub "
            f"({first_line(error)}): correct it, or name a folder or a file."
        ) from error


def config_name(path: PurePath) -> str:
    """What the config of a file is called that has one beside it; empty for others.

    They have nothing to do with a config that lies in their folder.
    """
    return CONFIG if path.stem.startswith("diffusion_pytorch_model") else ""


def _part(tensors: Mapping[str, Tensor], path: Path) -> Part:
    try:
        part = identify_vae(tensors, str(path))
    except SettingsError as error:
        is_other = "lies beside the checkpoint" in str(error)
        raise SettingsError("it has no VAE that is read here" if is_other else str(error)) from None
    if "decoder.conv_in.weight" not in part.names:
        raise SettingsError("it has no VAE that is read here")
    return part


def load(path: Path, name: str, sha256: str, own: Any) -> Any:
    """The VAE of a file, on the CPU. `own`: the config of the model's VAE.

    Raises `InvalidJobError` for a file that cannot be used or does not fit the model, `RenderError` where it
    is gone or another one.
    """
    import safetensors.torch

    what = f'The VAE "{name}"'
    content = file_content.read(path, what, sha256, most=MAX_BYTES, config_of=_config_text)
    try:
        config, header = _config_in(content.config), read_header(path, content.weights).tensors
        is_tiny = tiny_vae.is_tiny(header)
        if config is not None and is_tiny != (config["_class_name"] == tiny_vae.CLASS):
            raise ValueError(f"its {CONFIG} is that of an {config['_class_name']}, its weights are not")
        if config is None:
            config = tiny_vae.config_for(header) if is_tiny else dict(own)
        stored = safetensors.torch.load(content.weights)
        if not is_tiny:
            stored = {key: stored[stored_name] for key, stored_name in _part(header, path).names.items()}
    except (SettingsError, ValueError, safetensors.SafetensorError) as error:
        raise InvalidJobError(f"{what} cannot be used: {str(error).rstrip('.')}.") from error
    vae = _built(config, stored, name, is_tiny=is_tiny)
    _check(vae.config, name, own, is_tiny=is_tiny)
    return vae.eval().requires_grad_(False)


def _built(config: Mapping[str, Any], tensors: Mapping[str, Any], name: str, *, is_tiny: bool) -> Any:
    """The VAE of a config, with these weights. Raises `InvalidJobError`."""
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    from worker.model.single_file_loader import as_today

    kind = diffusers.AutoencoderTiny if is_tiny else diffusers.AutoencoderKL
    try:
        # Without memory for its weights, which an author's config could make as large as it likes.
        with torch.device("meta"):
            vae = kind.from_config(config)
        if any(key.startswith("decoder.mid_block.") for key in tensors):
            tensors = dict(as_today(key, tensor) for key, tensor in tensors.items())
        elif not is_tiny:
            tensors = convert_ldm_vae_checkpoint(
                {f"first_stage_model.{key}": tensor for key, tensor in tensors.items()}, vae.config
            )
        unused = vae.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    except Exception as error:
        raise InvalidJobError(f'The VAE "{name}" does not fit its config: {first_line(error)}') from error
    missing = next((weight for weight, value in vae.named_parameters() if value.is_meta), None)
    if missing is not None:
        raise InvalidJobError(f'The VAE "{name}" cannot be used: it lacks {missing}.')
    # Without these layers it would draw other pictures.
    if left := next((key for key in unused if key.startswith(_LAYERS)), None):
        raise InvalidJobError(
            f'The VAE "{name}" cannot be used: its file has {left}, for which its config has no place.'
        )
    return vae


def _check(config: Any, name: str, own: Any, *, is_tiny: bool) -> None:
    """Raise `InvalidJobError` for a VAE that a model, whose own has the config `own`, cannot use."""
    if is_tiny and (problem := tiny_vae.problem_of(config)):
        raise InvalidJobError(f'The VAE "{name}" has {problem}: use another one.')
    scale = config.scaling_factor
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale <= _MOST:
        raise InvalidJobError(
            f'The VAE "{name}" cannot be used: its scaling_factor is {str(scale)[:40]}; it must be above '
            f"0 and at most {_MOST:,}."
        )
    for what, has, needs in (
        ("latent channels", config.latent_channels, own.latent_channels),
        ("levels", len(config.block_out_channels), len(own.block_out_channels)),
    ):
        if has != needs:
            raise InvalidJobError(
                f'The VAE "{name}" has {has} {what}, this model needs {needs}: use another one.'
            )
