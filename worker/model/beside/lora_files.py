"""The files of LoRAs, read as factors for each module of a model.

Read are kohya's, diffusers', PEFT's and OneTrainer's files, LyCORIS' LoCon (convolutions, with a Tucker
decomposition too) and DoRA. All else is refused by name, and so is a file of which some part is not read:
nothing is left out in silence. The author of a file is not trusted: all of it is bounded before it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from worker.contract.errors import InvalidJobError, SettingsError
from worker.model.beside import file_content, lora_header, lora_scales
from worker.model.beside.lora_header import LoraHeader, Names
from worker.model.beside.lora_names import ANY_TEXT, TEXT, TEXT_2, UNET, Role, Targets
from worker.model.beside.lora_scales import Settings
from worker.model.headers import Shape

if TYPE_CHECKING:
    import torch

#: The UNet's first layer, by which one made for inpainting differs from others.
_FIRST = "conv_in"


@dataclass(frozen=True)
class Factors:
    """What a file adds to the weight W of one module: scale * up @ down, the product in the shape of W.

    With a magnitude the new weight is dora * V / |V|, where V = W + scale * up @ down (Liu et al., 2024). At
    a job's weight w, V is W + w * scale * up @ down and the magnitude stays, as in PEFT 0.21.
    """

    #: (rank, in) of a linear module; (rank, in, height, width) of a convolution with a kernel of that size,
    #: 1 x 1 too. A Tucker decomposition is multiplied into it, in float32. Dtype as in the file otherwise.
    down: torch.Tensor
    #: (out, rank), of convolutions too. Dtype as in the file.
    up: torch.Tensor
    #: alpha / rank; 1 where a file says no alpha. A job's weight comes on top.
    scale: float
    #: DoRA's magnitude, float32, with as many sides as W. (out, 1, ...): |V| is the norm of each output's
    #: weights, as in PEFT and today's LyCORIS; (1, in, ...): of each input's, as in OneTrainer and earlier
    #: LyCORIS. None: no DoRA.
    dora: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """1 to 256."""
        return self.up.shape[1]

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        return sum(each.nbytes for each in (self.down, self.up, self.dora) if each is not None)


@dataclass(frozen=True)
class LoraFile:
    """What a file changes, by module, as the model's own modules are named."""

    #: Of `UNet2DConditionModel`: `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`.
    unet: Mapping[str, Factors]
    #: Of each text encoder of the model; empty for one that stays as it is.
    text_encoders: tuple[Mapping[str, Factors], ...]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(each.bytes for part in (self.unet, *self.text_encoders) for each in part.values())


def describe(path: Path) -> tuple[str, str]:
    """What a LoRA fits, and why it cannot be used; empty where it can. Reads no factors.

    What it fits is empty too where nothing says it: attention without text is alike in SD 1.x and SD 2.x.
    """
    try:
        return lora_header.read(path).architecture, ""
    except (SettingsError, OSError, ValueError) as error:
        return "", str(error).rstrip(".")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a LoRA: of its file, or of that and PEFT's config where it has one beside it."""
    return file_content.sha256_of(path, _config_text)


