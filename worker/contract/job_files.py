"""Which files a job uses beside its model: what producers fill in at submission, and workers look for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from worker.contract.choices import PromptSyntax
from worker.contract.embedding_names import EmbeddingNames, unknown_in
from worker.contract.errors import InvalidJobError
from worker.contract.file_index import (
    AUTO_V2,
    FileEntry,
    FileIndex,
    Kind,
    called,
    composed_name,
    key_of,
    parts_of,
)
from worker.contract.job import Job
from worker.contract.loras import Lora

#: Files that a message names, at most.
_SHOWN = 4
#: Architectures that models, LoRAs and embeddings are named by alike.
_OF_ALL = {"SD 1.x", "SD 2.x", "SDXL"}
#: The field that names files of a kind.
_FIELDS: Mapping[str, str] = {Kind.LORA: "loras", Kind.EMBEDDING: "prompt"}


def with_files(job: Job, index: FileIndex, architecture: str = "") -> Job:
    """A resolved job with the SHA-256 of each file that it names, from `index`.

    A hash that it has already stays, so that a job can be sent again; one of a file that it does not name is
    taken away, so that equal jobs have equal ids. `architecture`: that of the job's model, where it is known.
    Raises `InvalidJobError` for a file that cannot be used, or is for another architecture.
    """
    given = embeddings_of(job)
    names = index.embedding_names if not given else EmbeddingNames({*index.embedding_names.names, *given})
    hashes = {}
    for name in names.of(job):
        hashes[key_of(Kind.EMBEDDING, name)] = given.get(name) or _usable(
            index.find(Kind.EMBEDDING, name), Kind.EMBEDDING, name
        )
    if job.vae:
        key = key_of(Kind.VAE, job.vae)
        hashes[key] = job.file_hashes.get(key) or _vae(job.vae, index)
    loras = _loras(job, index)
    hashes |= {key_of(Kind.LORA, each.name): sha256 for each, sha256 in loras}
    for key, sha256 in hashes.items():
        _check_fits(key, index.of_content(parts_of(key)[0], sha256), architecture)
    found = {"loras": [each for each, _ in loras], "file_hashes": dict(sorted(hashes.items()))}
    return job.model_copy(update=found) if any(getattr(job, name) != found[name] for name in found) else job


def _check_fits(key: str, entry: FileEntry | None, model: str) -> None:
    """Raise `InvalidJobError` for a LoRA, or an embedding, that is for another architecture than the model.

    A worker looks at each layer: what is not known here, or only looks right, is its own to refuse.
    """
    kind, name = parts_of(key)
    own = entry.architecture if entry else ""
    if kind == Kind.LORA:
        fits = own in ("", model)
    elif kind == Kind.EMBEDDING:  # Of others each says in its own terms what it fits.
        fits = own == model or not {own, model} <= _OF_ALL
    else:
        return
    if model and not fits:
        raise InvalidJobError(
            f'{_FIELDS[kind]} has the {called(kind)} "{name}", which is for {own}, and the model is {model}: '
            "use one that fits, or another model."
        )


def lacks_hashes(job: Job) -> bool:
    """Whether a job names a file of which it does not say the content."""
    keys = [key_of(Kind.LORA, each.name) for each in job.loras]
    keys += [key_of(Kind.VAE, job.vae)] if job.vae else []
    return not job.file_hashes.keys() >= set(keys)


def _vae(name: str, index: FileIndex) -> str:
    if index.find(Kind.VAE, name) is None:
        hint = _hint(index, Kind.VAE, name)
        raise InvalidJobError(f'vae is "{name}", which no worker offers: {hint}')
    return _usable(index.find(Kind.VAE, name), Kind.VAE, name)


def _hint(index: FileIndex, kind: Kind, name: str) -> str:
    if near := index.near(kind, name):
        return f"did you mean {' or '.join(near)}?"
    offered = [each.name for each in index.files if each.kind == kind and not each.problem]
    if not offered:
        return f"they offer no {called(kind)}. {kind.setting} of the workers says where theirs are."
    shown = ", ".join(offered[:_SHOWN])
    shown += f" and {len(offered) - _SHOWN:,} more" if len(offered) > _SHOWN else ""
    return f"they offer {shown} (smallcat doctor lists them)."


def _loras(job: Job, index: FileIndex) -> list[tuple[Lora, str]]:
    """The LoRAs of a job by their files' names, each with its SHA-256, in the order of the names."""
    found: dict[str, Lora] = {}
    #: By SHA-256: how the job calls each.
    called_by: dict[str, str] = {}
    for each in job.loras:
        written = each.name
        sha256 = job.file_hashes.get(key_of(Kind.LORA, each.name))
        if sha256 is None:
            entry = _lora(index, each.name)
            sha256 = _usable(entry, Kind.LORA, each.name)
            each = each.model_copy(update={"name": composed_name(entry.name)})
        if sha256 in found:
            names = " and ".join(f'"{name}"' for name in (called_by[sha256], written))
            raise InvalidJobError(f"loras has the same file twice, as {names}: keep one of them.")
        found[sha256], called_by[sha256] = each, written
    return sorted(((lora, sha256) for sha256, lora in found.items()), key=lambda pair: pair[0].name)


