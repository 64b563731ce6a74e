"""Textual inversion: pictures are diffusers' own with `load_textual_inversion`, and the web UI's by its rule.

diffusers 0.42.1; AUTOMATIC1111's version 1.10.1 by tests/a1111_oracle.py.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests import a1111_oracle, tiny_models
from tests.worker.device.beside_diffusers import BesideDiffusers, assert_drawn
from tests.worker.device.test_a1111_text import model
from worker.contract import a1111_syntax
from worker.contract.choices import PromptSyntax
from worker.contract.embedding_names import EmbeddingNames, Name
from worker.contract.errors import InvalidJobError, RenderError
from worker.contract.file_index import Kind
from worker.contract.job import Job
from worker.contract.job_files import with_files
from worker.contract.settings import WorkerSettings
from worker.device.model_runner import ModelRunner
from worker.device.text.clip import ClipTexts, encoders_of
from worker.device.text.embeddings import Embedding, TextOptions
from worker.engine.runner import Picture
from worker.model.beside.file_store import FileStore

CLIP = Path(__file__).parents[3] / "worker" / "model" / "configs" / "clip"
#: Vectors of each embedding.
SIZES = {"one": 1, "three": 3, "many-v2": 40}


def vectors(name: str, width: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + len(name))
    return torch.randn((SIZES[name], width), generator=generator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three layouts that are shared, and one for two text encoders."""
    folder = tmp_path_factory.mktemp("embeddings")
    save_file({"emb_params": vectors("one")[0]}, folder / "one.safetensors")
    (folder / "three").mkdir()
    save_file({"<three>": vectors("three")}, folder / "three" / "learned_embeds.safetensors")
    save_file({"emb_params": vectors("many-v2").half()}, folder / "many-v2.safetensors")
    return folder


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embeddings")
    for name in SIZES:
        both = {"clip_l": vectors(name), "clip_g": vectors(name, seed=50)}
        save_file(both, folder / f"{name}.safetensors")
    return folder


class Model(BesideDiffusers):
    """A tiny model behind a runner that offers embeddings, and diffusers' pipeline that has loaded them."""

    def __init__(self, path: Path, folder: Path, cache: Path) -> None:
        super().__init__(path, FileStore({Kind.EMBEDDING: [str(folder)]}, cache))
        is_xl = hasattr(self.pipeline, "text_encoder_2")
        for name in SIZES:
            tensor = vectors(name).half().float() if name == "many-v2" and not is_xl else vectors(name)
            self.pipeline.load_textual_inversion({name: tensor}, token=f"<{name}>")
            if is_xl:
                self.pipeline.load_textual_inversion(
                    {name: vectors(name, seed=50)},
                    token=f"<{name}>",
                    tokenizer=self.pipeline.tokenizer_2,
                    text_encoder=self.pipeline.text_encoder_2,
                )

    def job(self, prompt: str, negative: str = "", **fields: Any) -> Job:
        return self.job_of(prompt=prompt, negative_prompt=negative, **fields)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Model:
    place = tmp_path_factory.mktemp("models")
    return Model(tiny_models.tiny_sd1(place / "sd1"), folder, place)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory, xl_folder: Path) -> Model:
    place = tmp_path_factory.mktemp("models")
    return Model(tiny_models.tiny_sdxl(place / "sdxl"), xl_folder, place)


PLAIN = (
    ("a <one> cat", ""),
    ("a<three>cat, <one>", "<many-v2>"),
    ("<many-v2>", "fog, <three>"),
    ("<many-v2> <many-v2>, which is more than the window has room for", ""),
    ("a cat without", "dogs"),
)


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_plain_pictures_are_diffusers_own_in_one_batch(model: str, request: pytest.FixtureRequest) -> None:
    tiny: Model = request.getfixturevalue(model)
    jobs = [tiny.job(*texts, seed=number) for number, texts in enumerate(PLAIN)]
    assert [len(job.file_hashes) for job in jobs] == [1, 3, 2, 1, 0]
    for job, picture in zip(jobs, tiny.together(jobs), strict=True):
        assert_drawn(picture, tiny.expected(job), job)
    [cut] = tiny.runner.prepare(jobs[3]).warnings
    assert cut.startswith("The prompt was cut after 77 tokens; left out:")


def test_an_embedding_that_is_not_used_changes_no_picture(sd1: Model) -> None:
    """The vectors are in the first layer while their own text is encoded, and at no other time."""
    plain = Job(prompt="a cat", seed=1, steps=3)
    before = sd1.together([plain])[0]
    sd1.together([sd1.job("a <three> cat")])
    runner = ModelRunner(WorkerSettings(model=str(sd1.pipeline.config._name_or_path)))
    state = runner.prepare(plain)
    while state.step < state.steps:
        runner.step([state])
    again = next(runner.decode([state]))
    assert isinstance(before, Picture)
    assert isinstance(again, Picture)
    assert np.array_equal(before.pixels, again.pixels)


# --- as the web UI reads them -------------------------------------------------------------------------------


