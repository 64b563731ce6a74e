"""The infotext of a picture: its job, as AUTOMATIC1111 writes it and many tools read it.

    a small cat
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 5, Size: 512x512, Model: ..., Model hash: ...

It is in the PNG's text chunk `parameters`, or in Exif's UserComment. Its keys are in the table of job fields.
The format cannot hold every prompt, such as one with a line that starts with "Steps: ". Where reading the
infotext would not give the same job, the prompts are added once more as JSON, which reading prefers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import ExifTags

from worker.contract import a1111_syntax
from worker.contract.choices import NoiseSchedule, PromptSyntax, Scheduler
from worker.contract.errors import InvalidJobError
from worker.contract.explain import short
from worker.contract.file_index import AUTO_V2, NO_FILES, FileIndex, Kind, composed_name, key_of, with_hash
from worker.contract.input_reference import ALPHA
from worker.contract.job import JOB_FIELDS, WRITTEN_FIELDS, Job
from worker.contract.job_fields import FieldEntry, truth_of
from worker.contract.job_files import embeddings_of, vae_of
from worker.contract.lora_tags import tags_of, taken
from worker.contract.loras import Lora, read_loras
from worker.contract.metadata import hires
from worker.contract.metadata.a1111_text import pairs_of, split
from worker.contract.metadata.reading import Reading, left_out, number
from worker.contract.scheduler_names import AUTOMATIC, pair_of

#: The keys in the order in which they are written, each with its fields: width and height are one key.
_KEYS: tuple[tuple[str, tuple[FieldEntry, ...]], ...] = tuple(
    (key, tuple(fields))
    for key, fields in itertools.groupby(
        sorted(
            (each for each in WRITTEN_FIELDS.values() if each.is_hashed and not each.is_prompt),
            key=lambda each: each.infotext_order,
        ),
        key=lambda each: each.infotext,
    )
)
#: For each field with choices these by AUTOMATIC1111's names for them.
_CHOICES = {
    each.name: {name: choice for choice, name in each.a1111_values.items()}
    for each in WRITTEN_FIELDS.values()
}

_NEGATIVE = "Negative prompt: "
_SAMPLER = "Sampler"
_TEXTS = "Texts"
#: AUTOMATIC1111's key for embeddings, and digits of the hashes in it.
_TI_HASHES, _TI_DIGITS = "TI hashes", 12
_VAE_HASH = "VAE hash"
#: AUTOMATIC1111's key for LoRAs.
_LORA_HASHES = "Lora hashes"
#: The key under which Civitai looks for what it has: AutoV2 hashes by kind and name, as bare JSON.
_HASHES = "Hashes"
#: Whose infotext it is: another tool's model and its hash mean nothing here.
_VERSION, _OURS = "Version", "smallcat"
#: AUTOMATIC1111 has a key for the eta of DDIM, and one for that of all others.
_ETA, _ETA_OF_DDIM = "Eta", "Eta DDIM"
#: For AUTOMATIC1111 1.10 a sampler without a schedule is "Automatic". This is its name for its own one.
_OWN_SCHEDULE = "Uniform"
#: Keys of a schedule beside the sampler.
_SCHEDULES = ("Schedule type", "Scheduler")
#: Keys that are read of other tools, and keys that say nothing of how the picture was made beside the job's
#: own fields: the model is the fleet's.
_READ = frozenset(
    (
        *(key for key, entries in _KEYS if not entries[0].infotext_ours_only),
        *(_VERSION, _ETA_OF_DDIM, *_SCHEDULES),
    )
)
_HARMLESS = frozenset(
    each.casefold()
    for each in (
        *("Model", "Model hash", "VAE hash", "Hashes", "User", "Created Date", "Date"),
        *("Batch size", "Batch pos", "Civitai metadata", "Template", "Negative Template", "Wildcard prompt"),
        *(
            "Wildcard negative prompt",
            "Raw prompt",
            "Raw negative prompt",
            "Performance",
            "RNG",
            "Backend",
            "App",
            "Pipeline",
        ),
    )
)
#: Keys of pictures that began with another one, beside the denoising strength.
_OTHER_START = frozenset(("Mask blur", "Masked area padding", "Inpaint area", "Masked content", "Init image"))
#: What is left out and is as a job does it.
_NEUTRAL = frozenset(("Emphasis: Original", "Operations: txt2img", "VAE: Automatic", "VAE: None"))
#: The type of each of Civitai's resources.
_RESOURCE = re.compile(r'"type": ?"(\w{1,30})"')
#: What is never part of a prompt that was read rightly.
_STEPS = re.compile(r"\bSteps: ?\d")

#: What a value is quoted for.
_SPECIAL = re.compile(r'[,:\n"]')


def write(job: Job, files: FileIndex = NO_FILES) -> str:
    """The infotext of a resolved job. `read` of it gives back all that determines the picture.

    `files`: those of the worker that rendered it, which know the web UI's own hashes of LoRAs.
    """
    pairs = {_key(job, key): value for key, entries in _KEYS if (value := _value(job, entries)) is not None}
    embeddings, vae = embeddings_of(job), vae_of(job)
    loras = {each.name: job.file_hashes.get(key_of(Kind.LORA, each.name), "") for each in job.loras}
    if shown := ", ".join(f"{name}: {_known_as(sha256, files)}" for name, sha256 in loras.items() if sha256):
        pairs[_LORA_HASHES] = _quote(shown)
    if embeddings:
        shown = ", ".join(f"{name}: {sha256[:_TI_DIGITS]}" for name, sha256 in embeddings.items())
        pairs[_TI_HASHES] = _quote(shown)
    if vae:
        pairs[_VAE_HASH] = vae[:AUTO_V2]
    known = [(f"embed:{name}", sha256) for name, sha256 in embeddings.items()]
    known += [(f"lora:{name}", sha256) for name, sha256 in loras.items() if sha256]
    known += [("vae", vae)] if vae else []
    if known:
        hashes = {name: sha256[:AUTO_V2] for name, sha256 in known}
        pairs[_HASHES] = json.dumps(hashes, ensure_ascii=False)
    if job.padding is not None:
        pairs["Inpaint area"] = "Only masked"
    pairs |= hires.pairs_of(job)
    pairs[_VERSION] = _OURS
    text = _join(job, pairs)
    if _texts(text) != (job.prompt, job.negative_prompt):
        # Not as ASCII: six characters for each of a long prompt's would not fit into a JPEG's Exif.
        texts = json.dumps([job.prompt, job.negative_prompt], ensure_ascii=False)
        pairs[_TEXTS] = json.dumps(texts, ensure_ascii=False)
        text = _join(job, pairs)
    return text


def read(text: str) -> Job:
    """The job that an infotext describes. Other tools' infotexts are read as far as they go.

    Raises `InvalidJobError` where a value is outside a job's limits.
    """
    return read_fields(text).job


def read_fields(text: str) -> Reading:
    """What an infotext says. Ours is read as it was written; a text without pairs is a bare prompt.

    Raises `InvalidJobError` where it cannot be read.
    """
    for ours in (text, text.rstrip("\0 \r\n"), text.strip("\0 \r\n").replace("\r\n", "\n")):
        last = ours.rpartition("\n")[2]
        if last.startswith("Steps: ") and (pairs := pairs_of(last)).get(_VERSION) == _OURS:
            prompt, negative = _texts(ours)
            # Earlier versions had no other syntax.
            fields = {"prompt_syntax": PromptSyntax.PLAIN, **_job_fields(pairs, is_ours=True)}
            return Reading(_prompts(prompt, negative) | fields, is_ours=True)
    return _read_others(text)


def _read_others(text: str) -> Reading:
    parts = split(text)
    prompt, negative, pairs = parts or (text, "", {})
    if _STEPS.search(prompt) or _STEPS.search(negative):
        raise InvalidJobError(
            "The infotext has its parameters where the prompt should end, and it is unclear which is which: "
            'put them on a last line that begins with "Steps: ".'
        )
    resources = set(_RESOURCE.findall(pairs.pop("Civitai resources", ""))) - {"checkpoint", "Checkpoint"}
    _refuse_other_start(pairs)
    fields = _prompts(prompt, negative) | _job_fields(pairs, is_ours=False)
    fields |= hires.take(pairs, fields)
    others: Sequence[str] = ()
    if parts is not None:
        prompt, loras, others = _networks(prompt, pairs)
        fields |= {"prompt": prompt, "prompt_syntax": PromptSyntax.A1111}
        fields |= {"loras": loras} if loras else {}
        resources -= {"lora", "LORA", "lycoris"} if loras else set()
    left = [f"Civitai resources: {each}" for each in sorted(resources)]
    left += [each for each in left_out(pairs, _READ, _HARMLESS) if each not in _NEUTRAL]
    return Reading(fields, (*left, *others))


def _known_as(sha256: str, files: FileIndex) -> str:
    """The hash of a LoRA by which the web UI finds it, or else that by which Civitai does."""
    return next((each.auto_v3 for each in files.find_any(Kind.LORA, sha256)), "") or sha256[:AUTO_V2]


def _networks(prompt: str, pairs: dict[str, str]) -> tuple[str, list[Lora], Sequence[str]]:
    """A prompt without extra networks, its LoRAs, and the networks that a job cannot ask for.

    A LoRA whose hash the infotext says is asked for by that as well: its name may mean another file here.
    """
    said = (each.partition(":") for each in pairs.get(_LORA_HASHES, "").split(","))
    hashes = {composed_name(name.strip()): digits.strip() for name, _, digits in said}
    known = _hashes_of_civitai(pairs, Kind.LORA) | hashes
    try:
        rest, found = taken(prompt)
        names = {each.name: with_hash(each.name, known.get(each.name, "")) for each in found}
        loras = read_loras([each.model_copy(update={"name": names[each.name]}) for each in found])
        if hashes.keys() <= names.keys():
            pairs.pop(_LORA_HASHES, None)
    except ValueError:
        rest, loras = prompt, []
    return a1111_syntax.without_networks(rest), loras, a1111_syntax.networks(rest)


def _hashes_of_civitai(pairs: Mapping[str, str], kind: Kind) -> dict[str, str]:
    """By name the hashes of a kind in the key that many tools write for Civitai."""
    try:
        said = json.loads(pairs.get(_HASHES, "{}"))
    except (ValueError, RecursionError):
        return {}
    of_kind = f"{kind}:"
    return {
        composed_name(key[len(of_kind) :].strip()): digits
        for key, digits in (said.items() if isinstance(said, dict) else ())
        if key.lower().startswith(of_kind) and isinstance(digits, str)
    }


def _refuse_other_start(pairs: Mapping[str, str]) -> None:
    """Raise `InvalidJobError` where the picture began with another one: image to image, or inpainting.

    AUTOMATIC1111 writes a denoising strength for these, and for hires fix, with keys of its own beside it;
    SD.Next names the operation.
    """
    operations = pairs.get("Operations", "").casefold()
    start = next((name for name in pairs if name in _OTHER_START), None)
    if start is None and any(each in operations for each in ("img2img", "inpaint", "outpaint")):
        start = "Operations"
    is_second_pass = any(name.startswith(("Hires", "First pass size", "HiRes")) for name in pairs)
    if start is None and "Denoising strength" in pairs and not is_second_pass:
        start = "Denoising strength"
    if start is not None:
        raise InvalidJobError(
            f"The infotext has {start}: {short(pairs[start])}, so the picture began with another one, which "
            "is not in it."
        )


def _prompts(prompt: str, negative: str) -> dict[str, Any]:
    return {"prompt": prompt, "negative_prompt": negative}


def _job_fields(pairs: Mapping[str, str], *, is_ours: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if is_ours and "Init image" not in pairs:
        # Beside a second pass it is what others read; ours has a key of its own.
        pairs = {key: value for key, value in pairs.items() if key != hires.STRENGTH}
    if _ETA_OF_DDIM in pairs:
        pairs = {**pairs, _ETA: pairs[_ETA_OF_DDIM]}
    for key, entries in _KEYS:
        if key in (_SAMPLER, *_SCHEDULES):
            continue
        if key in pairs and (is_ours or not entries[0].infotext_ours_only):
            fields |= _fields(key, entries, pairs, is_ours=is_ours)
    sampler, schedule = pairs.get(_SAMPLER), _schedule(pairs)
    if sampler or schedule:
        # Since AUTOMATIC1111's version 1.9 the schedule has a key of its own; Fooocus has another.
        fields |= pair_of(sampler, schedule).fields()
    return fields


def _schedule(pairs: Mapping[str, str]) -> str | None:
    return next((pairs[name] for name in _SCHEDULES if name in pairs), None)


def _key(job: Job, key: str) -> str:
    return _ETA_OF_DDIM if key == _ETA and job.scheduler is Scheduler.DDIM else key


def _value(job: Job, entries: tuple[FieldEntry, ...]) -> object:
    """The value of a key; None where it is not written: a later version's field at its default."""
    if len(entries) > 1:
        return "x".join(str(getattr(job, entry.name)) for entry in entries)
    [entry] = entries
    value = getattr(job, entry.name)
    if value is NoiseSchedule.DEFAULT and job.scheduler in AUTOMATIC:
        return _OWN_SCHEDULE
    # AUTOMATIC1111 writes its default blur, too. The edge of the mask alpha is the image's own.
    is_blur = entry.name == "mask_blur" and bool(job.mask) and job.mask != ALPHA
    if not entry.is_original and value == entry.default and not is_blur:
        return None
    if entry.kind is dict:
        return _quote(json.dumps(value, ensure_ascii=False))
    if entry.as_text is not None:
        return _quote(entry.as_text(value))
    return _quote(entry.a1111_values.get(value, value)) if entry.kind is str else value


