"""The bundled LoRAs: their files, how they are made, and mixed batches of them, judged."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open

from tests import tiny_models
from worker.contract.file_index import Kind
from worker.contract.job import Job
from worker.contract.job_files import with_files
from worker.contract.settings import WorkerSettings
from worker.demo.training import loras, score_loras
from worker.demo.training.style_judge import NAMES, NONE, StyleJudge
from worker.demo.training.styles import CELL, LEVELS, STYLES
from worker.demo.training.subjects import scored_words
from worker.device.model_runner import ModelRunner
from worker.engine.engine import Engine
from worker.model.beside.file_store import FileStore


def _no_bucket(name: str) -> None:
    raise AssertionError(name)


def offered(tmp_path: Path, **settings: str) -> FileStore:
    return FileStore.of(WorkerSettings(cache_dir=str(tmp_path / "cache"), **settings), _no_bucket)


def test_a_worker_of_the_bundled_model_offers_its_styles_beside_those_that_are_named(tmp_path: Path) -> None:
    bundled = offered(tmp_path).index.files
    assert {entry.name for entry in bundled} == set(STYLES)
    assert {(entry.kind, entry.problem) for entry in bundled} == {(Kind.LORA, "")}
    assert not offered(tmp_path, model="owner/model").index.files
    (tmp_path / "mine").mkdir()
    mine = str(tmp_path / "mine")
    assert offered(tmp_path, loras=mine).index.files == bundled
    for name in ("detail", "pixel"):  # The second one takes the place of the bundled one.
        shutil.copy(score_loras.LORAS / "neon.safetensors", tmp_path / "mine" / f"{name}.safetensors")
    found = {entry.name: entry for entry in offered(tmp_path, loras=mine).index.files}
    assert set(found) == {*STYLES, "detail"}
    assert not any(entry.problem for entry in found.values())
    assert found["pixel"].sha256 == found["detail"].sha256 == found["neon"].sha256
    (tmp_path / "mine" / "pixel.safetensors").write_bytes(b"")
    assert {entry.name for entry in offered(tmp_path, loras=mine).index.files if entry.problem} == {"pixel"}
    assert {entry.name for entry in offered(tmp_path, model="owner/model", loras=mine).index.files} == {
        "detail",
        "pixel",
    }
    named = offered(tmp_path, loras=str(score_loras.LORAS)).index.files
    assert named == bundled


@pytest.mark.parametrize("name", STYLES)
def test_each_says_its_licence_and_what_it_does(name: str) -> None:
    with safe_open(score_loras.LORAS / f"{name}.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["modelspec.title"], metadata["modelspec.license"]) == (name, "MIT")
    assert metadata["modelspec.description"]


def test_filters_give_what_they_promise() -> None:
    pictures = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    styled = {name: style(pictures) for name, style in STYLES.items()}
    for name, style in STYLES.items():
        assert styled[name].shape == pictures.shape
        assert styled[name].abs().max() <= 1
        assert torch.equal(style(pictures), styled[name])
    squares = styled["pixel"].unfold(2, CELL, CELL).unfold(3, CELL, CELL).flatten(4)
    assert (squares.amax(-1) == squares.amin(-1)).all()
    assert len(styled["pixel"].unique()) <= LEVELS
    assert torch.equal(styled["sketch"][:, 0], styled["sketch"][:, 2])
    plain = torch.full((1, 3, 32, 32), 0.5)
    assert (STYLES["sketch"](plain) > 0.99).all()
    assert (STYLES["neon"](plain) < -0.9).all()


def test_the_recipe_makes_a_file_that_is_read_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_models.tiny_sd1(tmp_path / "model"), subfolder="unet")
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    recipe = loras.LoraRecipe(rank=2, steps=2, batch=2)
    data = loras.Examples(torch.randn(3, 4, 8, 8), torch.randn(3, 77, unet.config.cross_attention_dim))
    tensors = loras.train_lora(unet, data, recipe, "pixel")
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    (tmp_path / "loras").mkdir()
    loras.save_lora(tensors, "pixel", tmp_path / "loras" / "pixel.safetensors")
    (entry,) = offered(tmp_path, model="owner/model", loras=str(tmp_path / "loras")).index.files
    assert (entry.name, entry.problem) == ("pixel", "")


class Mixed:
    """Jobs of all styles by turns, drawn together by one engine with the bundled model."""

    def __init__(self, folder: Path) -> None:
        settings = WorkerSettings(cache_dir=str(folder), max_batch=16)
        self._files = FileStore.of(settings, _no_bucket)
        self._runner = ModelRunner(settings, files=self._files)
        self._judge = StyleJudge()
        #: Rows of each step.
        self.rows: list[int] = []

    def judged(self, words: Sequence[str], **fields: float) -> list[tuple[str, str]]:
        """Style and subject of each picture, by the judge. The styles take turns, in the order of `NAMES`."""
        jobs = [
            Job(prompt=f"a {word}", seed=seed, loras=[] if style == NONE else [{"name": style}], **fields)
            for seed, (word, style) in enumerate(zip(words, itertools.cycle(NAMES), strict=False))
        ]
        jobs = [with_files(job.resolved(self._runner.served), self._files.index) for job in jobs]
        engine = Engine(
            self._runner,
            job_timeout_s=1_000,
            on_failure=lambda error: None,
            on_step=lambda rows, seconds: self.rows.append(rows),
        )
        futures = [engine.submit(str(number), job) for number, job in enumerate(jobs)]
        engine.start()
        try:
            return self._judge.judge(
                [Image.fromarray(future.result(600).picture.pixels) for future in futures]
            )
        finally:
            engine.stop()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    return Mixed(tmp_path_factory.mktemp("mixed"))


def test_jobs_of_all_styles_share_steps_and_each_has_its_own(mixed: Mixed) -> None:
    words = ["rocket", "house", "apple", "robot", "pizza", "car", "heart", "banana"]
    found = mixed.judged(words, steps=8, guidance_scale=1.0)
    assert mixed.rows == [8] * 8
    assert [style for style, _ in found] == [*NAMES, *NAMES]
    assert sum(subject == word for (_, subject), word in zip(found, words, strict=True)) >= 6


@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_61_of_64_mixed_jobs_are_judged_to_be_in_their_own_style(mixed: Mixed) -> None:
    words = scored_words()[:64]
    found = mixed.judged(words)
    own = sum(style == wanted for (style, _), wanted in zip(found, itertools.cycle(NAMES), strict=False))
    subjects = sum(subject == word for (_, subject), word in zip(found, words, strict=True))
    print(f"{own} of 64 in their own style, {subjects} of 64 of their subject")
    assert own >= 61
    assert subjects >= 55
