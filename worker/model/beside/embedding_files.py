"""The files of textual inversion: checked by their header, and read as vectors.

Three layouts are shared: one tensor under any name (AUTOMATIC1111's `emb_params`, diffusers' `<token>`), and
for SDXL two, `clip_l` and `clip_g`, which diffusers' training calls `text_encoders_0` and `_1`. The author of
a file is not trusted: all of it is bounded before it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from worker.contract.errors import InvalidJobError, SettingsError
from worker.model.beside import file_content
from worker.model.headers import Tensor, read_header

if TYPE_CHECKING:
    import torch

#: Bytes of a file, vectors, and numbers of a vector, at most. A window of CLIP has room for 75 vectors.
MAX_BYTES, MAX_VECTORS, MAX_WIDTH = 64 << 20, 75, 8_192
#: The names of two tensors, those of the first text encoder and of the second.
PAIRS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
_DTYPES = ("F64", "F32", "F16", "BF16")
#: What a file fits, by the width of its vectors for each text encoder.
_ARCHITECTURES = {(768,): "SD 1.x", (1024,): "SD 2.x", (768, 1280): "SDXL"}


def describe(path: Path) -> tuple[str, str]:
    """What an embedding fits, and why it cannot be used; empty where it can. Reads no vectors."""
    try:
        if problem := file_content.size_problem(path, MAX_BYTES):
            return "", f"{problem}: it is no embedding"
        tensors = read_header(path).tensors
        names, problem = _names(tensors)
    except (SettingsError, OSError) as error:
        return "", str(error).rstrip(".")
    if problem:
        return "", problem
    return architecture([tensors[name].shape[-1] for name in names]), ""


def architecture(widths: Sequence[int]) -> str:
    """What vectors of these widths fit, one for each text encoder."""
    named = _ARCHITECTURES.get(tuple(widths))
    return named or f"a text encoder {' and '.join(map(str, widths))} wide"


def _names(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, ...], str]:
    """The names of the tensors, one for each text encoder; and what is wrong with them."""
    names = _in_order(tensors)
    if "t5xxl" in tensors:
        return (), "it is for SD 3, which is not served: use one for the model"
    if len(names) != 1 and names not in PAIRS:
        shown = ", ".join(sorted(tensors)[:3])
        return (), f"it has {len(tensors)} tensors ({shown}), an embedding has one, or clip_l and clip_g"
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            return (), f"it is stored as {tensor.dtype}: use one in fp32, fp16 or bf16"
        count = tensor.shape[0] if len(tensor.shape) == 2 else 1
        if len(tensor.shape) not in (1, 2) or not 1 <= tensor.shape[-1] <= MAX_WIDTH:
            return (), f"its tensor has the shape {tensor.shape}, an embedding has (vectors, width)"
        if not 1 <= count <= MAX_VECTORS:
            return (), f"it has {count:,} vectors, the limit is {MAX_VECTORS}"
    if len({tensors[name].shape[:-1] for name in names}) > 1:
        return (), f"its tensors {' and '.join(names)} have different numbers of vectors"
    return names, ""


def _in_order(tensors: Iterable[str]) -> tuple[str, ...]:
    """The names of tensors in the order of the text encoders."""
    names = tuple(tensors)
    return next((pair for pair in PAIRS if set(pair) == set(names)), names)


def load(path: Path, name: str, sha256: str) -> tuple[torch.Tensor, ...]:
    """The vectors of an embedding, one tensor for each text encoder: (vectors, width) float32 on the CPU.

    Raises `InvalidJobError` for a file that cannot be used, `RenderError` where it is gone or another one.
    """
    # Here, so that who only looks at files loads no torch.
    import safetensors.torch

    what = f'The embedding "{name}"'
    content = file_content.read(path, what, sha256, most=MAX_BYTES)
    try:
        names, problem = _names(read_header(path, content.weights).tensors)
        if problem:
            raise ValueError(problem)
        tensors = safetensors.torch.load(content.weights)
        found = tuple(tensors[each].float().reshape(-1, tensors[each].shape[-1]) for each in names)
        if not all(bool(each.isfinite().all()) for each in found):
            raise ValueError("it holds NaN or infinity")
    except (SettingsError, ValueError, safetensors.SafetensorError) as error:
        raise InvalidJobError(f"{what} cannot be used: {str(error).rstrip('.')}.") from error
    return found
