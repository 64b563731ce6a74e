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
#: Components without weights.
_NO_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")
#: The file that says what a folder's components are.
INDEX = "model_index.json"
#: Endings of pickled weights.
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
#: Weights that diffusers and transformers load by themselves: whole or in shards, plain or of a variant.
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(\.fp16)?(-\d{5}-of-\d{5})?\.safetensors")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: Why pickled weights are refused.
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


def find(settings: WorkerSettings, *, half: bool) -> ModelFiles:
    """The files of the model that the settings name, fetched from the hub where need be.

    `half`: prefer fp16 weights. Raises `SettingsError` for whatever is missing, out of reach or not served.
    """
    source = settings.model or str(_bundled())
    path = Path(source).expanduser()
    if path.suffix.lower() in PICKLED:
        raise SettingsError(f"SMALLCAT_MODEL is {source}: {_PICKLE_REASON}.")
    if path.is_file():
        return _single_file(path, source, settings)
    if path.is_dir():
        name = settings.model and path.resolve().name
        return _folder(path, source, name or "demo", revision=None, half=half)
    if source.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(source):
        raise SettingsError(
            f"SMALLCAT_MODEL is {source}, where there is nothing: use a hub id (owner/name), a folder with "
            f"{INDEX}, or a .safetensors file."
        )
    folder = _from_hub(source, settings.model_revision, half=half)
    return _folder(folder, source, source, revision=folder.name, half=half)


def _bundled() -> Path:
    """The folder of the model that comes with smallcat."""
    demo = Path(__file__).parent / "demo"
    for folder in (demo, demo / "model"):
        if (folder / INDEX).is_file():
            return folder
    raise SettingsError(
        "No model is bundled with this installation: set SMALLCAT_MODEL to a hub id, a folder or a .safetensors "
        "file."
    )


# --- a folder -----------------------------------------------------------------------------------------------


def _folder(path: Path, source: str, name: str, *, revision: str | None, half: bool) -> ModelFiles:
    index = read_index(path, source)
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    variant, reason = choose_variant(index, names, source, half=half)
    files = [path / file for file in wanted(index, names)]
    for file in files:
        if file.suffix == ".safetensors":
            read_header(file)
    return ModelFiles(
        path=path,
        single_file=False,
        source=source,
        name=name,
        revision=revision or digest(path, files),
        pipeline_class=index["_class_name"],
        variant=variant,
        reason=reason,
    )


def read_index(folder: Path, source: str) -> dict[str, Any]:
    """`folder`'s model_index.json. Raises `SettingsError` unless it is of a pipeline that is served."""
    path = folder / INDEX
    if not path.is_file():
        raise SettingsError(
            f"The model {source} has no {INDEX}: use a folder that diffusers saved a pipeline to."
        )
    try:
        index = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise SettingsError(f"The {INDEX} of {source} is no JSON ({error}): get it again.") from None
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind not in PIPELINES:
        raise SettingsError(
            f"The model {source} is a {kind}, which is not served: use a {' or '.join(PIPELINES)}."
        )
    for component, (library, _) in _components(index).items():
        if library not in LIBRARIES:
            raise SettingsError(
                f"The {component} of {source} comes from {library}, which is code of the model's own and is not "
                f"run: use a model whose components come from {', '.join(LIBRARIES)}."
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
        return "fp16", "from its fp16 files"
    if has_plain:
        return None, "from its plain files"
    return "fp16", "from its fp16 files, as far as it has no others"


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


def _from_hub(repo: str, revision: str, *, half: bool) -> Path:
    """The folder in the hub's cache that holds `repo`, named by its commit; fetched unless it is there.

    Where the hub is out of reach, what the cache holds is used.
    """
    try:
        first = Path(huggingface_hub.hf_hub_download(repo, INDEX, revision=revision or None))
        folder = first.parent
        index = read_index(folder, repo)
        try:
            names = huggingface_hub.list_repo_files(repo, revision=folder.name)
        except Exception:  # noqa: BLE001 - out of reach; each version of the hub's library has its own HTTP errors
            return folder  # what is missing from the cache is found, and named, when the folder is checked
        variant, _ = choose_variant(index, names, repo, half=half)
        skipped = {
            name
            for files in _weights(index, names).values()
            for name in files
            if (".fp16" in name) != (variant == "fp16")
        }
        fetched = [name for name in wanted(index, names) if name not in skipped]
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=folder.name, allow_patterns=[*fetched, "smallcat.json"]
            )
        )
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
            f"SMALLCAT_MODEL is {repo}, which is neither a folder here nor a public model on the hub: correct it, "
            "or set HF_TOKEN for a private model."
        ) from None
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as error:
        raise SettingsError(
            f"SMALLCAT_MODEL is {repo}, which is no folder here, and the hub is out of reach: get on the network "
            "once to fetch it, or set SMALLCAT_MODEL to a folder."
        ) from error
    except (hub_errors.EntryNotFoundError, hub_errors.HfHubHTTPError, hub_errors.HFValidationError) as error:
        raise SettingsError(
            f"The model {repo} cannot be fetched as a diffusers pipeline "
            f"({next(iter(str(error).strip().splitlines()), '')[:200]}): use one with a {INDEX}."
        ) from error