def _fields(
    key: str, entries: tuple[FieldEntry, ...], pairs: Mapping[str, str], *, is_ours: bool
) -> dict[str, Any]:
    """The job fields that the value of a key means."""
    text, entry = pairs[key], entries[0]
    if len(entries) > 1:
        return _sizes(key, entries, text) if text else {}
    if entry.kind in (int, float):
        value = _number(entry.kind, key, text)
        # -1 is AUTOMATIC1111's way of asking for a random seed.
        if not is_ours and entry.is_made and value == -1:
            return {}
        if not is_ours and entry.name == "clip_skip":
            value = max(1, abs(value))  # 0 is none, too; some tools count as ComfyUI does, -1 and down.
        return {entry.name: value}
    if entry.kind is bool:
        # What is neither stays, and the job's own error names it.
        return {entry.name: text if (truth := truth_of(text)) is None else truth}
    if entry.kind is dict:
        return {entry.name: _object(key, text)}
    if choices := _CHOICES[entry.name]:
        return {entry.name: choices.get(text, text)} if text else {}
    return {entry.name: text}


def _sizes(key: str, entries: tuple[FieldEntry, ...], text: str) -> dict[str, Any]:
    if not (sides := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)):
        raise InvalidJobError(f"The infotext has {key}: {text[:40]!r}, which is no size like 512x512.")
    return {entry.name: int(side) for entry, side in zip(entries, sides.groups(), strict=True)}


