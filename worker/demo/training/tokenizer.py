"""The tokenizer: CLIP's, with a small vocabulary learnt from the captions.

Byte-level byte-pair encoding (Sennrich et al. 2016, over bytes as in GPT-2): frequent words are one token
each, and unknown words are split into smaller pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

#: Tokens in the vocabulary.
VOCABULARY = 4096
#: Tokens of a prompt, begin and end marks included; more are cut off. Captions here are short, and with
#: CLIP's 77 tokens the text encoder and every cross attention would take more than twice the time.
MAX_TOKENS = 32

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """The tokenizer whose merges fit `captions` best. Equal captions give an equal tokenizer."""
    blank = CLIPTokenizer()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    # CLIP's layout: every byte inside a word and at a word's end, then the merges, then the two marks.
    base = [*bytes_, *(f"{byte}</w>" for byte in bytes_)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, end_of_word_suffix="</w>", initial_alphabet=bytes_, show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    learnt = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    known = set(base)
    pieces = [piece for piece, _ in learnt if piece not in known][: VOCABULARY - len(base) - 2]
    vocabulary = {piece: index for index, piece in enumerate([*base, *pieces, _BEGIN, _END])}
    return CLIPTokenizer(
        vocab=vocabulary, merges=_merges(learner, vocabulary), model_max_length=MAX_TOKENS, pad_token=_END
    )


def _merges(learner: Tokenizer, vocabulary: dict[str, int]) -> Any:
    """The learnt merges whose parts and result are all in the vocabulary, in the order learnt."""
    merges: list[list[str]] = json.loads(learner.to_str())["model"]["merges"]
    return [
        (left, right)
        for left, right in merges
        if left in vocabulary and right in vocabulary and left + right in vocabulary
    ]
