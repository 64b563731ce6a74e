"""The files behind `SMALLCAT_MODEL`: a hub id, a folder or one .safetensors file. No torch here.

They are found or fetched, checked before anything of them is loaded (safetensors alone, no code, a pipeline
that is served), and hashed into a revision, so that other files never answer for the same job.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors

from worker.errors import SettingsError
from worker.settings import WorkerSettings

#: The diffusers pipelines that are served.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline")
#: Where a component's class may come from; anything else is code in the model's own repository.
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
#: The file that says what a folder's components are.
INDEX = "model_index.json"
#: Beside it: what the model's maker recommends, `{"steps": 8, "guidance_scale": 2.0}`.
RECOMMENDED = "smallcat.json"
#: Endings of pickled weights.
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
#: Components without weights.
_NO_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")
#: Weights that diffusers and transformers load by themselves: whole or in shards, plain or of a variant.
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(\.fp16)?(-\d{5}-of-\d{5})?\.safetensors")
_CHECKER = "safety_checker"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLE_REASON = (
    "pickled weights can run any code while they load, and are refused: convert them to safetensors, or take "
    "the model's safetensors version"
)


@dataclass(frozen=True)
class ModelFiles:
    """A model's files on this machine, checked."""

    #: The folder with model_index.json, or the single file.
    path: Path
    #: `path` is one .safetensors file.
    single_file: bool
    #: What `SMALLCAT_MODEL` said, for people.
    source: str
    #: The model's name unless the settings give it another.
    name: str
    #: The hub's commit, or 16 hexadecimal digits over the files.
    revision: str
    #: One of `PIPELINES`.
    pipeline_class: str
    #: Variant of the weights' files, "fp16" or None.
    variant: str | None
    #: Why these weights.
    reason: str
    #: The model ships a safety checker, used or not.
    ships_checker: bool


def find(settings: WorkerSettings, *, half: bool) -> ModelFiles:
    """The files of the model that the settings name, fetched from the hub where need be.

    `half`: prefer fp16 weights. Raises `SettingsError` for whatever is missing, out of reach or not served.
    """
    path = Path(settings.model).expanduser() if settings.model else _bundled()
    source = settings.model or "bundled with smallcat"
    if path.suffix.lower() in PICKLED:
        raise SettingsError(f"SMALLCAT_MODEL is {source}: {_PICKLE_REASON}.")
    is_here = path.exists()
    if is_here and settings.model_revision:
        raise SettingsError(
            f"SMALLCAT_MODEL_REVISION is {settings.model_revision}, but SMALLCAT_MODEL is {source}, which is "
            "no hub id: leave the revision out."
        )
    if settings.model_config_dir and not path.is_file():
        raise SettingsError(
            f"SMALLCAT_MODEL_CONFIG_DIR is set, but SMALLCAT_MODEL is {source}, which is no single file: "
            "leave the folder of configs out."
        )
    if path.is_file():
        return _single_file(path, source, settings)
    if is_here:
        name = path.resolve().name if settings.model else "smallcat-demo"
        return _folder(path, source, name, None, half=half, checked=settings.safety_checker)
    if not _HUB_ID.fullmatch(source) or source.startswith("."):
        raise SettingsError(
            f"SMALLCAT_MODEL is {source}, where there is nothing: use a hub id (owner/name), a folder with "
            f"{INDEX}, or a .safetensors file."
        )
    folder = _from_hub(source, settings.model_revision, half=half, checked=settings.safety_checker)
    return _folder(folder, source, source, folder.name, half=half, checked=settings.safety_checker)


def _bundled() -> Path:
    """The folder of the model that comes with smallcat."""
    demo = Path(__file__).parent / "demo"
    for folder in (demo, demo / "model"):
        if (folder / INDEX).is_file():
            return folder
    raise SettingsError(
        "No model is bundled with this installation: set SMALLCAT_MODEL to a hub id, a folder or a "
        ".safetensors file."
    )


# --- a folder -----------------------------------------------------------------------------------------------


