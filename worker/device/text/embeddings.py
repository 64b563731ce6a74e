"""Textual inversion: the vectors that take the place of words in a job's texts."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from worker.contract.choices import PromptSyntax
from worker.contract.embedding_names import EmbeddingNames, Name
from worker.contract.errors import InvalidJobError, RenderError
from worker.contract.file_index import Kind
from worker.contract.job import Job
from worker.contract.job_files import embeddings_of
from worker.device.loras.text import TextLoras
from worker.model.beside import embedding_files

#: Bytes of vectors that are kept, at most.
KEPT = 64 << 20
#: Tokens from here on are not the tokenizer's: each stands for a vector of a text's embeddings.
FIRST_VECTOR = 1 << 24


class Files(Protocol):
    """Where the files are: `worker.model.beside.file_store.FileStore`."""

    def path(self, kind: Kind, sha256: str) -> Path | None:
        """Where the file with this content is; None where it is gone."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """An embedding as a job names it."""

    name: str
    sha256: str
    #: For each text encoder of the model (vectors, width) float32, on the CPU.
    vectors: tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class TextOptions:
    """How a job's texts are encoded, beside their syntax."""

    #: The layer of the text encoder that is taken, from its end; 1 is the last one.
    clip_skip: int = 1
    embeddings: tuple[Embedding, ...] = ()
    #: What the job's LoRAs change of the text encoders; None: nothing.
    loras: TextLoras | None = None

    @property
    def key(self) -> Hashable:
        """Equal for options that give equal texts."""
        loras = None if self.loras is None else self.loras.key
        return self.clip_skip, tuple((each.name, each.sha256) for each in self.embeddings), loras

    @functools.cached_property
    def _places(self) -> Mapping[str, range]:
        """The tokens that stand for the vectors of each embedding."""
        places, start = {}, FIRST_VECTOR
        for each in self.embeddings:
            places[each.name] = range(start, start + len(each.vectors[0]))
            start = places[each.name].stop
        return places

    @functools.cached_property
    def _names(self) -> EmbeddingNames:
        return EmbeddingNames(self._places)

    def split(self, text: str, syntax: PromptSyntax) -> list[str | range]:
        """A text with the embeddings in it taken out: for each the tokens that stand for its vectors."""
        if not self.embeddings:
            return [text]
        parts = self._names.split(text, syntax)
        return [self._places[part.name] if isinstance(part, Name) else part for part in parts]

    def table(self, encoder: int) -> torch.Tensor | None:
        """All vectors for a text encoder, in the order of their tokens: (vectors, width)."""
        return torch.cat([each.vectors[encoder] for each in self.embeddings]) if self.embeddings else None


#: Those of most jobs.
NO_OPTIONS = TextOptions()


class EmbeddingRoom(NamedTuple):
    """What the embeddings of a model must be like."""

    #: Numbers in a vector, for each text encoder; none: the model takes no embeddings.
    widths: tuple[int, ...]
    #: Vectors, at most: so many fit into a text encoder's window.
    vectors: int


class Embeddings:
    """Loads the embeddings of jobs, and keeps those that were used last. Thread-safe."""

    def __init__(self, files: Files | None, room: EmbeddingRoom) -> None:
        self._files, self._room = files, room
        self._kept: OrderedDict[str, tuple[torch.Tensor, ...]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def of(self, job: Job) -> tuple[Embedding, ...]:
        """The embeddings of a job.

        Raises `InvalidJobError` for one that the model cannot take, and `RenderError` for one that is gone.
        """
        return tuple(
            Embedding(name, sha256, self._vectors(name, sha256))
            for name, sha256 in embeddings_of(job).items()
        )

    def _vectors(self, name: str, sha256: str) -> tuple[torch.Tensor, ...]:
        with self._lock:
            if (known := self._kept.get(sha256)) is not None:
                self._kept.move_to_end(sha256)
                return known
        path = self._files.path(Kind.EMBEDDING, sha256) if self._files else None
        if path is None:
            raise RenderError(f'The embedding "{name}" was taken away while a job asked for it.')
        vectors = embedding_files.load(path, name, sha256)
        self._check(name, vectors)
        with self._lock:
            if sha256 not in self._kept:
                self._kept[sha256] = vectors
                self._bytes += _bytes(vectors)
            while self._bytes > KEPT and len(self._kept) > 1:
                self._bytes -= _bytes(self._kept.popitem(last=False)[1])
        return vectors

    def _check(self, name: str, vectors: Sequence[torch.Tensor]) -> None:
        """Raise `InvalidJobError` for an embedding that the model cannot take."""
        widths = tuple(each.shape[-1] for each in vectors)
        if widths != self._room.widths:
            fits, takes = (embedding_files.architecture(each) for each in (widths, self._room.widths))
            raise InvalidJobError(
                f'The embedding "{name}" is for {fits}, this model takes those for {takes}: use another one, '
                "or take it out of the prompt."
            )
        if (count := len(vectors[0])) > self._room.vectors:
            raise InvalidJobError(
                f'The embedding "{name}" has {count} vectors, this model\'s text encoder takes '
                f"{self._room.vectors} at most."
            )


def _bytes(vectors: Sequence[torch.Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in vectors)
