"""Finds the files of `SMALLCAT_MODEL`: a hub id, a folder or one .safetensors file.

The files are downloaded if need be, and checked before any of them is loaded: safetensors only, no code, a
pipeline that is served. Their hash is the model's revision, so that a job is never answered from a picture of
other files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from worker.contract.errors import SettingsError
from worker.contract.given_file import at_home
from worker.contract.settings import WorkerSettings
from worker.model import index as model_index
from worker.model import single_file
from worker.model.checkpoint import refuse_scaled
from worker.model.headers import digesting, read_header

#: A file in a model's folder with the defaults its author recommends: `{"steps": 8, "guidance_scale": 2.0}`.
RECOMMENDED = "smallcat.json"
_CHECKER = "safety_checker"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelFiles:
    """The checked files of a model, on this machine."""

    #: The folder with model_index.json, or the single file.
    path: Path
    #: The checkpoint, where `path` is one .safetensors file.
    single: single_file.SingleFile | None
    #: The value of `SMALLCAT_MODEL`, for messages.
    source: str
    #: The model's name, unless the settings give another one.
    name: str
    #: Gives `revision`, once the files are hashed: meanwhile they may be loaded.
    revision_of: Callable[[], str]
    #: Its pipeline in diffusers, for text to image: of `model_index.PIPELINES`.
    pipeline_class: str
    #: The variant of the weights' files, "fp16" or None.
    variant: str | None
    #: Why these weights were chosen.
    reason: str
    #: Whether the model has a safety checker, used or not.
    ships_checker: bool
    #: The number of weights in the files that will be loaded, by component; empty for a single file.
    values: Mapping[str, int]

    @property
    def revision(self) -> str:
        """The hub's commit, or 16 hexadecimal digits of a hash of the files."""
        return self.revision_of()


def find(settings: WorkerSettings, *, half: bool) -> ModelFiles:
    """The files of the model that the settings name, downloaded from the hub if need be.

    `half`: prefer fp16 weights. Raises `SettingsError` if the model is missing, cannot be downloaded or is
    not served.
    """
    path = at_home(Path(settings.model)) if settings.model else _bundled()
    source = settings.model or "bundled with smallcat"
    if path.suffix.lower() in model_index.PICKLED:
        raise SettingsError(f"SMALLCAT_MODEL is {source}: {model_index.PICKLE_REASON}.")
    is_here = path.exists()
    if is_here and settings.model_revision:
        raise SettingsError(
            f"SMALLCAT_MODEL_REVISION is {settings.model_revision}, but SMALLCAT_MODEL is {source}, which is "
            "not a hub id: unset SMALLCAT_MODEL_REVISION."
        )
    if settings.model_config_dir and not path.is_file():
        raise SettingsError(
            f"SMALLCAT_MODEL_CONFIG_DIR is {settings.model_config_dir}, but SMALLCAT_MODEL is {source}, "
            "which is not a single file: unset SMALLCAT_MODEL_CONFIG_DIR."
        )
    if path.is_file():
        return _single_file(path, source, settings)
    if is_here:
        name = path.resolve().name if settings.model else "smallcat-demo"
        return _folder(path, source, name, None, half=half, checked=settings.safety_checker)
    if not _HUB_ID.fullmatch(source) or source.startswith("."):
        raise SettingsError(
            f"SMALLCAT_MODEL is {source}, which does not exist: use a hub id (owner/name), a folder with "
            f"{model_index.INDEX}, or a .safetensors file."
        )
    folder = _from_hub(source, settings.model_revision, half=half, checked=settings.safety_checker)
    return _folder(folder, source, source, folder.name, half=half, checked=settings.safety_checker)


def _bundled() -> Path:
    """The folder of the model that comes with smallcat."""
    demo = Path(__file__).parents[1] / "demo"
    for folder in (demo, demo / "model"):
        if (folder / model_index.INDEX).is_file():
            return folder
    raise SettingsError(
        "No model is bundled with this installation: set SMALLCAT_MODEL to a hub id, a folder or a "
        ".safetensors file."
    )


# --- a folder -----------------------------------------------------------------------------------------------


