"""What the names of a LoRA's tensors mean, and which modules of a model they may change. No torch here.

Tools spell a module of the UNet in two ways, as diffusers does and as Stable Diffusion's first release does,
and join its parts by dots or by underscores. A model's own modules are spelled in each way, and a name in a
file is looked up among them: nothing is guessed. Sources: kohya-ss/sd-scripts (networks/lora.py), LyCORIS,
OneTrainer (modules/util/convert/lora), diffusers (loaders/lora_conversion_utils.py), PEFT, ComfyUI.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from worker.model.headers import Shape

if TYPE_CHECKING:
    from torch import nn

#: The parts of a model that have modules, as diffusers calls them.
UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
#: A text encoder where the name does not say which.
ANY_TEXT = "text"


class Role(Enum):
    """What a tensor is to its module."""

    #: From the module's input to the rank.
    DOWN = auto()
    #: From the rank to the module's output.
    UP = auto()
    #: Between the two: LoCon with a Tucker decomposition.
    MID = auto()
    #: A number: the product is multiplied by alpha / rank.
    ALPHA = auto()
    #: DoRA's magnitude.
    MAGNITUDE = auto()


class Name(NamedTuple):
    """What a tensor's name says."""

    #: `UNET`, `TEXT`, `TEXT_2` or `ANY_TEXT`.
    part: str
    #: The module as the file spells it, joined by underscores, without what says nothing.
    module: str
    role: Role


#: How names begin, by the part of the model. The longer one first where one begins with the other.
_PREFIXES = {
    "lora_unet": UNET,
    "lora_te1": TEXT,
    "lora_te2": TEXT_2,
    "lora_te": TEXT,
    "text_encoders.clip_l.transformer": TEXT,
    "text_encoders.clip_g.transformer": TEXT_2,
    "text_encoder_2": TEXT_2,
    "text_encoder": TEXT,
    "clip_l": TEXT,
    "clip_g": TEXT_2,
    "diffusion_model": UNET,
    "unet": UNET,
}
_PREFIX = re.compile(f"({'|'.join(map(re.escape, _PREFIXES))})[._]")
#: What PEFT writes before a module's name, and LyCORIS where it wraps one model, whichever it is.
PEFT, _LYCORIS = "base_model.model.", "lycoris_"
#: How modules begin whose part is not said.
_OF_UNET = re.compile(
    r"(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks|conv_in|conv_out|time_embed|"
    r"time_embedding|add_embedding|label_emb|out_2)(_|$)"
)
_OF_TEXT = re.compile(r"(text_model_)?(encoder_layers_|text_projection$)")
#: How names end: kohya's, PEFT's, and those of diffusers' earlier versions.
_ROLES = {
    ".lora_down.weight": Role.DOWN,
    ".lora_up.weight": Role.UP,
    ".lora_mid.weight": Role.MID,
    ".alpha": Role.ALPHA,
    ".dora_scale": Role.MAGNITUDE,
    ".lora_A.weight": Role.DOWN,
    ".lora_B.weight": Role.UP,
    ".lora_magnitude_vector": Role.MAGNITUDE,
    ".lora_magnitude_vector.weight": Role.MAGNITUDE,
    ".lora_A.default.weight": Role.DOWN,
    ".lora_B.default.weight": Role.UP,
    ".lora_magnitude_vector.default.weight": Role.MAGNITUDE,
    ".lora.down.weight": Role.DOWN,
    ".lora.up.weight": Role.UP,
    ".lora_linear_layer.down.weight": Role.DOWN,
    ".lora_linear_layer.up.weight": Role.UP,
    "_lora.down.weight": Role.DOWN,
    "_lora.up.weight": Role.UP,
}
_ROLE = re.compile(f"({'|'.join(map(re.escape, _ROLES))})$")
#: diffusers' attention processors knew four products by names of their own: in the UNet, and in CLIP.
_OLD_UNET = MappingProxyType({"to_out": "to_out_0"})
_OLD_TEXT = MappingProxyType({"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"})


