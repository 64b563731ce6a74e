"""What a checkpoint's UNet predicts: the noise, or v (Salimans and Ho, 2022); and how its noise ends.

The weights look the same either way, and the wrong reading draws noise. So tools leave marks, which are read
here in the order of their weight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from worker.model.checkpoint import SD2, UNET, Family
from worker.model.headers import Header

_NAMES = {"v": "v_prediction", "v_prediction": "v_prediction", "velocity": "v_prediction"}
_NAMES |= {"eps": "epsilon", "epsilon": "epsilon"}
#: The prediction in a config of the original code: Stable Diffusion's, and that of SDXL's.
_IN_YAML = re.compile(
    r"^\s*parameterization\s*:\s*[\"']?(\w+)|denoiser_scaling\.(V|Eps)Scaling", re.MULTILINE
)
#: A config file of the original code is a few KB.
_YAML_BYTES = 1_000_000
#: A tensor by which ComfyUI (`supported_models.SD20.model_type`) tells the two kinds of 2.x apart, and the
#: standard deviation above which it is the one that predicts v.
_TELLTALE, _V_ABOVE = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
#: The last of `alphas_cumprod` is 0.0047 in Stable Diffusion; below this the noise ends with nothing else.
_ZERO = 1e-4


@dataclass(frozen=True)
class Prediction:
    """What the UNet predicts."""

    #: diffusers' name: "epsilon" or "v_prediction".
    kind: str
    #: Whether the last step of the noise has no signal left: zero terminal SNR (Lin et al., 2023).
    zero_snr: bool
    #: How it is known.
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}, zero terminal SNR" if self.zero_snr else self.kind


def find(path: Path, header: Header, family: Family) -> Prediction:
    """What the checkpoint at `path` predicts.

    A key `v_pred` decides, as in ComfyUI, A1111 and Forge; then NAME.yaml beside the file, as in A1111; then
    the metadata of the modelspec standard; then, for 2.x, the weights. Zero terminal SNR counts with v alone,
    as in ComfyUI: noise cannot be predicted from latents that are nothing else.
    """
    kind, reason = _kind(path, header, family)
    zero_snr = "ztsnr" in header.tensors or _ends_at_zero(path, header)
    if zero_snr and kind != "v_prediction":
        return Prediction(kind, False, f"{reason}; its zero terminal SNR counts with v_prediction alone")
    return Prediction(kind, zero_snr, reason)


def _kind(path: Path, header: Header, family: Family) -> tuple[str, str]:
    """What is predicted, and how it is known."""
    if "v_pred" in header.tensors:
        return "v_prediction", "the file has the key v_pred"
    if (found := _in_yaml(path)) is not None:
        return found[0], f"{found[1].name} beside the file says so"
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if (kind := _NAMES.get(header.metadata.get(key, "").lower())) is not None:
            return kind, f"the file's metadata say so ({key})"
    if family is SD2 and _TELLTALE in header.tensors:
        deviation = float(_read(path, _TELLTALE).float().std(correction=0))
        kind = "v_prediction" if deviation > _V_ABOVE else "epsilon"
        return kind, "its weights look like it, by ComfyUI's rule for 2.x"
    return family.prediction, f"{family.name} does, and the file has no mark of another"


def reason_of_configs(header: Header, kind: str) -> str:
    """Why `kind` is taken, where the configs are the user's; it says so if the file's key says otherwise."""
    if "v_pred" in header.tensors and kind != "v_prediction":
        return "SMALLCAT_MODEL_CONFIG_DIR says so, although the file has the key v_pred"
    return "SMALLCAT_MODEL_CONFIG_DIR says so"


def _in_yaml(path: Path) -> tuple[str, Path] | None:
    for suffix in (".yaml", ".yml"):
        beside = path.with_suffix(suffix)
        if beside.is_file() and beside.stat().st_size <= _YAML_BYTES:
            found = _IN_YAML.search(beside.read_text("utf-8", errors="replace"))
            if found and (kind := _NAMES.get((found[1] or found[2]).lower())):
                return kind, beside
    return None


def _ends_at_zero(path: Path, header: Header) -> bool:
    """Whether the file's own noise schedule, which A1111 takes, has no signal left at its end."""
    tensor = header.tensors.get("alphas_cumprod")
    if tensor is None or len(tensor.shape) != 1 or not tensor.values:
        return False
    return float(_read(path, "alphas_cumprod")[-1]) < _ZERO


def _read(path: Path, name: str) -> Any:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