def _folder(
    path: Path, source: str, name: str, revision: str | None, *, half: bool, checked: bool
) -> ModelFiles:
    index = read_index(path, source)
    ships_checker = _CHECKER in _components(index)
    if not checked:
        index.pop(_CHECKER, None)
    names = _names(path)
    variant, reason = choose_variant(index, names, source, half=half)
    files = {name: path / name for name in wanted(index, names)}
    for file in files.values():
        if file.suffix == ".safetensors":
            read_header(file)
    return ModelFiles(
        path=path,
        single_file=False,
        source=source,
        name=name,
        revision=revision or digest(files),
        pipeline_class=index["_class_name"],
        variant=variant,
        reason=reason,
        ships_checker=ships_checker,
    )


def _names(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


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
    for component, (library, _) in _components(index).items():
        if library not in LIBRARIES:
            raise SettingsError(
                f"The {component} of {source} comes from {library}, which is code of the model's own and is "
                f"not run: use a model whose components come from {', '.join(LIBRARIES)}."
            )
    return index


def _components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Component to (library, class), without those that the model does not have."""
    return {
        name: (entry[0], entry[1])
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
    }


def _weights(index: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[str]]:
    """Component to the names of its weights' files, plain and of variants, for all that have weights."""
    found: dict[str, list[str]] = {name: [] for name in _components(index) if name not in _NO_WEIGHTS}
    for name in names:
        folder, _, file = name.partition("/")
        if folder in found and _WEIGHTS.fullmatch(file):
            found[folder].append(name)
    return found


def choose_variant(
    index: Mapping[str, Any], names: Iterable[str], source: str, *, half: bool
) -> tuple[str | None, str]:
    """The variant of the weights to load, "fp16" or None, and why.

    Raises `SettingsError` when a component has no safetensors at all.
    """
    names = list(names)
    weights = _weights(index, names)
    for component, files in weights.items():
        if files:
            continue
        if any(name.startswith(f"{component}/") and name.endswith(PICKLED) for name in names):
            raise SettingsError(f"The {component} of {source} has no .safetensors: {_PICKLE_REASON}.")
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
    weights = {file for files in _weights(index, names).values() for file in files}
    components = _components(index)
    texts = {
        name
        for name in names
        if name.count("/") == 1
        and name.partition("/")[0] in components
        and name.endswith((".json", ".txt", ".model"))
    }
    return sorted(weights | texts | {INDEX})


# --- the hub ------------------------------------------------------------------------------------------------


def _from_hub(repo: str, revision: str, *, half: bool, checked: bool) -> Path:
    """The folder in the hub's cache that holds `repo`, named by its commit; fetched unless it is there.

    Where the hub is out of reach, what the cache holds is used.
    """
    try:
        return _fetch(repo, revision or None, half=half, checked=checked)
    except hub_errors.GatedRepoError:
        raise SettingsError(
            f"The model {repo} is gated: accept its licence on the hub and set HF_TOKEN to your token."
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise SettingsError(
            f"The model {repo} has no revision {revision}: correct SMALLCAT_MODEL_REVISION."
        ) from None
    except hub_errors.RepositoryNotFoundError:
        raise SettingsError(
            f"SMALLCAT_MODEL is {repo}, which is neither a folder here nor a public model on the hub: "
            "correct it, or set HF_TOKEN for a private model."
        ) from None
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as error:
        raise SettingsError(
            f"SMALLCAT_MODEL is {repo}, which is no folder here, and the hub is out of reach: get on the "
            "network once to fetch it, or set SMALLCAT_MODEL to a folder."
        ) from error
    except (hub_errors.EntryNotFoundError, hub_errors.HfHubHTTPError, hub_errors.HFValidationError) as error:
        first_line = next(iter(str(error).strip().splitlines()), "")[:200]
        raise SettingsError(
            f"The model {repo} cannot be fetched as a diffusers pipeline ({first_line}): use one with a "
            f"{INDEX}."
        ) from error


def _fetch(repo: str, revision: str | None, *, half: bool, checked: bool) -> Path:
    folder = Path(huggingface_hub.hf_hub_download(repo, INDEX, revision=revision)).parent
    index = read_index(folder, repo)
    if not checked:
        index.pop(_CHECKER, None)
    try:
        names = huggingface_hub.list_repo_files(repo, revision=folder.name)
    except Exception:  # noqa: BLE001 - out of reach, which has other classes in other versions
        return folder  # What is missing from the cache is found, and named, when the folder is checked.
    variant, _ = choose_variant(index, names, repo, half=half)
    others = {
        name
        for files in _weights(index, names).values()
        for name in files
        if (".fp16" in name) != (variant == "fp16")
    }
    patterns = [name for name in wanted(index, names) if name not in others]
    return Path(
        huggingface_hub.snapshot_download(repo, revision=folder.name, allow_patterns=[*patterns, RECOMMENDED])
    )


# --- a single file ------------------------------------------------------------------------------------------


def _single_file(path: Path, source: str, settings: WorkerSettings) -> ModelFiles:
    if path.suffix.lower() != ".safetensors":
        raise SettingsError(f"SMALLCAT_MODEL is {source}: use a hub id, a folder or a .safetensors file.")
    kind = original_kind(read_header(path), source)
    files = {"": path}
    if settings.model_config_dir:
        configs = Path(settings.model_config_dir).expanduser()
        index = read_index(configs, f"in SMALLCAT_MODEL_CONFIG_DIR={configs}")
        if ("XL" in kind) != ("XL" in index["_class_name"]):
            raise SettingsError(
                f"The file {source} is for a {kind}, but SMALLCAT_MODEL_CONFIG_DIR={configs} has the configs "
                f"of a {index['_class_name']}: set it to a folder that fits."
            )
        kind = index["_class_name"]
        files |= {
            name: configs / name
            for name in wanted(index, _names(configs))
            if not name.endswith(".safetensors")
        }
    return ModelFiles(
        path=path,
        single_file=True,
        source=source,
        name=path.stem,
        revision=digest(files),
        pipeline_class=kind,
        variant=None,
        reason="a single file",
        ships_checker=False,
    )


def original_kind(keys: Iterable[str], source: str) -> str:
    """The pipeline for a checkpoint in Stable Diffusion's original layout, by the names of its tensors."""
    parts = {key.split(".", 1)[0] for key in keys}
    if {"model", "first_stage_model", "conditioner"} <= parts:
        return "StableDiffusionXLPipeline"
    if {"model", "first_stage_model", "cond_stage_model"} <= parts:
        return "StableDiffusionPipeline"
    raise SettingsError(
        f"The file {source} is no whole Stable Diffusion checkpoint (UNet, VAE and text encoder): use one, "
        "or a folder that diffusers saved a pipeline to."
    )


# --- bytes --------------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, Any]:
    """The tensors that a .safetensors file declares, by name.

    Only the header is read: 8 bytes of length, JSON, then the data (the format of huggingface/safetensors).
    Raises `SettingsError` when the file is truncated, or something else under that name.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        # A zip archive is what torch.save writes; the others begin a bare pickle of protocol 2 to 5.
        if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
            raise SettingsError(f"{path} holds a pickle under a .safetensors name: {_PICKLE_REASON}.")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise SettingsError(
                f"{path} is truncated or no safetensors file ({size:,} bytes): get it again, with git-lfs "
                "where it came from a git clone."
            )
        text = file.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise SettingsError(f"{path} is no safetensors file: get it again.") from None
    if 8 + length + end != size:
        raise SettingsError(f"{path} is truncated: {size:,} bytes of {8 + length + end:,}; get it again.")
    return header


def digest(files: Mapping[str, Path]) -> str:
    """16 hexadecimal digits: SHA-256 over the names and the files' contents, in the names' order."""

    def one(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    names = sorted(files)
    # Hashing gives up the interpreter's lock: a model of several large files takes a fraction of the time.
    with ThreadPoolExecutor(max_workers=4) as pool:
        sums = list(pool.map(one, (files[name] for name in names)))
    return hashlib.sha256(json.dumps([names, sums]).encode()).hexdigest()[:16]
