"""By what a LoRA's products are multiplied: alpha, where a file has it elsewhere than beside its factors.

diffusers (0.34 and later) writes the settings of PEFT into the file's metadata: a pipeline by part of the
model, a model alone (`unet.save_lora_adapter`) without one. PEFT itself writes them into
`adapter_config.json` beside the file. No torch here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from worker.model.beside.file_content import json_object, text_beside
from worker.model.beside.lora_names import PEFT, TEXT, TEXT_2, UNET

#: Where diffusers writes them, in the file; and PEFT, beside it; bytes of that file, at most.
METADATA, CONFIG, MAX_CONFIG = "lora_adapter_metadata", "adapter_config.json", 1 << 20
#: How PEFT names the file that has its config beside it.
PEFT_STEM = "adapter_model"
#: Settings of PEFT by which a product is another one, and that are not read: they must be off.
_MUST_BE_OFF = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
#: How PEFT may have started a training. Others take something out of the model's own weights.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
#: The largest alpha; published ones are a few hundred at most.
MAX_ALPHA = 1_000_000
#: What to do about settings that cannot be read.
_REMEDY = "save the LoRA again"
_PATTERN = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True)
class Settings:
    """PEFT's settings of one part of a model."""

    alpha: float
    #: Alpha of modules that have another one, by the end of their names, or all of it after "^".
    patterns: Mapping[str, float] = field(default_factory=dict)
    #: Divided by the root of the rank (Kalajdzievski, 2023), not by the rank.
    root: bool = False
    #: Whether each module has a magnitude.
    dora: bool = False

    def scale(self, module: str, rank: int) -> float:
        """By what the product of a module is multiplied. `module`: with dots, as in the model."""
        short = module.removeprefix("text_model.")
        for pattern, alpha in self.patterns.items():
            whole = pattern.startswith("^")
            name = pattern.removeprefix("^").removeprefix("text_model.")
            if name == short or (not whole and short.endswith(f".{name}")):
                return alpha / (math.sqrt(rank) if self.root else rank)
        return self.alpha / (math.sqrt(rank) if self.root else rank)


def settings_of(
    path: PurePath, config: str | None, metadata: Mapping[str, str], names: list[str]
) -> Mapping[str, Settings]:
    """PEFT's settings by part of the model, under "" where they are of all; empty: alpha is in the file.

    `config`: the text of the config beside it, see `config_of`. `names`: those of its tensors.
    Raises `ValueError` for those that are not read.
    """
    if text := metadata.get(METADATA):
        entries = json_object(text, f"its {METADATA}", _REMEDY)
        parts: dict[str, dict[str, Any]] = {}
        for key, value in entries.items():
            part, _, name = key.rpartition(".")
            parts.setdefault(part, {})[name] = value
        return {part: _settings(found) for part, found in parts.items() if part in ("", UNET, TEXT, TEXT_2)}
    if config is not None:
        return {"": _settings(json_object(config, f"its {CONFIG}", _REMEDY))}
    is_peft = path.stem == PEFT_STEM or any(PEFT in name for name in names)
    if is_peft and not any(name.endswith(".alpha") for name in names):
        raise ValueError(
            f"it is PEFT's and lacks alpha: keep it as {PEFT_STEM}.safetensors in a folder with its {CONFIG}"
        )
    return {}


def config_name(path: PurePath) -> str:
    """What the config of a file is called that has one beside it; empty for others.

    They have nothing to do with a config that lies in their folder.
    """
    return CONFIG if path.stem == PEFT_STEM else ""


def config_of(path: Path) -> str | None:
    """The text of PEFT's config beside a file; None where there is none. Raises `ValueError`, `OSError`."""
    return text_beside(path, config_name(path), MAX_CONFIG)


def _settings(config: Mapping[str, Any]) -> Settings:
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise ValueError(f"it is PEFT's {_short(kind)}, which is not offered: LoRA and DoRA are")
    if on := next((name for name in _MUST_BE_OFF if config.get(name)), None):
        raise ValueError(f"PEFT's setting {on} is on, which is not read here: use a LoRA without it")
    if (bias := config.get("bias", "none")) != "none":
        raise ValueError(
            f"PEFT's setting bias is {_short(bias)}, which is not read here: use a LoRA without it"
        )
    if (start := config.get("init_lora_weights")) not in _STARTS:
        raise ValueError(
            f"it was trained from {_short(start)}, which changes the model's own weights too: convert it "
            "into a LoRA"
        )
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("PEFT's setting alpha_pattern is no table of names: save the LoRA again")
    if odd := next((each for each in patterns if not _PATTERN.fullmatch(each)), None):
        raise ValueError(f'PEFT\'s alpha_pattern has "{odd[:60]}", and only names of modules are read')
    return Settings(
        checked_alpha(config.get("lora_alpha", 8)),
        {name: checked_alpha(value) for name, value in patterns.items()},
        _switch(config, "use_rslora"),
        _switch(config, "use_dora"),
    )


def _short(value: object) -> str:
    return str(value)[:40]


def _switch(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name)
    if value not in (None, True, False):
        raise ValueError(
            f"PEFT's setting {name} is {value!r:.40}, true or false is needed: save the LoRA again"
        )
    return bool(value)


def checked_alpha(value: object) -> float:
    """An alpha of a file or of its settings. Raises `ValueError` for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        raise ValueError(
            f"its alpha is {value!r:.40}, a number of at most {MAX_ALPHA:,} is needed: save the LoRA again"
        )
    return float(value)
