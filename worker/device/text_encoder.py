"""Text to embeddings, once a text: diffusers' own `encode_prompt` behind a cache."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

#: Texts whose embeddings are kept, at most: some 300 KiB each for SD 1.x in fp16, 700 KiB for SDXL.
KEPT = 256


@dataclass(frozen=True)
class Text:
    """A job's text as the UNet takes it; with guidance, the negative prompt's row comes first."""

    #: (rows, tokens, width), in the model's dtype; 2 rows with guidance, else 1.
    embeddings: torch.Tensor
    #: (rows, width) for SDXL, else None.
    pooled: torch.Tensor | None
    #: What was left out.
    warnings: tuple[str, ...]


class TextEncoder:
    """A pipeline's tokenizers and text encoders. Safe to call from several threads: one encodes at a time."""

    def __init__(self, pipeline: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._pipeline = pipeline
        self._device, self._dtype = device, dtype
        self._known: OrderedDict[tuple[str, str, bool], Text] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, prompt: str, negative: str, *, guided: bool) -> Text:
        """The texts' embeddings, the same object for the same texts while the cache has it.

        An empty negative prompt is none, which SDXL models may take as zeros.
        """
        key = (prompt, negative if guided else "", guided)
        with self._lock:
            if (text := self._known.get(key)) is None:
                text = self._known[key] = self._encode(*key)
                if len(self._known) > KEPT:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            return text

    def _encode(self, prompt: str, negative: str, guided: bool) -> Text:
        # (positive, negative), and for SDXL (..., pooled positive, pooled negative).
        encoded = self._pipeline.encode_prompt(
            prompt,
            device=self._device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=negative or None,
        )
        order = (1, 0) if guided else (0,)
        embeddings, *pooled = (
            torch.cat([encoded[first + row] for row in order]).to(self._dtype)
            for first in range(0, len(encoded), 2)
        )
        warnings = self._cut("prompt", prompt) + (self._cut("negative prompt", negative) if guided else ())
        return Text(embeddings, pooled[0] if pooled else None, warnings)

    def _cut(self, what: str, text: str) -> tuple[str, ...]:
        """What diffusers leaves out of `text`: the tokens beyond the text encoder's window."""
        tokenizer = self._pipeline.tokenizer
        limit = tokenizer.model_max_length
        tokens = tokenizer(text, truncation=False, padding=False, verbose=False).input_ids
        if len(tokens) <= limit:
            return ()
        # The first and the last token mark the text's ends.
        left_out = tokenizer.decode(tokens[limit - 1 : -1])
        return (f'The {what} was cut after {limit} tokens; left out: "{left_out}"',)
