"""A cache in front of a model family's text encoders, and the warning about a text that was cut."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from typing import Any

from worker.device.family import ModelFamily, Text

#: Texts whose embeddings are kept, at most: some 300 KiB each for SD 1.x in fp16, 700 KiB for SDXL.
KEPT = 256

#: Tokens in the vocabulary of the bundled model (`worker/demo/training/tokenizer.py`), and in its window.
BUNDLED_TOKENIZER = (4_096, 32)


class TextEncoder:
    """A family's texts, encoded. Safe to call from several threads: one encodes at a time."""

    def __init__(self, family: ModelFamily) -> None:
        self._family = family
        self._known: OrderedDict[tuple[str, str, bool], Text] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, prompt: str, negative: str, *, guided: bool) -> Text:
        """The encoded texts: the same object for the same texts as long as the cache keeps it.

        An empty negative prompt is none. Raises what the text encoder raises.
        """
        key = (prompt, negative if guided else "", guided)
        with self._lock:
            if (text := self._known.get(key)) is None:
                text = self._known[key] = self._family.encode(prompt, key[1], guided=guided)
                if len(self._known) > KEPT:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            return text


def cut_warning(tokenizer: Any, what: str, text: str) -> tuple[str, ...]:
    """The warning that `text`, called `what`, is longer than the tokenizer's window; none where it fits."""
    limit = tokenizer.model_max_length
    tokens = tokenizer(text, truncation=False, padding=False, verbose=False).input_ids
    if len(tokens) <= limit:
        return ()
    # The first and the last token mark the text's ends.
    left_out = tokenizer.decode(tokens[limit - 1 : -1])
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
