"""A job's texts, encoded in its syntax, from a cache, with a warning for each thing that is not drawn."""

from __future__ import annotations

import itertools
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from worker.contract import a1111_syntax
from worker.contract.choices import PromptSyntax
from worker.contract.job import Job
from worker.device.family import ModelFamily, Text
from worker.device.loras.text import TextLoras
from worker.device.text.embeddings import FIRST_VECTOR, Embeddings, Files, TextOptions
from worker.device.text.job_text import JobText, Row, Timed, plain_text

#: Numbers in the texts that are kept, at most: 256 pairs of prompts for SDXL, 180 MB in fp16.
KEPT = 256 * 2 * 77 * 2_304

#: Tokens in the vocabulary of the bundled model (`worker/demo/training/tokenizer.py`), and in its window.
BUNDLED_TOKENIZER = (4_096, 32)

T = TypeVar("T", Text, Sequence[Row])


class TextEncoder:
    """A family's texts, encoded. Safe to call from several threads: one encodes at a time."""

    def __init__(self, family: ModelFamily, files: Files | None = None) -> None:
        """`files`: where the embeddings are that jobs name."""
        self._family = family
        self._embeddings = Embeddings(files, family.embedding_room)
        #: What was encoded, and how many numbers it has.
        self._known: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._kept = 0
        self._lock = threading.Lock()

    def encode(
        self, job: Job, steps: int, done: int = 0, *, guided: bool, loras: TextLoras | None = None
    ) -> JobText:
        """The encoded texts of a job that takes `steps` steps: with a negative prompt if `guided`.

        `done`: steps of the pass before this one; 0: it is the first. `loras`: what the job's LoRAs change of
        the text encoders.

        Equal texts are encoded once as long as the cache keeps them. An empty negative prompt is none. Raises
        what the text encoder raises.
        """
        negative = job.negative_prompt if guided else ""
        options = TextOptions(job.clip_skip, self._embeddings.of(job), loras)
        with self._lock:
            if job.prompt_syntax is PromptSyntax.A1111:
                return self._a1111(job.prompt, negative if guided else None, (steps, done), options)
            key = (job.prompt, negative, guided, options.key)
            text = self._once(
                key, lambda: self._family.encode(job.prompt, negative, guided=guided, options=options)
            )
            return plain_text(text.conditions, text.warnings, guided=guided)

    def _a1111(
        self, prompt: str, negative: str | None, steps: tuple[int, int], options: TextOptions
    ) -> JobText:
        """The texts in AUTOMATIC1111's syntax. `negative`: None for a job without guidance."""
        parts = a1111_syntax.parts(prompt)
        without = None
        if negative is not None:
            without = self._timed(a1111_syntax.without_comments(negative), steps, options, is_negative=True)
        return JobText(
            [self._timed(part.text, steps, options, is_negative=False) for part in parts],
            [part.weight for part in parts],
            without,
            self._family.unused_in_a1111(options),
        )

    def _timed(self, text: str, steps: tuple[int, int], options: TextOptions, *, is_negative: bool) -> Timed:
        """A text that may change by step."""
        schedule = a1111_syntax.schedule(text, *steps)
        texts = [each for _, each in schedule]
        different = list(dict.fromkeys(texts))
        pieces = [a1111_syntax.pieces(each) for each in different]
        counts = [texts.count(each) for each in different]
        is_none = is_negative and different == [""]

        def encode() -> Sequence[Row]:
            return self._family.encode_pieces(pieces, counts, is_none=is_none, options=options)

        rows = self._once((tuple(texts), is_none, options.key), encode)
        by_text = dict(zip(different, rows, strict=True))
        return Timed([end for end, _ in schedule], [by_text[each] for each in texts])

    def _once(self, key: Hashable, encode: Callable[[], T]) -> T:
        """What `encode` gives, from the cache where it is there. The lock is held."""
        if (known := self._known.get(key)) is None:
            found = encode()
            known = self._known[key] = found, _numbers(found)
            self._kept += known[1]
            while self._kept > KEPT and len(self._known) > 1:
                self._kept -= self._known.popitem(last=False)[1][1]
        self._known.move_to_end(key)
        result: T = known[0]
        return result


def _numbers(text: Text | Sequence[Row]) -> int:
    rows = [text.conditions] if isinstance(text, Text) else text
    return sum(tensor.numel() for tensor in itertools.chain(*(row.values() for row in rows)))


def cut_warning(tokenizer: Any, what: str, tokens: Sequence[int]) -> tuple[str, ...]:
    """The warning that a text, called `what`, is longer than the tokenizer's window; none where it fits.

    `tokens` are all of its tokens, with its marks; those that are not the tokenizer's stand for vectors.
    """
    limit = tokenizer.model_max_length
    if len(tokens) <= limit:
        return ()
    # The first and the last token mark the text's ends.
    left_out = tokenizer.decode([each for each in tokens[limit - 1 : -1] if each < FIRST_VECTOR])
    return (f'The {what} was cut after {limit} tokens; left out: "{left_out}"',)


def unknown_words_warning(tokenizer: Any, prompt: str) -> tuple[str, ...]:
    """The warning that the bundled model does not know words of the prompt; none for other models.

    Its tokenizer was made from its captions: the words that it was trained on are one token each.
    """
    if (tokenizer.vocab_size, tokenizer.model_max_length) != BUNDLED_TOKENIZER:
        return ()
    words = dict.fromkeys(re.findall(r"[^\W\d_]{2,}", prompt.lower()))
    unknown = [word for word in words if len(tokenizer.tokenize(word)) > 1]
    if not unknown:
        return ()
    shown = ", ".join(unknown[:10])
    text = (
        f"The bundled model does not know: {shown}. It draws what has an emoji, such as "
        '"a red apple", "two dogs" or "a robot on a blue background".'
    )
    return (text,)
