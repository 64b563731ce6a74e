"""The components of a diffusers folder, by its model_index.json and the names of its files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from worker.contract.errors import SettingsError

#: The diffusers pipelines that are served, each with the one that it is loaded as. Those for inpainting have
#: the components of those for text to image, and a UNet that takes more channels.
PIPELINES = {
    "StableDiffusionPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLPipeline",
    "LatentConsistencyModelPipeline": "LatentConsistencyModelPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
}
#: Libraries that a component's class may come from; any other is code in the model's own repository.
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
#: The file that lists a folder's components.
INDEX = "model_index.json"
#: Suffixes of pickled weights.
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
#: Components that every served pipeline needs, and those that SDXL needs in addition.
_NEEDED = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
_NEEDED_XL = ("text_encoder_2", "tokenizer_2")
#: Components without weights.
_NO_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")
#: Names of weights that diffusers and transformers load: in one file or in shards, plain or fp16.
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(\.fp16)?(-\d{5}-of-\d{5})?\.safetensors")
#: Why pickled weights are refused.
PICKLE_REASON = (
    "pickled weights can run any code while they load, and are refused: convert them to safetensors, or use "
    "the model's safetensors version"
)


def read_index(folder: Path, source: str) -> dict[str, Any]:
    """The model_index.json of `folder`. Raises `SettingsError` unless it is of a served pipeline."""
    path = folder / INDEX
    if not path.is_file():
        raise SettingsError(f"The model {source} has no {INDEX}: use a folder in the format of diffusers.")
    try:
        index: dict[str, Any] = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise SettingsError(
            f"The {INDEX} of {source} is not a JSON object ({error}): download it again."
        ) from None
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        raise SettingsError(
            f"The model {source} is a {kind}, which is not served: use a {' or '.join(PIPELINES)}."
        )
    for component, (library, _) in components(index).items():
        if library not in LIBRARIES:
            raise SettingsError(
                f"The {component} of {source} comes from {library}, which is custom code and is not run: use "
                f"a model whose components come from {', '.join(LIBRARIES)}."
            )
    return index


def components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """(library, class) by component, without components that the model does not have."""
    return {
        name: (entry[0], entry[1])
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
    }


def weights_of(index: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[str]]:
    """Names of weight files by component, plain and of variants, for all components that have weights."""
    found: dict[str, list[str]] = {name: [] for name in components(index) if name not in _NO_WEIGHTS}
    for name in names:
        folder, _, file = name.partition("/")
        if folder in found and _WEIGHTS.fullmatch(file):
            found[folder].append(name)
    return found


def refuse_incomplete(index: Mapping[str, Any], names: Iterable[str], source: str) -> None:
    """Raise `SettingsError` unless each component that the pipeline needs has files. Ignores weights."""
    names = set(names)
    present = components(index)
    needed = _NEEDED + (_NEEDED_XL if "XL" in index["_class_name"] else ())
    for component in sorted({*needed, *present}):
        if component not in present or not any(name.startswith(f"{component}/") for name in names):
            raise SettingsError(f"The model {source} has no {component}: download its files again.")
        vocabularies = {f"{component}/tokenizer.json", f"{component}/vocab.json"}
        # Without a vocabulary the tokenizer loads empty, and every prompt means the same.
        if component.startswith("tokenizer") and not vocabularies & names:
            raise SettingsError(f"The {component} of {source} has no vocabulary: download its files again.")


def refuse_quantised(index: Mapping[str, Any], folder: Path, source: str) -> None:
    """Raise `SettingsError` if a component's config says that its weights are quantised."""
    for component in components(index):
        path = folder / component / "config.json"
        try:
            config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        except ValueError:
            continue  # What is wrong with it is said when it is loaded.
        if isinstance(config, dict) and isinstance(found := config.get("quantization_config"), dict):
            how = found.get("quant_method", "in an unknown way")
            raise SettingsError(
                f"The {component} of {source} is quantised ({how}), which is not read: use the model in "
                "fp16, bf16 or plain fp8."
            )


def weights_to_load(
    index: Mapping[str, Any], names: Iterable[str], variant: str | None
) -> dict[str, list[str]]:
    """Names of the weight files to load, by component: those of `variant`, or plain ones if it has none."""
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

    Raises `SettingsError` if a component has no safetensors.
    """
    names = list(names)
    weights = weights_of(index, names)
    for component, files in weights.items():
        if files:
            continue
        if any(name.startswith(f"{component}/") and name.endswith(PICKLED) for name in names):
            raise SettingsError(f"The {component} of {source} has no .safetensors file: {PICKLE_REASON}.")
        raise SettingsError(
            f"The model {source} has no weights for its {component}: download its files again."
        )
    has_half = all(any(".fp16" in file for file in files) for files in weights.values())
    has_plain = all(any(".fp16" not in file for file in files) for files in weights.values())
    if has_half and half:
        return "fp16", "the fp16 files"
    if has_plain:
        return None, "the plain files"
    return "fp16", "the fp16 files, because some components have no others"


def relevant_files(index: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The names of the files that determine a picture, sorted: configs, tokenizers and weights."""
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
