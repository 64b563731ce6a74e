"""AUTOMATIC1111's syntax from text to tensors, against an oracle of its rules, over 2,000 prompts."""

from __future__ import annotations

import functools
import importlib
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests import a1111_oracle, a1111_prompts
from worker.contract import a1111_syntax
from worker.contract.job import Job
from worker.device.text.clip import ClipEncoder, ClipTexts, chunks_of, encoders_of
from worker.device.text.embeddings import EmbeddingRoom, TextOptions
from worker.device.text.encoder import TextEncoder
from worker.device.text.job_text import TEXT_BIAS, JobText, Timed, batched

CONFIGS = Path(__file__).parents[3] / "worker" / "model" / "configs" / "clip"
COUNT, STEPS = 2_000, 4
#: The token of a comma in CLIP's vocabulary.
COMMA = 267


@functools.cache
def tokenizer(pad: str = "<|endoftext|>") -> Any:
    """CLIP's own, of 49,408 tokens."""
    return CLIPTokenizer.from_pretrained(CONFIGS, model_max_length=77, pad_token=pad)


@functools.cache
def model(kind: Any, seed: int) -> Any:
    """A small encoder with random weights, whose last norm has a mean, as real ones have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = kind(
            CLIPTextConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                projection_dim=12,
                bos_token_id=49_406,
                eos_token_id=49_407,
                pad_token_id=49_407,
            )
        )
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, mean=0.3)
    return made.eval().requires_grad_(False)


def encoders(kind: str) -> list[tuple[Any, Any, bool]]:
    """(tokenizer, model, whether its last layer is left out) of each encoder of a kind of model."""
    if kind == "sd1":
        return [(tokenizer(), model(CLIPTextModel, 1), False)]
    second = (tokenizer("!"), model(CLIPTextModelWithProjection, 2), True)
    return [(tokenizer(), model(CLIPTextModel, 1), True), second]


# --- 2,000 prompts ------------------------------------------------------------------------------------------


@functools.cache
def schedules() -> dict[str, list[tuple[int, str]]]:
    return {text: a1111_oracle.schedule(text, STEPS) for text in a1111_prompts.prompts(COUNT)}


def test_the_texts_of_2000_prompts_by_step_are_the_oracles() -> None:
    changing = 0
    for text, expected in schedules().items():
        assert a1111_syntax.schedule(text, STEPS) == expected, text
        changing += len(expected) > 1
    assert changing > COUNT // 5


def test_the_tokens_chunks_and_weights_of_2000_prompts_are_the_oracles() -> None:
    lengths, weights = set(), set()
    encoder = ClipEncoder(tokenizer(), None)
    for text in {text for schedule in schedules().values() for _, text in (schedule[0], schedule[-1])}:
        found = encoder.chunks(a1111_syntax.pieces(text))
        expected = a1111_oracle.chunks(a1111_oracle.weighted(text), tokenizer())
        assert [each.tokens for each in found] == [[token for token, _ in each] for each in expected], text
        for mine, others in zip(found, expected, strict=True):
            assert mine.weights == pytest.approx([weight for _, weight in others], abs=1e-6), text
            weights |= {round(weight, 3) for weight in mine.weights}
        lengths.add(len(found))
    assert lengths >= {1, 2, 3, 4}
    assert len(weights) > 50


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("every", [pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(600)]), 20])
def test_the_conditions_of_2000_prompts_are_the_oracles(kind: str, every: int) -> None:
    product = ClipTexts([ClipEncoder(*each) for each in encoders(kind)])
    oracle = [a1111_oracle.Encoder(*each) for each in encoders(kind)]
    for schedule in itertools.islice(schedules().values(), None, None, every):
        texts = [text for _, text in schedule]
        different = list(dict.fromkeys(texts))
        hidden, pooled = product.encode(
            [a1111_syntax.pieces(text) for text in different], [texts.count(text) for text in different]
        )
        expected, expected_pooled = a1111_oracle.encoded(oracle, texts)
        places = [texts.index(text) for text in different]
        assert torch.allclose(hidden, expected[places], rtol=1e-3, atol=1e-3), schedule
        assert (pooled is None) == (expected_pooled is None) == (kind == "sd1")
        if pooled is not None and expected_pooled is not None:
            assert torch.allclose(pooled, expected_pooled[places], atol=1e-4), schedule


# --- rules of their own -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("commas", "cut"),
    [
        ([70], 71),  # What follows a near comma goes to the next chunk, the comma does not.
        ([55], 56),
        ([54], 75),  # More than 20 tokens before the end.
        ([60, 72], 73),
        ([74], 75),
        ([75], 75),  # A comma that does not fit follows no other.
        ([70, 75], 75),
        ([], 75),
    ],
)
def test_a_chunk_ends_at_a_comma_that_is_near(commas: list[int], cut: int) -> None:
    tokens = [COMMA if place in commas else 1_000 + place for place in range(100)]
    first, second = chunks_of([(tokens, 1.0)], 75, COMMA)
    assert (first.tokens, second.tokens) == (tokens[:cut], tokens[cut:])
    assert len(first.weights) == cut


def test_break_ends_a_chunk_even_an_empty_one_but_adds_none_at_the_end() -> None:
    pieces = [([1], 1.0), (None, -1.0), (None, -1.0), ([2], 1.0), (None, -1.0)]
    assert [each.tokens for each in chunks_of(pieces, 75, COMMA)] == [[1], [], [2]]
    assert [each.tokens for each in chunks_of([([], 1.0)], 75, COMMA)] == [[]]


def test_an_unweighted_text_that_fits_is_what_the_encoder_itself_gives() -> None:
    """So a short prompt without syntax is the same picture in both syntaxes."""
    own, clip = model(CLIPTextModel, 1), ClipTexts([ClipEncoder(tokenizer(), model(CLIPTextModel, 1))])
    for text in ("a small cat", "", "a cat, a dog"):
        ids = tokenizer()(text, padding="max_length", return_tensors="pt").input_ids
        hidden, _ = clip.encode([a1111_syntax.pieces(text)], [1])
        assert torch.equal(hidden, own(ids).last_hidden_state)


def test_the_bundled_models_window_is_cut_by_its_own_length() -> None:
    short = CLIPTokenizer.from_pretrained(CONFIGS, model_max_length=32)
    found = ClipEncoder(short, None).chunks(a1111_syntax.pieces("word " * 40))
    assert [len(each.tokens) for each in found] == [30, 10]


class Family:
    """The part of a family that encodes, and how often it was asked."""

    def __init__(self) -> None:
        self.clip = ClipTexts(
            list(encoders_of(SimpleNamespace(tokenizer=tokenizer(), text_encoder=model(CLIPTextModel, 1))))
        )
        self.calls: list[tuple[list[int], bool]] = []
        self.embedding_room = EmbeddingRoom((), 0)

    def unused_in_a1111(self, options: TextOptions) -> tuple[str, ...]:
        return ()

    def encode_pieces(self, texts: Any, counts: Any, *, is_none: bool, options: TextOptions) -> Any:
        self.calls.append((list(counts), is_none))
        hidden, _ = self.clip.encode(texts, counts)
        return [{"text": hidden[[row]]} for row in range(len(texts))]


def encode(
    prompt: str, negative: str = "", steps: int = 10, *, guided: bool = True
) -> tuple[JobText, Family]:
    family = Family()
    job = Job(prompt=prompt, negative_prompt=negative, prompt_syntax="a1111", seed=1)
    return TextEncoder(family).encode(job, steps, guided=guided), family  # type: ignore[arg-type]


def test_a_text_changes_after_the_step_that_it_names_counted_from_zero() -> None:
    """As the web UI counts (its CFG denoiser's `step` begins with 0): `[a:b:3]` is "a" in four steps."""
    text, family = encode("[a:b:3]")
    expected = {word: encode(word)[0].rows(0, guided=False)[0]["text"] for word in "ab"}
    for step in range(10):
        [row] = text.rows(step, guided=False)
        assert torch.allclose(row["text"], expected["a" if step <= 3 else "b"], atol=1e-4), step
    assert ([1, 1], False) in family.calls


def test_texts_that_take_turns_are_encoded_once_each() -> None:
    text, family = encode("[a|b]", steps=7)
    assert ([4, 3], False) in family.calls
    rows = [text.rows(step, guided=False)[0]["text"] for step in range(7)]
    # The first text is that of two steps, because the first step is number 0.
    assert rows[0] is rows[1] is rows[3]
    assert rows[2] is rows[4]
    assert rows[0] is not rows[2]


def test_prompts_that_are_composed_have_rows_weights_and_one_length() -> None:
    text, _ = encode("a cat AND " + "a dog, " * 30 + ":0.5", "fog, " * 60)
    assert text.weights == [1.0, 0.5]
    without, cat, dog = (row["text"] for row in text.rows(0, guided=True))
    assert (without.shape[1], cat.shape[1], dog.shape[1]) == (154, 154, 154)
    # The shorter one is lengthened by its last vector, as the web UI does it.
    assert torch.equal(cat[:, 77:], cat[:, 76:77].expand(-1, 77, -1))
    assert not torch.equal(dog[:, 77:], dog[:, 76:77].expand(-1, 77, -1))
    assert text.tokens(0) == 154


def test_an_empty_negative_prompt_is_none_and_a_blank_one_is_not() -> None:
    assert ([1], True) in encode("a cat")[1].calls
    assert ([1], True) not in encode("a cat", " ")[1].calls
    assert encode("a cat", guided=False)[0].negative is None


# --- lengths in one batch -----------------------------------------------------------------------------------


def texts_of(*lengths: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"text": torch.randn((1, length, 8), generator=generator)} for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "is_hidden"),
    [
        ((77, 77), False),
        ((77, 154, 308), False),
        ((154, 231), True),
        ((77, 231), False),
        ((77, 154, 231), True),
    ],
)
def test_texts_of_any_lengths_attend_together_as_they_do_alone(
    lengths: tuple[int, ...], is_hidden: bool
) -> None:
    rows = texts_of(*lengths)
    together = batched(rows)
    assert together["text"].shape == (len(lengths), max(lengths), 8)
    assert (TEXT_BIAS in together) == is_hidden
    query = torch.randn((len(lengths), 5, 8), generator=torch.Generator().manual_seed(2))
    bias = together.get(TEXT_BIAS)
    mask = None if bias is None else bias[:, None]
    found = torch.nn.functional.scaled_dot_product_attention(
        query, together["text"], together["text"], attn_mask=mask
    )
    for number, row in enumerate(rows):
        alone = torch.nn.functional.scaled_dot_product_attention(query[[number]], row["text"], row["text"])
        assert torch.allclose(found[[number]], alone, atol=1e-6)


def test_a_text_is_that_of_its_last_end_afterwards() -> None:
    rows = texts_of(1, 2)
    timed = Timed([3, 10], rows)
    assert [timed.at(step) is rows[0] for step in (0, 3, 4, 10, 11)] == [True, True, False, False, False]


@pytest.mark.services
def test_long_texts_without_weights_are_what_compel_makes_of_them() -> None:
    """A second witness, compel 2.5, which cuts at 75 tokens and not at commas. Its weights are others."""
    compel = importlib.import_module("compel")  # Where `make test-services` has installed it.
    own = model(CLIPTextModel, 1)
    other = compel.Compel(tokenizer=tokenizer(), text_encoder=own, truncate_long_prompts=False)
    clip = ClipTexts([ClipEncoder(tokenizer(), own)])
    for words in (1, 75, 76, 200):
        text = " ".join(("cat", "dog", "tree")[number % 3] for number in range(words))
        hidden, _ = clip.encode([a1111_syntax.pieces(text)], [1])
        assert hidden.shape[1] == 77 * -(-words // 75)
        assert torch.allclose(hidden, other(text), atol=1e-5)