def parse(key: str) -> Name | None:
    """What the name of a tensor says; None for one that is not read."""
    if (end := _ROLE.search(key)) is None:
        return None
    rest, part = key[: end.start()].removeprefix(PEFT).removeprefix(_LYCORIS), ""
    if (start := _PREFIX.match(rest)) is not None:
        part, rest = _PREFIXES[start[1]], rest[start.end() :].removeprefix(PEFT)
    module = rest.replace(".", "_").replace("_processor_", "_")
    if not part:
        part = UNET if _OF_UNET.match(module) else ANY_TEXT if _OF_TEXT.match(module) else ""
    if not part or not module:
        return None
    if end[1].startswith("_lora."):
        for old, today in (_OLD_UNET if part == UNET else _OLD_TEXT).items():
            if module.endswith(f"_{old}"):
                module = module.removesuffix(old) + today
    return Name(part, module if part == UNET else module.removeprefix("text_model_"), _ROLES[end[1]])


@dataclass(frozen=True)
class Targets:
    """The modules of a model that a LoRA may change: name and shape of the weight, by part."""

    #: As diffusers names them: `down_blocks.0.attentions.0.proj_in`.
    unet: Mapping[str, Shape]
    #: As the installed transformers does, of each text encoder: `text_model.encoder.layers.0.mlp.fc1`.
    text_encoders: tuple[Mapping[str, Shape], ...]

    @classmethod
    def of(cls, unet: nn.Module, text_encoders: Iterable[nn.Module]) -> Targets:
        """Those of models as diffusers builds them, on whatever device."""
        return cls(_weights(unet), tuple(_weights(each) for each in text_encoders))

    @cached_property
    def by_spelling(self) -> Mapping[str, Mapping[str, str]]:
        """By part, the name of each module by each spelling that `parse` gives."""
        texts = ({_short(name): name for name in each} for each in self.text_encoders)
        return {
            UNET: {spelling: name for name in self.unet for spelling in _spellings(name, self.unet)},
            **dict(zip((TEXT, TEXT_2), texts, strict=False)),
        }

    def shapes(self, part: str) -> Mapping[str, Shape]:
        """The shape of each module's weight in a part."""
        if part == UNET:
            return self.unet
        index = (TEXT, TEXT_2).index(part)
        return self.text_encoders[index] if index < len(self.text_encoders) else {}


def _weights(model: nn.Module) -> dict[str, Shape]:
    from torch import nn

    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def _short(name: str) -> str:
    return name.replace(".", "_").removeprefix("text_model_")


def _spellings(name: str, unet: Mapping[str, Shape]) -> Iterator[str]:
    """How files spell a module of the UNet."""
    yield name.replace(".", "_")
    for each in _original(name, unet):
        yield each.replace(".", "_")


#: Modules outside of blocks, and those of a residual block, in Stable Diffusion's first release.
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESIDUAL = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def _original(name: str, unet: Mapping[str, Shape]) -> Iterator[str]:
    """Names of a module in the layout of Stable Diffusion's first release."""
    if name in _OUTSIDE:
        yield _OUTSIDE[name]
    elif (found := _MIDDLE.fullmatch(name)) is not None:
        kind, index, rest = found[1], int(found[2]), found[3]
        number = 2 * index + (kind == "attentions")
        yield f"middle_block.{number}.{_RESIDUAL.get(rest, rest) if kind == 'resnets' else rest}"
    elif (found := _BLOCK.fullmatch(name)) is not None:
        side, block, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        layers = sum(f"down_blocks.0.resnets.{layer}.conv1" in unet for layer in range(32))
        number = block * (layers + 1) + index + (side == "down")
        blocks = "input_blocks" if side == "down" else "output_blocks"
        if kind == "resnets":
            yield f"{blocks}.{number}.0.{_RESIDUAL.get(rest, rest)}"
        elif kind == "attentions":
            yield f"{blocks}.{number}.1.{rest}"
        elif kind == "downsamplers":
            yield f"{blocks}.{(block + 1) * (layers + 1)}.0.op"
        else:
            # Third in a block with attention and second in another; OneTrainer says third of both.
            attends = any(each.startswith(f"up_blocks.{block}.attentions.") for each in unet)
            for place in (2,) if attends else (1, 2):
                yield f"{blocks}.{number + layers}.{place}.{rest}"
