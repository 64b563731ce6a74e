"""Tiny models as single files, read with tiny configs in the place of those that smallcat ships."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file

from tests import original_layout, tiny_models
from worker.contract.settings import WorkerSettings
from worker.model import loader

Tensors = dict[str, torch.Tensor]

FAMILIES: dict[str, Callable[..., Path]] = {
    "sd1": tiny_models.tiny_sd1,
    "sd2": tiny_models.tiny_sd2,
    "sdxl": tiny_models.tiny_sdxl,
}


@dataclass(frozen=True)
class Tiny:
    """One family's tiny model: its folder and its tensors in the original layout."""

    family: str
    folder: Path
    tensors: Tensors

    def write(self, path: Path, tensors: Tensors | None = None, **metadata: str) -> Path:
        """The model, or `tensors`, as the single file `path`."""
        save_file(self.tensors if tensors is None else tensors, path, metadata=metadata)
        return path


def make(family: str, root: Path) -> Tiny:
    """The family's tiny model; its configs become `root`/configs/`family`, and a vocabulary lies there."""
    folder = FAMILIES[family](root / family)
    if family == "sd2":  # As in the real one.
        tiny_models.tokenizer(16, pad_token="!").save_pretrained(folder / "tokenizer")
    configs = Path(shutil.copytree(folder, root / "configs" / family))
    for path in [*configs.rglob("*.safetensors"), *configs.rglob("tokenizer*/*")]:
        path.unlink()
    tiny_models.tokenizer(77).save_pretrained(root / "configs" / "clip")
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    return Tiny(family, folder, original_layout.checkpoint(kind.from_pretrained(folder, safety_checker=None)))


def load(model: Path | str, **settings: Any) -> loader.Loaded:
    """The model on the CPU, in fp32 unless the settings say otherwise."""
    return loader.load(WorkerSettings(model=str(model), **settings))


def picture(pipeline: Any) -> np.ndarray:
    """Two steps of a prompt, as diffusers draws them: (64, 64, 3), 0 to 1."""
    result = pipeline(
        "a cat on a mat",
        negative_prompt="a dog",
        num_inference_steps=2,
        height=64,
        width=64,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="np",
    )
    drawn: np.ndarray = result.images[0]
    return drawn


def note(loaded: loader.Loaded, what: str) -> tuple[str, str]:
    """The choice `what` that was made at the start, and why."""
    return next((each.choice, each.reason) for each in loaded.choices if each.what == what)
