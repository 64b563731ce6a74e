"""Puts the VAE that `SMALLCAT_MODEL_VAE` names in the place of the model's own.

Pictures are other ones by it, so it is part of the model's revision, and with it of every job's id.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from worker.contract.errors import SettingsError, SmallcatError
from worker.contract.given_file import at_home
from worker.model.beside import vae_files
from worker.model.placement import Choice

#: Digits of its hash in a revision, and letters of its name.
_DIGITS, _LETTERS = 10, 20
#: Names of weights in a folder, the first one that is there.
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")


def put(pipeline: Any, place: str) -> tuple[str, tuple[Choice, ...]]:
    """Give `pipeline`, on the CPU, the VAE in `place`; none where that is empty.

    Returns what follows the model's revision, and what was chosen. Raises `SettingsError`.
    """
    if not place:
        return "", ()
    path, name = find(place)
    own = pipeline.vae
    try:
        sha256 = vae_files.sha256_of(path)
        vae = vae_files.load(path, name, sha256, own.config)
    except (SmallcatError, OSError, ValueError) as error:
        raise SettingsError(f"SMALLCAT_MODEL_VAE is {place}: {error}") from error
    pipeline.register_modules(vae=vae.to(own.dtype))
    slug = re.sub(r"[^a-z0-9.]+", ".", name.lower())[:_LETTERS].strip(".")
    what = f"{name} ({type(vae).__name__})"
    reason = "set by SMALLCAT_MODEL_VAE, in place of the model's own"
    return f"-{slug or 'vae'}-{sha256[:_DIGITS]}", (Choice("VAE", what, reason),)


class VaeFile(NamedTuple):
    """A VAE's weights."""

    path: Path
    name: str


def find(place: str) -> VaeFile:
    """The VAE in `place`, downloaded from the hub if need be. Raises `SettingsError`."""
    path = at_home(Path(place))
    if path.is_file():
        is_general = path.name in _WEIGHTS
        return VaeFile(path, path.resolve().parent.name if is_general else path.stem)
    if path.is_dir():
        return VaeFile(_in_folder(path, place), path.resolve().name)
    if vae_files.HUB_ID.fullmatch(place) and not place.startswith("."):
        folder = vae_files.from_hub(place, "SMALLCAT_MODEL_VAE")
        return VaeFile(_in_folder(folder, place), place.partition("/")[2])
    raise SettingsError(
        f"SMALLCAT_MODEL_VAE is {place}, which does not exist: use a hub id (owner/name), a folder with "
        f"{vae_files.CONFIG} and {_WEIGHTS[0]}, or a .safetensors file."
    )


def _in_folder(folder: Path, place: str) -> Path:
    """The weights in a folder. Raises `SettingsError`."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    if (folder / "vae" / vae_files.CONFIG).is_file():
        raise SettingsError(
            f"SMALLCAT_MODEL_VAE is {place}, which is a whole model: set it to {folder / 'vae'}."
        )
    if len(found := sorted(folder.glob("*.safetensors"))) == 1:
        return found[0]
    has = f"{len(found)} .safetensors files: name one of them" if found else "no .safetensors file"
    raise SettingsError(f"SMALLCAT_MODEL_VAE is {place}, a folder without {_WEIGHTS[0]} and with {has}.")
