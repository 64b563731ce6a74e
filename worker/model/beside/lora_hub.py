"""LoRAs on the hub: `owner/repository` where it has one, else `owner/repository/file.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from worker.contract.errors import SettingsError, first_line
from worker.model.beside import lora_scales

#: A place on the hub.
PLACE = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(/(?P<file>[\w./ -]+\.safetensors))?")
#: The names that diffusers and PEFT give to a LoRA: where a repository has one of them, it is the one.
GENERAL = ("pytorch_lora_weights", lora_scales.PEFT_STEM)


def fetch(place: str) -> Path:
    """The file of a LoRA on the hub, in its cache; downloaded if it is not there. Raises `SettingsError`."""
    import huggingface_hub

    found = PLACE.fullmatch(place)
    if found is None:
        raise SettingsError(f"SMALLCAT_LORAS names {place}, which is no place on the hub.")
    repo, file = found["repo"], found["file"]
    try:
        if file is None:
            file = _only(_names(repo), place)
        beside = (Path(file).parent / lora_scales.CONFIG).as_posix()
        folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=[file, beside]))
    except SettingsError:
        raise
    except Exception as error:
        raise SettingsError(
            f"SMALLCAT_LORAS names {place}, which is neither here nor can be downloaded from the hub "
            f"({first_line(error)}): correct it, or name a folder or a file."
        ) from error
    if not (folder / file).is_file():
        raise SettingsError(f"SMALLCAT_LORAS names {place}, which has no {file}: correct it.")
    return folder / file


def _names(repo: str) -> list[str]:
    """The files of a repository; of its copy in the cache where the hub is out of reach."""
    import huggingface_hub

    try:
        return list(huggingface_hub.list_repo_files(repo))
    except Exception:
        try:
            folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
        except Exception:  # noqa: BLE001 - why the hub is out of reach says more
            folder = None
        if folder is None:
            raise
        return [each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()]


def _only(names: Iterable[str], place: str) -> str:
    """The LoRA of a repository that has one. Raises `SettingsError`."""
    found = sorted(each for each in names if each.endswith(".safetensors") and "/" not in each)
    for general in GENERAL:
        if f"{general}.safetensors" in found:
            return f"{general}.safetensors"
    if len(found) != 1:
        shown = ", ".join(found[:5]) or "none"
        raise SettingsError(
            f"SMALLCAT_LORAS names {place}, which has {len(found)} .safetensors files ({shown}): name one of "
            f"them, as {place}/FILE.safetensors."
        )
    return found[0]
