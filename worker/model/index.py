"""What a diffusers folder says it holds, by its model_index.json and the names of its files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from worker.contract.errors import SettingsError

#: The diffusers pipelines that are served.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline")
#: Where a component's class may come from; anything else is code in the model's own repository.
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
#: The file that says what a folder's components are.
INDEX = "model_index.json"
#: Endings of pickled weights.
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
#: Components that every pipeline that is served needs, and those that SDXL needs besides.
_NEEDED = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
_NEEDED_XL = ("text_encoder_2", "tokenizer_2")
#: Components without weights.
_NO_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")
#: Weights that diffusers and transformers load by themselves: whole or in shards, plain or of a variant.
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(\.fp16)?(-\d{5}-of-\d{5})?\.safetensors")
#: Why pickled weights are refused.
PICKLE_REASON = (
    "pickled weights can run any code while they load, and are refused: convert them to safetensors, or take "
    "the model's safetensors version"
)


def read_index(folder: Path, source: str) -> dict[str, Any]:
    """`folder`'s model_index.json. Raises `SettingsError` unless it is of a pipeline that is served."""
    path = folder / INDEX
    if not path.is_file():
        raise SettingsError(
            f"The model {source} has no {INDEX}: use a folder that diffusers saved a pipeline to."
        )
    try:
        index: dict[str, Any] = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise SettingsError(f"The {INDEX} of {source} is no JSON object ({error}): get it again.") from None
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise SettingsError(
            f"The model {source} is a {kind}, which is not served: use a {' or '.join(PIPELINES)}."
        )
    for component, (library, _) in components(index).items():
        if library not in LIBRARIES:
            raise SettingsError(
                f"The {component} of {source} comes from {library}, which is code of the model's own and is "
                f"not run: use a model whose components come from {', '.join(LIBRARIES)}."
            )
    return index


def components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Component to (library, class), without those that the model does not have."""
    return {
        name: (entry[0], entry[1])
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
    }


def weights_of(index: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[str]]:
    """Component to the names of its weights' files, plain and of variants, for all that have weights."""
    found: dict[str, list[str]] = {name: [] for name in components(index) if name not in _NO_WEIGHTS}
    for name in names:
        folder, _, file = name.partition("/")
        if folder in found and _WEIGHTS.fullmatch(file):
            found[folder].append(name)
    return found


def refuse_incomplete(index: Mapping[str, Any], names: Iterable[str], source: str) -> None:
    """Raise `SettingsError` unless each component that the pipeline needs is there, weights apart."""
    names = set(names)
    present = components(index)
    needed = _NEEDED + (_NEEDED_XL if "XL" in index["_class_name"] else ())
    for component in sorted({*needed, *present}):
        if component not in present or not any(name.startswith(f"{component}/") for name in names):
            raise SettingsError(f"The model {source} has no {component}: get its files again.")
        vocabularies = {f"{component}/tokenizer.json", f"{component}/vocab.json"}
        # Without one, the tokenizer would load empty and every prompt would mean the same.
        if component.startswith("tokenizer") and not vocabularies & names:
            raise SettingsError(f"The {component} of {source} has no vocabulary: get its files again.")


def loaded(index: Mapping[str, Any], names: Iterable[str], variant: str | None) -> dict[str, list[str]]:
    """Component to its weights' files of `variant`, or to its plain ones where it has no others."""
    chosen = {}
    for component, files in weights_of(index, names).items():
        half = [file for file in files if ".fp16" in file]
        plain = [file for file in files if ".fp16" not in file]
        chosen[component] = half if variant and half else plain
    return chosen


def choose_variant(
    index: Mapping[str, Any], names: Iterable[str], source: str, *, half: bool
) -> tuple[str | None, str]:
    """The variant of the weights to load, "fp16" or None, and why.

    Raises `SettingsError` when a component has no safetensors at all.
    """
    names = list(names)
    weights = weights_of(index, names)
    for component, files in weights.items():
        if files:
            continue
        if any(name.startswith(f"{component}/") and name.endswith(PICKLED) for name in names):
            raise SettingsError(f"The {component} of {source} has no .safetensors: {PICKLE_REASON}.")
        raise SettingsError(f"The model {source} has no weights for its {component}: get its files again.")
    has_half = all(any(".fp16" in file for file in files) for files in weights.values())
    has_plain = all(any(".fp16" not in file for file in files) for files in weights.values())
    if has_half and half:
        return "fp16", "its fp16 files"
    if has_plain:
        return None, "its plain files"
    return "fp16", "its fp16 files, since it has no others for all of it"


def wanted(index: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The names that matter to the picture, sorted: configs, tokenizers and weights of all components."""
    names = list(names)
    weights = {file for files in weights_of(index, names).values() for file in files}
    present = components(index)
    texts = {
        name
        for name in names
        if name.count("/") == 1
        and name.partition("/")[0] in present
        and name.endswith((".json", ".txt", ".model"))
    }
    return sorted(weights | texts | {INDEX})