def _folder(
    path: Path, source: str, name: str, revision: str | None, *, half: bool, checked: bool
) -> ModelFiles:
    _refuse_other_folder(path, source)
    index = model_index.read_index(path, source)
    ships_checker = _CHECKER in model_index.components(index)
    if not checked:
        index.pop(_CHECKER, None)
    names = _names(path)
    variant, reason = model_index.choose_variant(index, names, source, half=half)
    model_index.refuse_incomplete(index, names, source)
    files = {name: path / name for name in model_index.relevant_files(index, names)}
    headers = {name: read_header(file) for name, file in files.items() if file.suffix == ".safetensors"}
    for weights, header in headers.items():
        refuse_scaled(header.tensors, str(files[weights]))
    model_index.refuse_quantised(index, path, source)
    values = {
        component: sum(tensor.values for name in found for tensor in headers[name].tensors.values())
        for component, found in model_index.weights_to_load(index, names, variant).items()
    }
    return ModelFiles(
        path=path,
        single=None,
        source=source,
        name=name,
        revision_of=(lambda: revision) if revision else digesting(files),
        pipeline_class=model_index.PIPELINES[index["_class_name"]],
        variant=variant,
        reason=reason,
        ships_checker=ships_checker,
        values=values,
    )


def _refuse_other_folder(path: Path, source: str) -> None:
    """Raise `SettingsError` for a folder without an index, with a word on what may be meant."""
    if (path / model_index.INDEX).is_file():
        return
    if (path.parent / model_index.INDEX).is_file():
        raise SettingsError(
            f"The folder {source} is one component of a model: set SMALLCAT_MODEL to {path.parent}."
        )
    if found := sorted(each.name for each in path.iterdir() if each.suffix.lower() in single_file.SUFFIXES):
        raise SettingsError(
            f"The folder {source} has no {model_index.INDEX}, but single files: set SMALLCAT_MODEL to one of "
            f"them, such as {path / found[0]}."
        )


def _names(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


# --- the hub ------------------------------------------------------------------------------------------------


def _from_hub(repo: str, revision: str, *, half: bool, checked: bool) -> Path:
    """The folder of `repo` in the hub's cache, named by its commit; downloaded if it is not there.

    If the hub cannot be reached, the files in the cache are used.
    """
    try:
        return _download(repo, revision or None, half=half, checked=checked)
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
            f"SMALLCAT_MODEL is {repo}, which is not a folder here, and the hub cannot be reached: connect "
            "to the network once to download it, or set SMALLCAT_MODEL to a folder."
        ) from error
    except (hub_errors.EntryNotFoundError, hub_errors.HfHubHTTPError, hub_errors.HFValidationError) as error:
        first_line = next(iter(str(error).strip().splitlines()), "")[:200]
        raise SettingsError(
            f"The model {repo} cannot be downloaded as a diffusers pipeline ({first_line}): use one with a "
            f"{model_index.INDEX}, or download its .safetensors file and set SMALLCAT_MODEL to that."
        ) from error


def _download(repo: str, revision: str | None, *, half: bool, checked: bool) -> Path:
    folder = Path(huggingface_hub.hf_hub_download(repo, model_index.INDEX, revision=revision)).parent
    index = model_index.read_index(folder, repo)
    if not checked:
        index.pop(_CHECKER, None)
    try:
        names = huggingface_hub.list_repo_files(repo, revision=folder.name)
    except Exception:  # noqa: BLE001 - the hub cannot be reached; the error's class depends on the version
        return folder  # The check of the folder names what is missing from the cache.
    variant, _ = model_index.choose_variant(index, names, repo, half=half)
    loaded = {name for files in model_index.weights_to_load(index, names, variant).values() for name in files}
    patterns = [
        name
        for name in model_index.relevant_files(index, names)
        if name in loaded or not name.endswith(".safetensors")
    ]
    return Path(
        huggingface_hub.snapshot_download(repo, revision=folder.name, allow_patterns=[*patterns, RECOMMENDED])
    )


# --- a single file ------------------------------------------------------------------------------------------


def _single_file(path: Path, source: str, settings: WorkerSettings) -> ModelFiles:
    if path.suffix.lower() not in single_file.SUFFIXES:
        raise SettingsError(f"SMALLCAT_MODEL is {source}: use a hub id, a folder or a .safetensors file.")
    single = single_file.find(path, source, settings.model_config_dir)
    return ModelFiles(
        path=path,
        single=single,
        source=source,
        name=path.stem,
        revision_of=single.revision_of,
        pipeline_class=single.pipeline_class,
        variant=None,
        reason=f"a single file of {single.checkpoint.family.name}",
        ships_checker=False,
        values={},
    )
