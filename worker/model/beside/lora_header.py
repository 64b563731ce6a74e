"""What a LoRA's header says: its modules and their factors, what it fits, and what is wrong with it.

Nothing of the factors is read, and no torch is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from worker.model.beside import lora_scales
from worker.model.beside.file_content import Content, size_problem
from worker.model.beside.lora_kinds import refusal
from worker.model.beside.lora_names import TEXT, TEXT_2, UNET, Role, parse
from worker.model.beside.lora_scales import Settings
from worker.model.headers import Header, Shape, Tensor, read_header

#: Bytes of a file, and its rank, at most. SDXL with all its convolutions at rank 256 has 3.2 GB in fp16.
MAX_BYTES, MAX_RANK = 4 << 30, 256
_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_ALPHA_DTYPES = (*_DTYPES, "I64", "I32", "I16", "I8", "U8")
#: What a file fits, by how wide the text is that its UNet takes.
_BY_TEXT = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 1280: "SDXL's refiner"}
#: The same by what trainers write into the metadata, where shapes do not say it.
_BY_METADATA = (
    (re.compile(r"sdxl|stable-diffusion-xl"), "SDXL"),
    (re.compile(r"^sd_?v?2|stable-diffusion-v2"), "SD 2.x"),
    (re.compile(r"^sd_?v?1|stable-diffusion-v1"), "SD 1.x"),
)
_CROSS = re.compile(r"attn2_to_[kv]$")
_DEEP = re.compile(r"transformer_blocks_[2-9]_|^add_embedding_|^label_emb_")

#: A module of a part, as a file spells it; and the names of its tensors.
Module = tuple[str, str]
Names = Mapping[Role, str]


@dataclass(frozen=True)
class LoraHeader:
    """A LoRA of which all is read."""

    header: Header
    #: The names of the tensors of each module.
    modules: Mapping[Module, Names]
    #: PEFT's settings, see `lora_scales.settings_of`.
    settings: Mapping[str, Settings]

    def shapes(self, names: Names) -> dict[Role, Shape]:
        """The shapes of a module's tensors."""
        return {role: self.header.tensors[name].shape for role, name in names.items()}

    @cached_property
    def architecture(self) -> str:
        """What it fits, by its shapes, and where these do not say it by its metadata; empty: not known."""
        widths: dict[str, int] = {}
        for (part, module), names in self.modules.items():
            width = self.header.tensors[names[Role.DOWN]].shape[1]
            if part == UNET and _CROSS.search(module):
                return architecture(width)
            if part != UNET and module.endswith(("_proj", "_fc1")):
                widths[part] = width
        if any(part == UNET and _DEEP.search(module) for part, module in self.modules):
            return "SDXL"
        if TEXT_2 in widths or any(name.startswith("lora_te1") for name in self.header.tensors):
            return "SDXL"
        if widths.get(TEXT) == 1024:
            return "SD 2.x"
        if any(name.startswith("lora_te_") for name in self.header.tensors) and widths.get(TEXT) == 768:
            return "SD 1.x"
        for key in ("ss_base_model_version", "modelspec.architecture"):
            value = str(self.header.metadata.get(key, ""))
            for said, fits in _BY_METADATA:
                if said.search(value):
                    return fits
        return ""


def architecture(width: int) -> str:
    """What fits a UNet that takes text of this width."""
    return _BY_TEXT.get(width) or f"a UNet that takes text {width} wide"


def architecture_of(width: object) -> str:
    """The same of a model, by its UNet's `cross_attention_dim`; empty where its blocks differ in it."""
    widths = set(width) if isinstance(width, list | tuple) else {width}
    (only, *others) = widths or {None}
    return architecture(only) if isinstance(only, int) and not others else ""


def read(path: Path, content: Content | None = None) -> LoraHeader:
    """What a file holds. `content`: what was read of it; None: its header and its config are read now.

    Raises `ValueError`, `SettingsError` where it cannot be used, `OSError`.
    """
    if content is None and (problem := size_problem(path, MAX_BYTES)):
        raise ValueError(problem)
    header = read_header(path, content.weights if content is not None else None)
    if problem := refusal(header.tensors):
        raise ValueError(problem)
    modules = _modules(header.tensors)
    for (_, module), names in modules.items():
        _check_shapes(module, {role: header.tensors[name] for role, name in names.items()})
    config = content.config if content is not None else lora_scales.config_of(path)
    settings = lora_scales.settings_of(path, config, header.metadata, list(header.tensors))
    for (part, module), names in modules.items():
        found = settings.get(part) or settings.get("")
        if found is not None and found.dora and Role.MAGNITUDE not in names:
            raise ValueError(f"PEFT's setting use_dora is on, and {module} has no magnitude: save it again")
    return LoraHeader(header, modules, settings)


def _modules(tensors: Mapping[str, Tensor]) -> Mapping[Module, Names]:
    """The names of each module's tensors."""
    found: dict[Module, dict[Role, str]] = {}
    unread = []
    for key in tensors:
        if (name := parse(key)) is None:
            unread.append(key[:100])
            continue
        roles = found.setdefault((name.part, name.module), {})
        if name.role in roles:
            raise ValueError(f"it has {roles[name.role]} and {key}, which are for the same module")
        roles[name.role] = key
    if unread or not found:
        more = f" and {len(unread) - 3:,} more" if len(unread) > 3 else ""
        shown = ", ".join(unread[:3]) or "no tensors"
        raise ValueError(
            f"it has {shown}{more}, which is not read here: use a LoRA for SD 1.x, SD 2.x or SDXL"
        )
    for (_, module), roles in found.items():
        for role, other in ((Role.DOWN, "first"), (Role.UP, "second")):
            if role not in roles:
                raise ValueError(f"the {other} factor of {module} is missing: download it again")
    return found


def _check_shapes(module: str, tensors: Mapping[Role, Tensor]) -> None:
    """Raise `ValueError` where the factors of a module cannot be multiplied, or are too many."""
    for role, tensor in tensors.items():
        if min(tensor.shape, default=1) < 1:
            raise ValueError(f"it has no numbers at {module}: download it again")
        if tensor.dtype not in (_ALPHA_DTYPES if role is Role.ALPHA else _DTYPES):
            raise ValueError(f"{module} is stored as {tensor.dtype}: use a LoRA in fp32, fp16 or bf16")
    down, up, mid = tensors[Role.DOWN].shape, tensors[Role.UP].shape, tensors.get(Role.MID)
    rank = down[0] if down else 0
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"its rank at {module} is {rank:,}, the limit is 1 to {MAX_RANK}")
    inner = up[1] if len(up) > 1 else 0
    fits = len(down) in (2, 4) and len(up) in (2, 4) and math.prod(up[2:]) == 1
    if mid is None:
        fits = fits and inner == rank
    else:
        fits = fits and len(mid.shape) == 4 and mid.shape[:2] == (inner, rank) and math.prod(down[2:]) == 1
        if not 1 <= inner <= MAX_RANK:
            raise ValueError(f"its rank at {module} is {inner:,}, the limit is 1 to {MAX_RANK}")
    if not fits:
        raise ValueError(
            f"its factors at {module} have the shapes {up} and {down}, which do not fit each other"
        )
    if (alpha := tensors.get(Role.ALPHA)) is not None and alpha.values != 1:
        raise ValueError(f"its alpha at {module} has {alpha.values:,} numbers, one is needed")