#: With CLIP's own vocabulary: names of several words, of one that begins another one, and in other cases.
NAMES = {"EasyNegative": 8, "ng_deepnegative_v1_75t": 75, "cat": 1, "cat dog": 2, "bad-hands-5": 3, "été": 2}
TEXTS = (
    "easynegative",
    "a (EASYNEGATIVE:1.3), [cat], CAT DOG, cat, dog",
    "cats and a category of cat-dog, cat  dog",
    "bad-hands-5, bad-hands-55, bad hands 5, (bad-hands-5)",
    "a red ball, ng_deepnegative_v1_75t, fog",
    "word " * 70 + "EasyNegative and more",
    "word " * 60 + "a, b c EasyNegative d e f g h i j k l m n o p",
    "cat BREAK cat dog BREAK",
    "ÉTÉ cat(dog:1.2) cat dog",
    "",
)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_texts_with_names_are_the_web_uis(kind: str) -> None:
    tokenizers = [
        CLIPTokenizer.from_pretrained(CLIP, model_max_length=77, pad_token=pad)
        for pad in ("<|endoftext|>", "!")
    ]
    models = [model(CLIPTextModel, 1), model(CLIPTextModelWithProjection, 2)]
    is_xl = kind == "sdxl"
    pipeline = SimpleNamespace(
        tokenizer=tokenizers[0],
        text_encoder=models[0],
        tokenizer_2=tokenizers[1],
        text_encoder_2=models[1] if is_xl else None,
    )
    generator = torch.Generator().manual_seed(1)
    count = 2 if is_xl else 1
    tables = {
        name: tuple(torch.randn((size, 16), generator=generator) for _ in range(count))
        for name, size in NAMES.items()
    }
    options = TextOptions(1, tuple(Embedding(name, name, tables[name]) for name in NAMES))
    product = ClipTexts(tuple(encoders_of(pipeline)))
    oracle = [
        a1111_oracle.Encoder(
            tokenizers[number],
            models[number],
            is_xl,
            embeddings={name: tables[name][number] for name in NAMES},
        )
        for number in range(count)
    ]
    lengths = set()
    for text in TEXTS:
        hidden, pooled = product.encode([a1111_syntax.pieces(text)], [1], options)
        expected, expected_pooled = a1111_oracle.encoded(oracle, [text])
        assert hidden.shape == expected.shape, text
        assert torch.allclose(hidden, expected, rtol=1e-3, atol=1e-3), text
        if is_xl:
            assert pooled is not None
            assert torch.allclose(pooled, expected_pooled, atol=1e-4), text  # type: ignore[arg-type]
        lengths.add(hidden.shape[1])
    assert lengths == {77, 154, 231}


def test_words_part_where_clips_tokens_do() -> None:
    """So a name is found among words as the web UI finds it among tokens: over all pairs of these texts."""
    tokenizer = CLIPTokenizer.from_pretrained(CLIP, model_max_length=77)

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    names = list(NAMES)
    by_token = a1111_oracle.Names(tokenizer, {name: torch.zeros(1, 1) for name in names})
    by_word = EmbeddingNames(names)
    parts = [
        "cat",
        " dog",
        "5",
        "-hands-",
        "bad",
        "'s",
        "été",
        "_v1_75t",
        "ng_deepnegative",
        ", ",
        "  ",
        "(",
        "é",
    ]
    for text in map("".join, itertools.product(parts, repeat=3)):
        found = [each.name for each in by_word.split(text, PromptSyntax.A1111) if isinstance(each, Name)]
        expected = [each for each in by_token.found(tokens(text)) if isinstance(each, str)]
        # The web UI also finds the end of a longer word, where a token begins there.
        if found != expected:
            assert len(expected) > len(found), text
            assert any(re.search(rf"\w{re.escape(name)}", text) for name in names), text


# --- what cannot be done ------------------------------------------------------------------------------------


def test_an_embedding_of_another_model_fails_its_own_job(sd1: Model, xl_folder: Path, tmp_path: Path) -> None:
    files = FileStore({Kind.EMBEDDING: [str(xl_folder)]}, tmp_path)
    runner = ModelRunner(WorkerSettings(model=str(sd1.pipeline.config._name_or_path)), files=files)
    job = with_files(Job(prompt="a <one>", seed=1).resolved(runner.served), files.index)
    with pytest.raises(
        InvalidJobError, match="is for a text encoder 32 and 32 wide, this model takes those for"
    ):
        runner.prepare(job)
    save_file({"x": torch.full((1, 32), float("nan"))}, xl_folder / "nan.safetensors")
    files.look()
    with pytest.raises(InvalidJobError, match="holds NaN or infinity"):
        runner.prepare(with_files(job.model_copy(update={"prompt": "<nan>"}), files.index))
    (xl_folder / "nan.safetensors").unlink()


def test_a_file_that_was_replaced_is_not_drawn_for_a_job_that_asked_for_the_old_one(
    sd1: Model, tmp_path: Path
) -> None:
    place = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(1, 32)}, place)
    files = FileStore({Kind.EMBEDDING: [str(tmp_path)]}, tmp_path)
    runner = ModelRunner(WorkerSettings(model=str(sd1.pipeline.config._name_or_path)), files=files)
    job = with_files(Job(prompt="a <x>", seed=1).resolved(runner.served), files.index)
    assert job.file_hashes == {"embedding:x": hashlib.sha256(place.read_bytes()).hexdigest()}
    save_file({"x": torch.ones(1, 32)}, place)
    with pytest.raises(RenderError, match="was replaced while a job asked for it"):
        runner.prepare(job)
    files.look()
    assert with_files(job.model_copy(update={"file_hashes": {}}), files.index).id != job.id
    with pytest.raises(RenderError, match="was taken away"):
        runner.prepare(job)
