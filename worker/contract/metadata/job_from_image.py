"""From a picture's file to the job that made it, whichever tool wrote its metadata.

The texts in the file are tried in the order in which tools mean them: infotext or JSON in `parameters` first,
then InvokeAI's, Exif's and ComfyUI's. Each is read by what it says, wherever it stands.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

from worker.contract.errors import InvalidJobError
from worker.contract.explain import short
from worker.contract.given_file import at_home, read_file
from worker.contract.infotext import read_fields
from worker.contract.job import Job
from worker.contract.metadata.comfyui import is_graph, read_graph
from worker.contract.metadata.image_texts import Text, texts_of
from worker.contract.metadata.json_tools import read_dream, read_json
from worker.contract.metadata.reading import MAX_LEFT_OUT, Reading

#: The order in which texts are tried. Others come last.
_ORDER = (
    "parameters",
    "invokeai_metadata",
    "sd-metadata",
    "UserComment",
    "generation_data",
    "prompt",
    "Dream",
)
#: The name in metadata of what else made a picture, and characters of each entry, at most.
LEFT_OUT, _LONGEST = "left_out", 100
#: What stands before JSON in Exif's tags: ComfyUI's "prompt:{...}".
_LABEL = re.compile(r"[A-Za-z ]{1,20}: ?(?=\{)")
#: A line of parameters, also one that cannot be read.
_PARAMETERS = re.compile(r"\bSteps: ?\d|\bSampler: |\bCFG scale: ")


def job_from_image(image: bytes | str | os.PathLike[str]) -> Job:
    """The job that a picture's metadata describes: submitting it gives the same picture.

    `image` is the path or the bytes of a PNG, JPEG or WebP file of smallcat, AUTOMATIC1111, Forge, Civitai,
    Fooocus, SwarmUI, InvokeAI or ComfyUI. Another tool's noise and model are its own: the job has its
    parameters. What else made the picture, such as another upscaler, is named in a `UserWarning`, and in the
    job's metadata under `left_out`, which goes with it into its record. Raises `InvalidJobError` where there
    is nothing to read, or it cannot be read, or another tool's picture began with an image.
    """
    texts = texts_of(_bytes(image))
    order = {name: number for number, name in enumerate(_ORDER)}
    for text in sorted(texts, key=lambda each: order.get(each.name, len(order))):
        if (reading := _read(text)) is not None:
            job = reading.job
            if reading.warning:
                warnings.warn(reading.warning, UserWarning, stacklevel=2)
                # The warning is gone with this process; metadata goes with the job into its record.
                noted = {LEFT_OUT: [each[:_LONGEST] for each in reading.left_out[:MAX_LEFT_OUT]]}
                job = job.model_copy(update={"metadata": noted})
            return job
    if not texts:
        raise InvalidJobError("The picture holds no infotext: it was not made by smallcat, or was edited.")
    names = ", ".join(dict.fromkeys(text.name for text in texts[:20]))
    raise InvalidJobError(
        f"The picture's texts ({names}) are not what AUTOMATIC1111, Forge, Civitai, Fooocus, SwarmUI, "
        "InvokeAI or ComfyUI write: it holds no infotext that can be read."
    )


def _bytes(image: object) -> bytes:
    """The bytes of a file that is given by its path or its bytes. Raises `InvalidJobError`."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if not isinstance(image, str | os.PathLike):
        raise InvalidJobError(f"image is {short(image)}: give a path, or the bytes of a file.")
    path = at_home(Path(os.fsdecode(image)))
    return read_file("image", path, path)[0]


def read_infotext(data: bytes) -> str | None:
    """The infotext inside a picture of ours; None where there is none."""
    texts = {text.name: text.text for text in texts_of(data)}
    return texts.get("parameters", texts.get("UserComment"))


def _read(text: Text) -> Reading | None:
    """What a text says; None where it is of no tool that is known."""
    found = text.text
    if text.is_latin and not found.isascii() and "Version: smallcat" not in found[-1_000:]:
        found = _as_utf8(found)
    plain = found.lstrip()
    if label := _LABEL.match(plain[:40]):
        plain = plain[label.end() :]
    if plain.startswith("{") and isinstance(value := _json(plain), dict):
        return _read_object(value)
    if text.name == "Dream":
        return read_dream(found)
    return read_fields(found) if _PARAMETERS.search(found) else None


def _read_object(value: dict[str, Any]) -> Reading | None:
    """What a JSON object says: a tool's own names, a graph, or one of these inside it."""
    if isinstance(inner := value.get("extraMetadata"), str) and isinstance(said := _json(inner), dict):
        return read_json(said)  # Civitai's generator, beside its graph.
    for name in ("prompt", "graph"):
        if is_graph(value.get(name)):
            return read_graph(value[name])
    return read_graph(value) if is_graph(value) else read_json(value)


def _json(text: str) -> object:
    try:
        return json.loads(text.strip("\0 \t\r\n\ufeff"))
    except (ValueError, RecursionError):
        return None


def _as_utf8(text: str) -> str:
    """A text that its format has as Latin-1, where its bytes are UTF-8: some tools write so."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text
