"""The files that a worker offers beside its model, by name and content: jobs ask for them by both.

A worker makes the index of its files, and announces its digest. The index itself lies in Redis once for all
workers that have the same files. Producers look a name up in it and put the file's SHA-256 into the job, so
that a file that is replaced is another picture.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from worker.contract.embedding_names import EmbeddingNames
from worker.contract.job_checks import NO_VAE
from worker.contract.loras import SUFFIX
from worker.contract.spelling import Names

#: Characters of a file's name, at most, and what it may not have: marks of prompts and of infotexts.
MAX_NAME, MARKS = 100, '<>:,"/\\|[](){}'
#: What the name of a LoRA may not have: it stands in a tag, in which brackets are letters.
LORA_MARKS = '<>:,"/\\|'
#: Digits of a SHA-256 that Civitai's AutoV2 has.
AUTO_V2 = 10
#: Digits of a SHA-256 by which a file is found, beside all 64: Civitai's, and the web UI's own.
_SHORT = (AUTO_V2, 12)
#: Files of all kinds in one index, at most.
MAX_FILES = 10_000


class Kind(StrEnum):
    """What a file is for."""

    #: Textual inversion: vectors that take the place of a word.
    EMBEDDING = "embedding"
    #: What turns latents into pixels.
    VAE = "vae"
    #: What is added to a model's weights.
    LORA = "lora"

    @property
    def setting(self) -> str:
        """The setting of workers that says where such files are."""
        return f"SMALLCAT_{self.upper()}S"


_CALLED: Mapping[str, str] = {Kind.VAE: "VAE", Kind.LORA: "LoRA"}


class FileEntry(BaseModel):
    """A file in an index."""

    # A worker of a newer version may announce more.
    model_config = ConfigDict(frozen=True, extra="ignore")

    #: One of `Kind`; a newer version may have others.
    kind: str
    #: What jobs call it.
    name: str
    #: Of its content, 64 hexadecimal digits; empty where it could not be read.
    sha256: str = ""
    #: What it fits, such as "SD 1.x"; empty where that is not known.
    architecture: str = ""
    #: Bytes.
    size: int = 0
    #: Why it cannot be used, and what to do; empty where it can.
    problem: str = ""
    #: 12 digits of the SHA-256 over all behind the header of a LoRA's file, by which the web UI and Civitai
    #: (as AutoV3) know it whatever its metadata; empty where that is not known.
    auto_v3: str = ""

    @property
    def auto_v2(self) -> str:
        """The hash by which Civitai knows it."""
        return self.sha256[:AUTO_V2].upper()


class FileIndex(BaseModel):
    """All files that a worker offers. Each kind has a name once."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    files: tuple[FileEntry, ...] = ()

    @classmethod
    def of(cls, entries: Iterable[FileEntry]) -> FileIndex:
        """The index of `entries`, in an order that depends on nothing else."""
        return cls(files=tuple(sorted(entries, key=lambda each: (each.kind, each.name, each.sha256))))

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits over all of it; empty for an index without files.

        But for what came later: older producers compute it without that.
        """
        said = self.model_dump_json(exclude={"files": {"__all__": {"auto_v3"}}})
        return hashlib.sha256(said.encode()).hexdigest()[:16] if self.files else ""

    @functools.cached_property
    def text(self) -> str:
        """All of it as JSON."""
        return self.model_dump_json()

    @functools.cached_property
    def _by_name(self) -> Mapping[tuple[str, str], FileEntry]:
        composed = {(each.kind, composed_name(each.name)): each for each in self.files}
        return composed | {(each.kind, each.name): each for each in self.files}

    def find(self, kind: Kind, name: str) -> FileEntry | None:
        """The file of that name, in whatever form of Unicode; None where there is none."""
        return self._by_name.get((kind, name)) or self._by_name.get((kind, composed_name(name)))

    @functools.cached_property
    def _by_hash(self) -> Mapping[tuple[str, str], list[FileEntry]]:
        found: dict[tuple[str, str], list[FileEntry]] = defaultdict(list)
        for each in self.files:
            for digits in {each.sha256, each.auto_v3, *(each.sha256[:count] for count in _SHORT)} - {""}:
                found[each.kind, digits].append(each)
        return dict(found)

    def find_any(self, kind: Kind, name: str) -> list[FileEntry]:
        """The file of that name, SHA-256 (in full, or its first 10 or 12 digits) or AutoV3.

        For `name@hash` it is the file of that hash, and of several of that hash the one of that name. Where
        neither the name nor the hash says which one it is, there is one entry for each content: files with
        one AutoV3 may be different ones, such as by their alpha, which PEFT keeps in the header.
        """
        if (named := self.find(kind, name)) is not None:
            return [named]
        own, _, digits = name.rpartition("@")
        fitting = self._by_hash.get((kind, digits.lower()), [])
        usable = [each for each in fitting if not each.problem]
        if of_name := [each for each in usable or fitting if composed_name(each.name) == composed_name(own)]:
            return of_name[:1]
        # Backwards: of two names of one content the first one stays.
        by_content = {each.sha256: each for each in reversed(usable)}
        return [by_content[sha256] for sha256 in sorted(by_content)]

    @functools.cached_property
    def _contents(self) -> frozenset[tuple[str, str]]:
        return frozenset((each.kind, each.sha256) for each in self.files if not each.problem)

    def of_content(self, kind: str, sha256: str) -> FileEntry | None:
        """A file of that kind with this content, under whatever name; None where there is none."""
        return next(iter(self._by_hash.get((kind, sha256), ())), None)

    def has(self, kind: str, sha256: str) -> bool:
        """Whether it has a file of that kind with this content, under whatever name."""
        return (kind, sha256) in self._contents

    def names(self, kind: Kind) -> list[str]:
        """The names of all files of a kind, of those too that cannot be used."""
        return [each.name for each in self.files if each.kind == kind]

    @functools.cached_property
    def embedding_names(self) -> EmbeddingNames:
        """Those that prompts may have."""
        return EmbeddingNames(self.names(Kind.EMBEDDING))

    @functools.cached_property
    def _spellings(self) -> Mapping[str, Names]:
        return {kind: Names(self.names(kind)) for kind in Kind}

    def near(self, kind: Kind, name: str) -> list[str]:
        """Names of that kind that look like `name`, three at most."""
        return self._spellings[kind].near(name)


#: The index of a worker that offers nothing.
NO_FILES = FileIndex()


def composed_name(name: str) -> str:
    """A name in Unicode's composed form, NFC: macOS may store an accent apart from its letter."""
    return unicodedata.normalize("NFC", name)