def auto_v3(path: Path) -> str:
    """12 digits of the SHA-256 over all behind the header: the web UI's hash of a LoRA, Civitai's AutoV3.

    Empty where the file is gone. Source: AUTOMATIC1111 1.10.1, modules/hashes.py, `addnet_hash_safetensors`.
    """
    try:
        with path.open("rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except OSError:
        return ""


def _config_text(path: Path) -> str | None:
    try:
        return lora_scales.config_of(path)
    except ValueError:
        return ""  # What is wrong with it is said when the file is described.


def load(path: Path, name: str, sha256: str, targets: Targets) -> LoraFile:
    """The factors of a LoRA, on the CPU, for a model with the modules in `targets`.

    Raises `InvalidJobError` for a file that cannot be used, `RenderError` where it is gone or another one.
    """
    # Here, so that who only looks at files loads no torch.
    import safetensors.torch

    what = f'The LoRA "{name}"'
    content = file_content.read(path, what, sha256, most=lora_header.MAX_BYTES, config_of=_config_text)
    try:
        header = lora_header.read(path, content)
        return _fitted(header, safetensors.torch.load(content.weights), targets)
    except (SettingsError, ValueError, safetensors.SafetensorError) as error:
        raise InvalidJobError(f"{what} cannot be used: {str(error).rstrip('.')}.") from error


def _fitted(file: LoraHeader, tensors: Mapping[str, torch.Tensor], targets: Targets) -> LoraFile:
    """The factors by the model's own names. Raises `ValueError`."""
    found: dict[str, dict[str, Factors]] = {UNET: {}, TEXT: {}, TEXT_2: {}}
    text = _open_text(file, targets)
    for (part, module), names in file.modules.items():
        own = text if part == ANY_TEXT else part
        target = _target(file, names, targets, own, module)
        if target is None:
            raise ValueError(_misfit(file, targets, own, module))
        if target in found[own]:
            raise ValueError(f"it has {target} twice, in two spellings")
        settings = file.settings.get(own) or file.settings.get("")
        found[own][target] = _factors(target, names, tensors, targets.shapes(own)[target], settings)
    texts = tuple(found[part] for part in (TEXT, TEXT_2)[: len(targets.text_encoders)])
    return LoraFile(found[UNET], texts)


def _target(file: LoraHeader, names: Names, targets: Targets, part: str, module: str) -> str | None:
    """The model's module that a module of the file is for; None where it has none that fits."""
    name = targets.by_spelling.get(part, {}).get(module)
    if name is None:
        return None
    weight, shapes = targets.shapes(part)[name], file.shapes(names)
    kernel = (shapes.get(Role.MID) or shapes[Role.DOWN])[2:]
    # A convolution of one pixel is a linear module, and tools store one as the other.
    fits = (kernel or (1, 1)) == (weight[2:] or (1, 1))
    return name if fits and (shapes[Role.UP][0], shapes[Role.DOWN][1]) == weight[:2] else None


def _open_text(file: LoraHeader, targets: Targets) -> str:
    """Which text encoder the modules are of whose names do not say it: the one that all of them fit."""
    open_modules = [(module, names) for (part, module), names in file.modules.items() if part == ANY_TEXT]
    fitting = [
        part
        for part in (TEXT, TEXT_2)[: len(targets.text_encoders)]
        if all(_target(file, names, targets, part, module) for module, names in open_modules)
    ]
    if open_modules and len(fitting) > 1:
        raise ValueError(
            "it does not say which text encoder it is for, and fits both: save it with diffusers"
        )
    return fitting[0] if fitting else TEXT


def _misfit(file: LoraHeader, targets: Targets, part: str, module: str) -> str:
    """Why a module of a file has no place in the model."""
    widths = (shape[1] for name, shape in targets.unet.items() if name.endswith("attn2.to_k"))
    own = next(map(lora_header.architecture, widths), "")
    if own and file.architecture not in ("", own):
        return f"it is for {file.architecture}, this model is {own}: use one that fits"
    target = targets.by_spelling.get(part, {}).get(module)
    if target is None:
        return f"it changes {module}, which this model has not: use one that was made for this model"
    shapes = file.shapes(next(names for (_, each), names in file.modules.items() if each == module))
    takes, gets = shapes[Role.DOWN][1], targets.shapes(part)[target][1]
    if target == _FIRST and takes != gets:
        return (
            f"it changes {module}, where it takes {takes} channels and this model {gets} (a model made for "
            "inpainting takes the mask and the masked image, too): use one that leaves this layer as it is"
        )
    return (
        f"its factors at {module} have the shapes {shapes[Role.UP]} and {shapes[Role.DOWN]}, the weight has "
        f"{targets.shapes(part)[target]}: use one that was made for this model"
    )


def _factors(
    module: str,
    names: Names,
    tensors: Mapping[str, torch.Tensor],
    weight: Shape,
    settings: Settings | None,
) -> Factors:
    import torch

    found = {role: tensors[name] for role, name in names.items()}
    for role, tensor in found.items():
        if not _is_finite(tensor):
            raise ValueError(f"it holds NaN or infinity, in {names[role]}: download it again")
    down, up = found[Role.DOWN], found[Role.UP].flatten(1)
    if (alpha := found.get(Role.ALPHA)) is not None:
        scale = lora_scales.checked_alpha(alpha.item()) / down.shape[0]
    else:
        scale = settings.scale(module, down.shape[0]) if settings is not None else 1.0
    if (mid := found.get(Role.MID)) is not None:
        # LyCORIS' rebuild_tucker, without its last product.
        down = torch.einsum("ijkl,jr->irkl", mid.float(), down.float().flatten(1))
    magnitude = found.get(Role.MAGNITUDE)
    dora = None if magnitude is None else _magnitude(names[Role.MAGNITUDE], magnitude.float(), weight)
    return Factors(down.reshape(down.shape[0], *weight[1:]), up, scale, dora)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite: by the bits, 20 times as fast as `isfinite` for fp16 on a CPU."""
    import torch

    least = {
        torch.float64: 0x7FF0_0000_0000_0000,
        torch.float32: 0x7F80_0000,
        torch.float16: 0x7C00,
        torch.bfloat16: 0x7F80,
        torch.float8_e5m2: 0x7C,
        torch.float8_e4m3fn: 0x7F,
    }.get(tensor.dtype)
    if least is None:
        return True
    size = tensor.element_size()
    signed = tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).numpy()
    # The greatest of those above zero, and of those below, whose sign is the first bit.
    return bool(signed.max() < least) and int(signed.view(f"u{size}").max()) < least + (1 << 8 * size - 1)


def _magnitude(name: str, magnitude: torch.Tensor, weight: Shape) -> torch.Tensor:
    """A magnitude with as many sides as the weight. Raises `ValueError`."""
    shape, ones = tuple(magnitude.shape), (1,) * (len(weight) - 2)
    # PEFT's are of outputs, also where a convolution has them as (1, out, 1, 1).
    is_peft = not name.endswith(".dora_scale")
    if magnitude.numel() == weight[0] and (is_peft or shape[:1] == weight[:1]):
        return magnitude.reshape(weight[0], 1, *ones)
    if not is_peft and shape[:1] == (1,) and magnitude.numel() == weight[1]:
        return magnitude.reshape(1, weight[1], *ones)
    raise ValueError(f"its magnitude {name} has the shape {shape}, the weight has {weight}")