def _lora(index: FileIndex, asked: str) -> FileEntry:
    """The LoRA that a job asks for. Raises `InvalidJobError` where there is none, or more than one."""
    found = index.find_any(Kind.LORA, asked)
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(f'"{each.name}" ({each.auto_v2})' for each in found[:_SHOWN])
        shown += f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise InvalidJobError(
            f'loras has "{asked}", and this hash is that of {len(found)} different files: {shown}. Name one '
            "of them, or give its SHA-256 in full."
        )
    name = asked.rpartition("@")[0]
    if other := index.find(Kind.LORA, name):
        hint = f'their "{name}" is another file, {other.auto_v2}. To take that one, name it "{name}".'
    else:
        hint = _hint(index, Kind.LORA, name or asked)
    raise InvalidJobError(f'loras has "{asked}", which no worker offers: {hint}')


def loras_of(job: Job) -> list[tuple[str, Lora]]:
    """The LoRAs of a resolved job, each behind its SHA-256, in the order of these.

    In that order they are added up: so a file under another name gives the same bits.
    """
    hashes = job.file_hashes
    return sorted(
        ((hashes[key_of(Kind.LORA, each.name)], each) for each in job.loras), key=lambda pair: pair[0]
    )


def vae_of(job: Job) -> str:
    """The SHA-256 of a resolved job's VAE; empty where it is the model's own."""
    return job.file_hashes.get(key_of(Kind.VAE, job.vae), "") if job.vae else ""


def _usable(entry: FileEntry | None, kind: Kind, name: str) -> str:
    if entry is None or entry.problem:
        why = entry.problem if entry else "it is gone"
        raise InvalidJobError(f'The {called(kind)} "{name}" cannot be used: {why}.')
    return entry.sha256


def embeddings_of(job: Job) -> dict[str, str]:
    """The SHA-256 of each embedding of a job, by name."""
    found = ((parts_of(key), sha256) for key, sha256 in job.file_hashes.items())
    return {name: sha256 for (kind, name), sha256 in found if kind == Kind.EMBEDDING}


def files_of(job: Job) -> list[str]:
    """The files of a job, as messages name them: `embedding "x" (C74B4E810B)`."""
    return [_shown(key, sha256) for key, sha256 in job.file_hashes.items()]


def lacking(job: Job, index: FileIndex) -> list[str]:
    """Those of the files of a job that a worker with this index lacks, as messages name them."""
    return [
        _shown(key, sha256)
        for key, sha256 in job.file_hashes.items()
        if not index.has(parts_of(key)[0], sha256)
    ]


def _shown(key: str, sha256: str) -> str:
    kind, name = parts_of(key)
    return f'{called(kind)} "{name}" ({sha256[:AUTO_V2].upper()})'


def unknown_warnings(job: Job, index: FileIndex) -> tuple[str, ...]:
    """A sentence for each thing in a plain prompt that looks like an embedding and is none."""
    if job.prompt_syntax is not PromptSyntax.PLAIN:
        return ()
    known = embeddings_of(job)
    found = dict.fromkeys(
        name for text in (job.prompt, job.negative_prompt) for name in unknown_in(text, known)
    )
    return tuple(
        f"<{name}> in the prompt is drawn as words: there is no embedding of that name."
        f"{_did_you_mean(index, name)}"
        for name in found
    )


def _did_you_mean(index: FileIndex, name: str) -> str:
    near: Iterable[str] = index.near(Kind.EMBEDDING, name)
    shown = " or ".join(f"<{each}>" for each in near)
    return f" Did you mean {shown}?" if shown else ""
