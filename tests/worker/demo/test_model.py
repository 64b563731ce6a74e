"""The bundled weights: their size, how they load, and that they draw what prompts ask for."""

import warnings
from pathlib import Path

import pytest
from safetensors import safe_open

from worker.demo.training import classifier, evaluate, style_judge
from worker.demo.training.captions import BACKGROUNDS

DEMO = Path(evaluate.__file__).parents[1]


@pytest.fixture(scope="module")
def pipeline():
    import torch
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = StableDiffusionPipeline.from_pretrained(evaluate.MODEL)
    loaded.unet.to(memory_format=torch.channels_last)
    return loaded


def _precisions(file):
    with safe_open(file, framework="pt") as weights:
        return {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118


def test_weights_fit_into_32_megabytes_of_fp16():
    files = [*sorted(evaluate.MODEL.rglob("*.safetensors")), classifier.WEIGHTS]
    assert len(files) == 4
    assert sum(file.stat().st_size for file in files) <= 32_000_000
    for file in files:
        assert _precisions(file) <= {"F16", "I64"}, file


def test_each_lora_and_the_style_judge_fit_into_a_megabyte_or_so_of_fp16():
    loras = sorted((DEMO / "loras").iterdir())
    assert [file.name for file in loras] == ["neon.safetensors", "pixel.safetensors", "sketch.safetensors"]
    assert all(file.stat().st_size <= 1_000_000 for file in loras)
    assert style_judge.WEIGHTS.stat().st_size <= 1_400_000
    for file in (*loras, style_judge.WEIGHTS):
        assert _precisions(file) == {"F16"}, file
    assert set(DEMO.rglob("*.safetensors")) == {
        *evaluate.MODEL.rglob("*.safetensors"),
        *loras,
        classifier.WEIGHTS,
        style_judge.WEIGHTS,
    }


def test_model_card_gives_data_licences_and_limits():
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    for wanted in ("MIT", "@lobehub/fluent-emoji-3d", "emojibase-data", "## Limits", "## Figures"):
        assert wanted in card


def test_plain_load_gives_one_precision(pipeline):
    import torch

    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}


@pytest.mark.timeout(300)
def test_it_draws_what_the_prompt_asks_for(pipeline):
    words = ["rocket", "pizza", "house", "apple"]
    images = evaluate.draw(pipeline, [f"a {word}" for word in words], range(4))
    assert [classifier.recognise(image) for image in images] == words
    assert {image.size for image in images} == {(128, 128)}


@pytest.mark.timeout(300)
def test_size_and_background_words_have_their_effect(pipeline):
    prompts = ["a small apple on a blue background", "an apple on a pink background", "a big apple"]
    small, plain, big = evaluate.draw(pipeline, prompts, range(3))
    assert evaluate.extent_of(small) < evaluate.extent_of(plain) < evaluate.extent_of(big)
    assert [evaluate.background_of(image)[0] for image in (small, plain, big)] == ["blue", "pink", "white"]


def test_unknown_words_give_some_picture(pipeline):
    (image,) = evaluate.draw(pipeline, ["zorgblatt 漢字 ünknöwn 🦄"], [0], num_inference_steps=2)
    assert image.size == (128, 128)


@pytest.mark.parametrize("name", evaluate.SCHEDULERS)
def test_every_scheduler_and_size_runs(pipeline, name):
    kind, settings = evaluate.SCHEDULERS[name]
    own = pipeline.scheduler
    try:
        pipeline.scheduler = kind.from_config(own.config, **settings)
        (image,) = evaluate.draw(pipeline, ["a cat"], [0], num_inference_steps=4, width=104, height=120)
    finally:
        pipeline.scheduler = own
    assert image.size == (104, 120)


def test_contact_sheet_has_64_prompts():
    prompts = evaluate.CONTACT_SHEET.read_text(encoding="utf-8").splitlines()
    assert len(prompts) == len(set(prompts)) == 64


def test_classifier_has_a_class_for_every_scored_subject():
    from worker.demo.training.subjects import scored_words

    names = classifier.load_classifier()[1]
    assert len(scored_words()) == 200
    assert set(scored_words()) <= set(names)
    assert len(set(names)) == len(names)


def test_background_is_read_off_the_border():
    from PIL import Image

    for name, colour in BACKGROUNDS.items():
        image = Image.new("RGB", (128, 128), colour)
        image.paste((1, 200, 3), (40, 40, 80, 90))
        assert evaluate.background_of(image) == (name, 0.0)
        assert evaluate.extent_of(image) == 50
