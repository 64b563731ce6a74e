"""What a model takes of a GPU's memory, by its files' headers and its configs: no weights are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from worker.model.files import ModelFiles
from worker.model.memory_plan import Sizes

#: Working memory of a row of a UNet's step, in tensors of its first block's width and the latents' size.
#: Measured are 21 (SD 1.x, 512 px, 2 to 56 rows), 31 (768 px, 16 rows) and 27 (SDXL, 1024 px, 8 rows), from
#: the peaks in docs/performance.md, "Start and memory".
ROW_TENSORS: Final = 32
#: Working memory of a decoded pixel, in tensors of the VAE's first width and the picture's size. Measured are
#: 8.2 (SD 1.x, 8 pictures of 512 px, eager).
PIXEL_TENSORS: Final = 10
#: Tensors of queries x keys that naive attention holds: scores and their softmax.
_NAIVE_TENSORS: Final = 2
#: Side in pixels of the trial by which an SDXL VAE is brought to fp16, in fp32 (`worker.model.half_vae`).
_TRIAL_SIDE: Final = 512


def sizes_of(files: ModelFiles, width: int, *, naive: bool = False) -> Sizes | None:
    """The sizes of the model in `files`, whose numbers have `width` bytes on the GPU.

    `naive`: attention holds all its scores. None: its configs are not as they should be, which is said when
    they are loaded.
    """
    values = _values(files)
    configs = files.single.configs if files.single else files.path
    try:
        unet, vae = (_config(configs / part) for part in ("unet", "vae"))
        first = int(unet["block_out_channels"][0])
        levels = [int(each) for each in vae["block_out_channels"]]
        size = unet["sample_size"]
        height, side = (size, size) if isinstance(size, int) else size
        latents = int(height) * int(side)
        scores = _scores(unet, latents) if naive else 0
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None
    # As in the loader: it is brought to fp16 from fp32, in which it stays where that does not work.
    is_upcast = "XL" in files.pipeline_class and width == 2 and bool(vae.get("force_upcast", True))
    texts = sum(count for name, count in values.items() if name.startswith("text_encoder"))
    of_vae = values.get("vae", 0)
    trial = PIXEL_TENSORS * levels[0] * 4 * _TRIAL_SIDE**2
    return Sizes(
        texts=width * texts,
        others=width * (sum(values.values()) - texts) + (4 - width) * of_vae * is_upcast,
        row=width * (ROW_TENSORS * first * latents + scores),
        pixel=width * PIXEL_TENSORS * levels[0],
        pixels=latents * 4 ** (len(levels) - 1),
        loading=trial * is_upcast,
    )


def _values(files: ModelFiles) -> Mapping[str, int]:
    """Numbers by component."""
    if files.single is None:
        return files.values
    parts = {**files.single.checkpoint.parts, "vae": files.single.vae[1]}
    return {name: part.values for name, part in parts.items()}


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text("utf-8")))


def _scores(unet: Mapping[str, Any], latents: int) -> int:
    """Numbers that naive attention holds for a row in the UNet's first attention."""
    level = next(index for index, kind in enumerate(unet["down_block_types"]) if "CrossAttn" in kind)
    # diffusers calls the number of heads attention_head_dim.
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8)
    of_level = heads if isinstance(heads, int) else heads[level]
    tokens: int = latents // 4**level
    return _NAIVE_TENSORS * int(of_level) * tokens**2
