"""Finds all that belongs to a single .safetensors file: its VAE, its configs, what it predicts, its revision.

The configs are those that come with smallcat, or the user's. No weights are loaded here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from worker.contract.errors import SettingsError
from worker.contract.given_file import at_home
from worker.model import index as model_index
from worker.model import prediction
from worker.model.checkpoint import SDXL, Checkpoint, Part, identify, identify_vae
from worker.model.headers import digesting, read_header
from worker.model.prediction import Prediction

#: Configs of each family and CLIP's vocabulary; README.md there has their sources.
CONFIGS = Path(__file__).parent / "configs"
#: Suffixes of a single file.
SUFFIXES = (".safetensors", ".sft")


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint in one file, with all that is needed to load it."""

    path: Path
    #: The value of `SMALLCAT_MODEL`, for messages.
    source: str
    checkpoint: Checkpoint
    #: The file with the VAE, and the VAE in it: the checkpoint's own, or one that lies beside it.
    vae: tuple[Path, Part]
    #: What the UNet predicts. None: the user's configs say.
    predicts: Prediction | None
    #: The folder of the configs.
    configs: Path
    #: Its pipeline in diffusers, for text to image: of `model_index.PIPELINES`.
    pipeline_class: str
    #: Gives the revision, 16 hexadecimal digits, once the files are hashed.
    revision_of: Callable[[], str]
    #: What was chosen, what it is, and why; for the log.
    notes: tuple[tuple[str, str, str], ...]


def find(path: Path, source: str, config_dir: str) -> SingleFile:
    """The checkpoint at `path`, checked by its header. Raises `SettingsError` if it is none that is served.

    `config_dir`: the user's folder with configs, or "".
    """
    header = read_header(path)
    checkpoint = identify(header.tensors, source)
    family = checkpoint.family
    vae, vae_note = _vae(path, source, checkpoint)
    files = {"": path} | ({"vae": vae[0]} if vae[0] != path else {})
    predicts: Prediction | None = None
    if config_dir:
        configs = at_home(Path(config_dir))
        kind, texts = _user_configs(configs, source, checkpoint)
        files |= texts
        predicted = _predicted_by(configs)
        notes = [("prediction", predicted, prediction.reason_of_configs(header, predicted))]
    else:
        configs, kind = CONFIGS / family.configs, family.pipeline_class
        if checkpoint.guidance_width:
            kind = "LatentConsistencyModelPipeline"
        predicts = prediction.find(path, header, family)
        notes = [("prediction", str(predicts), predicts.reason)]
    if vae_note:
        notes.append(("VAE", vae[0].name if vae[0] != path else "the file's own", vae_note))
    if checkpoint.has_ema:
        reason = "as A1111, ComfyUI and Forge take; the averaged ones (model_ema) are left out"
        notes.append(("UNet weights", "the plain ones", reason))
    if checkpoint.scales:
        notes.append(
            ("scaled fp8", f"{len(checkpoint.scales):,} weights", "multiplied by their scales at the start")
        )
    digested = digesting(files)
    return SingleFile(
        path=path,
        source=source,
        checkpoint=checkpoint,
        vae=vae,
        predicts=predicts,
        configs=configs,
        pipeline_class=kind,
        revision_of=lambda: _revision(digested(), checkpoint, predicts),
        notes=tuple(notes),
    )


def _vae(path: Path, source: str, checkpoint: Checkpoint) -> tuple[tuple[Path, Part], str]:
    """The file with the VAE and the VAE in it, and why, if that is worth a note.

    A1111's convention: NAME.vae.safetensors beside the checkpoint NAME.safetensors wins over its own.
    """
    own = checkpoint.parts.get("vae")
    stem = path.name.removesuffix(path.suffix)
    try:
        beside = {each.name.lower(): each for each in path.parent.iterdir()}
    except OSError:  # A folder that may not be listed.
        beside = {}
    for suffix in SUFFIXES:
        if (found := beside.get(f"{stem}.vae{suffix}".lower())) is not None and found.is_file():
            part = identify_vae(read_header(found).tensors, str(found))
            return (found, part), "it lies beside the checkpoint, as A1111 takes it"
    pickled = next(
        (f"{stem}.vae{each}" for each in (".pt", ".ckpt") if f"{stem}.vae{each}".lower() in beside), None
    )
    if own is None:
        rest = f"convert {pickled} to it" if pickled else "or use a version of the checkpoint with a VAE"
        raise SettingsError(
            f"The file {source} has no VAE: put one beside it as {stem}.vae.safetensors, {rest}."
        )
    if pickled:
        note = f"{pickled} beside it is pickled and left out: convert it to {stem}.vae.safetensors to use it"
        return (path, own), note
    return (path, own), ""


def _user_configs(configs: Path, source: str, checkpoint: Checkpoint) -> tuple[str, dict[str, Path]]:
    """The pipeline's class in the user's configs, and their files, by name."""
    where = f"in SMALLCAT_MODEL_CONFIG_DIR={configs}"
    index = model_index.read_index(configs, where)
    if (checkpoint.family is SDXL) != ("XL" in index["_class_name"]):
        raise SettingsError(
            f"The file {source} is for a {checkpoint.family.pipeline_class}, but SMALLCAT_MODEL_CONFIG_DIR="
            f"{configs} has the configs of a {index['_class_name']}: set it to a folder that fits, or unset "
            "it."
        )
    index.pop("safety_checker", None)  # A single file has no safety checker.
    names = [file.relative_to(configs).as_posix() for file in configs.rglob("*") if file.is_file()]
    model_index.refuse_incomplete(index, names, where)
    relevant = [
        name for name in model_index.relevant_files(index, names) if not name.endswith(".safetensors")
    ]
    kind = model_index.PIPELINES[index["_class_name"]]
    return kind, {name: configs / name for name in relevant}


def _predicted_by(configs: Path) -> str:
    try:
        config = dict(json.loads((configs / "scheduler" / "scheduler_config.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return "epsilon"  # What is wrong with the file is said when it is loaded.
    return str(config.get("prediction_type", "epsilon"))


def _revision(of_files: str, checkpoint: Checkpoint, predicts: Prediction | None) -> str:
    """The digest of the files, and of how they are read where earlier versions read them otherwise."""
    reading = ["scaled fp8"] if checkpoint.scales else []
    if predicts is not None and (predicts.kind != checkpoint.family.prediction or predicts.zero_snr):
        reading.append(str(predicts))
    if not reading:
        return of_files
    return hashlib.sha256(json.dumps([of_files, *reading]).encode()).hexdigest()[:16]
