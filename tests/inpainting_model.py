"""The bundled model made one for inpainting: its UNet takes mask and masked image, by weights of noise.

It has layers of real sizes, which the tiny models have not, and its pictures depend on mask and image.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from worker.demo.training import evaluate
from worker.model.checkpoint import inpainting_channels

#: Deviation of the weights for mask and image: pictures change by them, and stay pictures.
_DEVIATION = 0.05


def bundled_for_inpainting(folder: Path) -> Path:
    """Write the model into `folder`, which must not exist, and return it. The same bytes each time."""
    shutil.copytree(evaluate.MODEL, folder)
    path, config = folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "unet" / "config.json"
    weights, options = load_file(path), json.loads(config.read_text())
    own = weights["conv_in.weight"]
    channels = inpainting_channels(options["in_channels"])
    more = torch.randn(
        (own.shape[0], channels - own.shape[1], *own.shape[2:]), generator=torch.Generator().manual_seed(1)
    )
    weights["conv_in.weight"] = torch.cat([own, (_DEVIATION * more).to(own.dtype)], dim=1)
    save_file(weights, path, metadata={"format": "pt"})
    config.write_text(json.dumps(options | {"in_channels": channels}))
    return folder
