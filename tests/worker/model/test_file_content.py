"""A file that jobs name is read once, and is what its hash says or an error of the job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from worker.contract.errors import InvalidJobError, RenderError
from worker.model.beside import file_content
from worker.model.beside.file_content import Content

MOST = 20


def config_of(path: Path) -> str | None:
    return file_content.text_beside(path, "config.json", MOST)


def read(path: Path, sha256: str) -> Content:
    return file_content.read(path, 'The VAE "x"', sha256, most=MOST, config_of=config_of)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"weights")
    path.with_name("config.json").write_text("{}")
    return path


def test_what_the_hash_says_is_read_with_its_config(file: Path) -> None:
    assert read(file, file_content.sha256_of(file, config_of)) == Content(b"weights", "{}")
    file.with_name("config.json").unlink()
    assert read(file, file_content.sha256_of(file)) == Content(b"weights", None)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda file, config: file.write_bytes(b"others"), RenderError, "was replaced while a job asked"),
        (lambda file, config: config.write_text("[]"), RenderError, "was replaced while a job asked"),
        (lambda file, config: config.unlink(), RenderError, "was replaced while a job asked"),
        (lambda file, config: file.unlink(), RenderError, "cannot be read"),
        (lambda file, config: file.write_bytes(bytes(21)), InvalidJobError, "21 bytes, the limit is 20"),
        (lambda file, config: config.write_text(" " * 21), InvalidJobError, "has more than 20 bytes"),
        (lambda file, config: config.write_bytes(b"\xff"), InvalidJobError, "is no UTF-8"),
    ],
    ids=["other weights", "another config", "no config", "gone", "large", "large config", "no text"],
)
def test_what_it_says_no_longer_fails_the_job(
    file: Path, change: Callable[[Path, Path], object], error: type[Exception], says: str
) -> None:
    sha256 = file_content.sha256_of(file, config_of)
    change(file, file.with_name("config.json"))
    with pytest.raises(error, match=f'The VAE "x" .*{says}'):
        read(file, sha256)