# --- a single file ------------------------------------------------------------------------------------------


def _single_file(path: Path, source: str, settings: WorkerSettings) -> ModelFiles:
    if path.suffix.lower() != ".safetensors":
        raise SettingsError(f"SMALLCAT_MODEL is {source}: use a hub id, a folder or a .safetensors file.")
    keys = read_header(path)
    files = [path]
    root = path.parent
    if settings.model_config_dir:
        root = Path(settings.model_config_dir).expanduser()
        index = read_index(root, f"in SMALLCAT_MODEL_CONFIG_DIR={root}")
        kind = index["_class_name"]
        names = [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]
        weights = {name for found in _weights(index, names).values() for name in found}
        files += [root / name for name in wanted(index, names) if name not in weights]
    else:
        kind = _original_kind(keys, source)
    return ModelFiles(
        path=path,
        single_file=True,
        source=source,
        name=path.stem,
        revision=digest(root, files),
        pipeline_class=kind,
        variant=None,
        reason="a single file",
    )


def _original_kind(keys: Mapping[str, Any], source: str) -> str:
    """The pipeline for a checkpoint in the original layout of Stable Diffusion, by the names of its tensors."""
    if any(key.startswith("model.diffusion_model.") for key in keys):
        if any(key.startswith("conditioner.embedders.") for key in keys):
            return "StableDiffusionXLPipeline"
        if any(key.startswith("cond_stage_model.") for key in keys):
            return "StableDiffusionPipeline"
    raise SettingsError(
        f"The file {source} is no whole Stable Diffusion checkpoint (UNet, VAE and text encoder): use one, or a "
        "folder that diffusers saved a pipeline to."
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
        if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
            raise SettingsError(f"{path} holds a pickle under a .safetensors name: {_PICKLE_REASON}.")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise SettingsError(f"{path} is truncated or no safetensors file ({size:,} bytes): get it again.")
        text = file.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise SettingsError(f"{path} is no safetensors file: get it again.") from None
    if 8 + length + end != size:
        raise SettingsError(
            f"{path} is truncated: {size:,} bytes of {8 + length + end:,}; get it again, with git-lfs where it "
            "came from a git clone."
        )
    return header


def digest(root: Path, files: Iterable[Path]) -> str:
    """16 hexadecimal digits: SHA-256 over the files' names below `root` and their contents, in that order."""

    def one(file: Path) -> tuple[str, str]:
        with file.open("rb") as opened:
            name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.suffix
            return name, hashlib.file_digest(opened, "sha256").hexdigest()

    # Hashing gives up the interpreter's lock: a model of several large files takes a fraction of the time.
    with ThreadPoolExecutor(max_workers=4) as pool:
        pairs = sorted(pool.map(one, files))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]
