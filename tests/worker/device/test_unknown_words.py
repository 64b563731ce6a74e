"""The bundled model's tokenizer tells the words that the model was trained on."""

from __future__ import annotations

import pytest

from worker.demo.training.subjects import COMMON_FILE
from worker.device.text.encoder import unknown_words_warning

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return transformers.CLIPTokenizer.from_pretrained(COMMON_FILE.parents[1] / "model" / "tokenizer")


def test_words_that_the_bundled_model_does_not_know_are_named(tokenizer: object) -> None:
    assert unknown_words_warning(tokenizer, "A rocket, two dogs and a robot on a blue background 3") == ()
    [warning] = unknown_words_warning(tokenizer, "a portrait of Einstein with a cat")
    assert warning.startswith(
        "The bundled model does not know: portrait, einstein. It draws what has an emoji"
    )