def _object(key: str, text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        raise InvalidJobError(f"The infotext has {key} that are no JSON object.") from None


def _number(kind: type, key: str, text: str) -> int | float:
    return number(kind, key, text)


def _join(job: Job, pairs: Mapping[str, object]) -> str:
    lines = [job.prompt + _tags(job.prompt, job.loras)]
    if job.negative_prompt:
        lines.append(_NEGATIVE + job.negative_prompt)
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in pairs.items())])


def _tags(prompt: str, loras: Sequence[Lora]) -> str:
    """What follows a prompt in an infotext: LoRAs, where the web UI reads them and Civitai finds weights."""
    tags = tags_of(loras)
    # Behind a comment they need a line of their own.
    return (("\n" if "#" in prompt.rpartition("\n")[2] else " ") + tags) if tags else ""


def _texts(text: str) -> tuple[str, str]:
    """Prompt and negative prompt of an infotext of ours."""
    body, _, last = text.rpartition("\n")
    pairs = pairs_of(last)
    if texts := pairs.get(_TEXTS):
        try:
            prompt, negative = json.loads(texts)
        except (ValueError, TypeError, RecursionError):
            raise InvalidJobError(f"The infotext has {_TEXTS} that are no pair of texts.") from None
        return prompt, negative
    prompt, mark, negative = ("\n" + body).partition("\n" + _NEGATIVE)
    prompt = prompt[1:]
    if tags := tags_of(_loras_in(pairs)):
        prompt = prompt.removesuffix(tags).removesuffix("\n" if prompt.endswith(f"\n{tags}") else " ")
    return prompt, negative if mark else ""