def name_problem(name: str, kind: str = Kind.EMBEDDING) -> str:
    """Why jobs cannot use a file of that kind by this name; empty where they can."""
    marks = LORA_MARKS if kind == Kind.LORA else MARKS
    if not name.strip() or len(name) > MAX_NAME:
        return f"its name has {len(name)} characters: rename it, to 1 to {MAX_NAME}"
    # In a job's fields these are left out, and the words say that it asks for no VAE.
    if kind == Kind.VAE and name.lower() in NO_VAE:
        return "its name says that there is none: rename it"
    if name != name.strip() or name.endswith(SUFFIX):
        return f'its name begins or ends with a blank, or has "{SUFFIX}" twice: rename it'
    if not name.isprintable() or (found := next((each for each in name if each in marks), "")):
        shown = f'"{found}"' if name.isprintable() else "an unprintable character"
        return f"its name has {shown}, which means something else in a prompt: rename it"
    return ""


def called(kind: str) -> str:
    """A kind as messages call it."""
    return _CALLED.get(kind, kind)


def with_hash(name: str, digits: str) -> str:
    """A name for a file of that hash alone, as `FileIndex.find_any` reads it; the name where it is none."""
    return f"{name}@{digits.lower()}" if re.fullmatch(r"[0-9a-fA-F]{8,64}", digits) else name


def key_of(kind: str, name: str) -> str:
    """A file in a job's `file_hashes`: `embedding:easynegative`."""
    return f"{kind}:{name}"


def parts_of(key: str) -> tuple[str, str]:
    """Kind and name of a key."""
    kind, _, name = key.partition(":")
    return kind, name
