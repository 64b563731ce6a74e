"""The kinds of files that jobs name, a line each: how a file of it is described, hashed and bounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import MappingProxyType

from worker.contract.file_index import Kind
from worker.model.beside import (
    embedding_files,
    file_content,
    lora_files,
    lora_header,
    lora_scales,
    vae_files,
)


@dataclass(frozen=True)
class FileKind:
    """What is to be known of the files of one kind."""

    #: What a file fits, and why it cannot be used; empty where it can.
    describe: Callable[[Path], tuple[str, str]]
    #: The SHA-256 of its content: of the file, or of that and its config. Raises `OSError`.
    sha256_of: Callable[[Path], str]
    #: Bytes of a file, at most.
    most: int
    #: The name of the config beside a file, by that of the file; empty for one that has none.
    config_name: Callable[[PurePath], str] = lambda path: ""
    #: Bytes of a config, at most.
    most_config: int = 0


KINDS: Mapping[Kind, FileKind] = MappingProxyType(
    {
        Kind.EMBEDDING: FileKind(embedding_files.describe, file_content.sha256_of, embedding_files.MAX_BYTES),
        Kind.VAE: FileKind(
            vae_files.describe,
            vae_files.sha256_of,
            vae_files.MAX_BYTES,
            vae_files.config_name,
            vae_files.MAX_CONFIG,
        ),
        Kind.LORA: FileKind(
            lora_files.describe,
            lora_files.sha256_of,
            lora_header.MAX_BYTES,
            lora_scales.config_name,
            lora_scales.MAX_CONFIG,
        ),
    }
)