def _loras_in(pairs: Mapping[str, str]) -> list[Lora]:
    """The LoRAs that an infotext of ours has; none where they cannot be read: the job's own check says so."""
    with contextlib.suppress(ValueError):
        return read_loras(pairs.get(JOB_FIELDS["loras"].infotext, ""))
    return []


def _quote(value: str) -> str:
    return json.dumps(value) if _SPECIAL.search(value) or value != value.strip() else value


#: Exif's mark for UTF-16 in a UserComment (CIPA DC-008, 4.6.6).
_UNICODE = b"UNICODE\0"


def exif(infotext: str) -> bytes:
    """An Exif block that holds a UserComment with the infotext, and nothing else.

    Written by hand: Pillow gives the comment the type BYTE, which piexif, and so AUTOMATIC1111, cannot read.
    Big-endian throughout, as those readers expect; IFD0 at 8, Exif's own IFD at 26, the comment at 44.
    """
    comment = _UNICODE + infotext.encode("utf-16-be")
    header = struct.pack(">2sHI", b"MM", 42, 8)
    pointer = struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, 4, 1, 26, 0)
    entry = struct.pack(">HHHIII", 1, ExifTags.Base.UserComment, 7, len(comment), 44, 0)
    return b"Exif\0\0" + header + pointer + entry + comment
