"""Texts through CLIP's text encoders: plain ones as diffusers takes them, others as AUTOMATIC1111 does.

A plain text is cut to the encoder's window. Of others the web UI's rules hold (its version 1.10.1,
modules/sd_hijack_clip.py, sd_hijack_open_clip.py and sd_emphasis.py) with its default settings: emphasis
"Original", 20 tokens to go back to a comma, layers skipped in SD 1.x and 2.x alone. A text is cut into chunks
of the encoder's window less its two marks: 75 tokens. Each chunk is encoded by itself, and the results are
put behind one another.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from worker.contract.a1111_syntax import Piece
from worker.contract.choices import PromptSyntax
from worker.device.text.embeddings import FIRST_VECTOR, NO_OPTIONS, TextOptions

#: A chunk that ends within so many tokens after a comma ends at the comma.
COMMA_BACKTRACK = 20
#: Chunks in one forward of an encoder, at most.
AT_ONCE = 32

#: A token of the tokenizer's, or those that stand for the vectors of an embedding.
Token = int | range
#: A piece of a text: its tokens, or None for a new chunk; and the weight of its tokens.
Tokens = tuple[Sequence[Token] | None, float]
#: (..., tokens, width) float32, and the pooled output (..., width), which SDXL's second encoder has.
Encoded = tuple[torch.Tensor, torch.Tensor | None]


@dataclass
class Chunk:
    """Tokens and their weights: at most as many as fit between the marks."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def chunks_of(pieces: Sequence[Tokens], length: int, comma: int | None) -> list[Chunk]:
    """The chunks of a text, at least one, of at most `length` tokens. `comma` is the token of a comma.

    All vectors of an embedding, at most `length`, are in one chunk.
    """
    done: list[Chunk] = []
    chunk, last_comma = Chunk(), -1
    for tokens, weight in pieces:
        if tokens is None:
            done.append(chunk)
            chunk, last_comma = Chunk(), -1
            continue
        for token in tokens:
            is_full = len(chunk.tokens) == length
            if token == comma and not is_full:
                last_comma = len(chunk.tokens)
            elif is_full:
                # What follows a comma that is near goes to the next chunk; but a comma itself follows none.
                is_near = last_comma >= 0 and length - last_comma <= COMMA_BACKTRACK and token != comma
                cut = last_comma + 1 if is_near else length
                done.append(Chunk(chunk.tokens[:cut], chunk.weights[:cut]))
                chunk, last_comma = Chunk(chunk.tokens[cut:], chunk.weights[cut:]), -1
            more = [token] if isinstance(token, int) else token
            if len(chunk.tokens) + len(more) > length:
                done.append(chunk)
                chunk, last_comma = Chunk(), -1
            chunk.tokens += more
            chunk.weights += [weight] * len(more)
    return [*done, chunk] if chunk.tokens or not done else done


@dataclass(frozen=True)
class ClipEncoder:
    """One of CLIP's text encoders with its tokenizer."""

    tokenizer: Any
    #: A transformers model, on its device.
    model: Any
    #: Whether its last layer and its last norm are left out, as in SDXL.
    is_penultimate: bool = False

    def chunks(self, pieces: Sequence[Piece], options: TextOptions = NO_OPTIONS) -> list[Chunk]:
        """The chunks of a text."""
        tokens: list[Tokens] = [
            (None if text is None else self._tokens(text, options, PromptSyntax.A1111), weight)
            for text, weight in pieces
        ]
        return chunks_of(tokens, self.tokenizer.model_max_length - 2, self._comma)

    @functools.cached_property
    def _comma(self) -> int | None:
        comma: int | None = self.tokenizer.get_vocab().get(",</w>")
        return comma

    @property
    def layers(self) -> int:
        """The model's layers, > 0."""
        return int(self.model.config.num_hidden_layers)

    def plain_ids(self, text: str, options: TextOptions = NO_OPTIONS) -> list[int]:
        """All tokens of a plain text between its marks, also those that are beyond the window."""
        tokens = self._tokens(text, options, PromptSyntax.PLAIN)
        flat = [each for token in tokens for each in ([token] if isinstance(token, int) else token)]
        return [self.tokenizer.bos_token_id, *flat, self.tokenizer.eos_token_id]

    def encode_plain(self, text: str, options: TextOptions, table: torch.Tensor | None) -> Encoded:
        """(1, window, width) float32; and (1, width) where the model has a pooled output.

        As diffusers counts `clip_skip`, which has one less, SDXL's layers are skipped from its own, the last
        but one. `table`: the vectors of the embeddings in `options`.
        """
        window = self.tokenizer.model_max_length
        ids = self.plain_ids(text, options)
        ids = [*ids[: window - 1], ids[-1]] if len(ids) > window else ids
        mask = None
        if getattr(self.model.config, "use_attention_mask", False):
            mask = torch.tensor([[1] * len(ids) + [0] * (window - len(ids))])
        ids += [self.tokenizer.pad_token_id] * (window - len(ids))
        tokens = torch.tensor([ids])
        # Where the pooled output is that of the largest token, it is the embedding's last one in diffusers.
        stand_ins = tokens - FIRST_VECTOR + self.model.config.vocab_size
        return self._forward(tokens, stand_ins, options.clip_skip + self.is_penultimate, table, mask)

    def encode(
        self,
        texts: Sequence[Sequence[Chunk]],
        counts: Sequence[int],
        chunks: int,
        options: TextOptions,
        table: torch.Tensor | None,
    ) -> Encoded:
        """(texts, chunks x window, width) float32; and (texts, width) where the model has a pooled output.

        Texts that are shorter than `chunks` are filled up with empty chunks. The mean that emphasis restores
        is that of all texts together, each as often as `counts` says. SDXL has its last layer but one in any
        case. `table`: the vectors of the embeddings in `options`.
        """
        padded = [[*text, *(Chunk() for _ in range(chunks - len(text)))] for text in texts]
        ids = torch.tensor([[self._ids(chunk) for chunk in text] for text in padded])
        from_end = 2 if self.is_penultimate else options.clip_skip
        outputs = [
            self._forward(part, torch.zeros_like(part), from_end, table)
            for part in ids.flatten(0, 1).split(AT_ONCE)
        ]
        hidden = torch.cat([output for output, _ in outputs]).unflatten(0, ids.shape[:2])
        weights = torch.tensor([[self._weights(chunk) for chunk in text] for text in padded])
        hidden = emphasized(hidden, weights.to(hidden.device), torch.tensor(counts, device=hidden.device))
        pooled = [output for _, output in outputs if output is not None]
        of_first = torch.cat(pooled).unflatten(0, ids.shape[:2])[:, 0] if pooled else None
        return hidden.flatten(1, 2), of_first

    def _tokens(self, text: str, options: TextOptions, syntax: PromptSyntax) -> list[Token]:
        found: list[Token] = []
        for part in options.split(text, syntax):
            if isinstance(part, range):
                found.append(part)
            else:
                found += self.tokenizer(
                    part, add_special_tokens=False, truncation=False, verbose=False
                ).input_ids
        return found

    def _ids(self, chunk: Chunk) -> list[int]:
        """The chunk between its marks, padded to the window."""
        window, end = self.tokenizer.model_max_length, self.tokenizer.eos_token_id
        ids = [self.tokenizer.bos_token_id, *chunk.tokens]
        ids += [end] * (window - len(ids))
        # Behind the first end is padding, for which SD 2.x and SDXL's second encoder have a token of its own.
        after = ids.index(end) + 1
        return ids[:after] + [self.tokenizer.pad_token_id] * (window - after)

    def _weights(self, chunk: Chunk) -> list[float]:
        left = self.tokenizer.model_max_length - 1 - len(chunk.weights)
        return [1.0, *chunk.weights, *[1.0] * left]

    def _forward(
        self,
        ids: torch.Tensor,
        stand_ins: torch.Tensor,
        from_end: int,
        table: torch.Tensor | None,
        mask: torch.Tensor | None = None,
    ) -> Encoded:
        """The output of a layer, counted from the last one, which is 1; and the pooled output.

        SDXL takes a layer's output as it is, the others put it through the model's last norm. `stand_ins` are
        what the model sees in the place of those tokens that stand for vectors.
        """
        device = self.model.device
        is_vector = ids >= FIRST_VECTOR
        with _vectors_in(self.model, ids, is_vector, table):
            output = self.model(
                torch.where(is_vector, stand_ins, ids).to(device),
                attention_mask=None if mask is None else mask.to(device),
                output_hidden_states=from_end > 1,
            )
        hidden = output.hidden_states[-from_end] if from_end > 1 else output.last_hidden_state
        if from_end > 1 and not self.is_penultimate:
            hidden = _last_norm(self.model)(hidden)
        pooled = getattr(output, "text_embeds", None)
        return hidden.float(), None if pooled is None else pooled.float()


@contextlib.contextmanager
def _vectors_in(
    model: Any, ids: torch.Tensor, is_vector: torch.Tensor, table: torch.Tensor | None
) -> Iterator[None]:
    """Meanwhile the model's first layer gives vectors of `table` where `is_vector`: one forward of `ids`."""
    if table is None or not bool(is_vector.any()):
        yield
        return
    layer = model.get_input_embeddings()
    size = layer.num_embeddings
    rows = ids[is_vector] - FIRST_VECTOR

    def before(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (given[0].masked_fill(given[0] >= size, 0), *given[1:])

    def after(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[is_vector.to(output.device)] = table[rows].to(output)
        return output

    hooks = layer.register_forward_pre_hook(before), layer.register_forward_hook(after)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _last_norm(model: Any) -> Any:
    """CLIP's last norm. Up to its version 4 transformers has it in a part of its own."""
    return getattr(model, "text_model", model).final_layer_norm


def emphasized(hidden: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Each token's vector times its weight, and each chunk's mean, over all texts, as it was before.

    `hidden`: (texts, chunks, window, width) float32. `weights`: (texts, chunks, window). `counts`: (texts,).
    """
    weighted = hidden * weights[..., None]
    share = counts.to(hidden.dtype) / counts.sum()

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (values.mean((2, 3)) * share[:, None]).sum(0)

    # Without weights the quotient is 1, also where a mean is 0.
    is_weighted = (weights != 1).any(2).any(0)
    restored = torch.where(is_weighted, mean(hidden) / mean(weighted), 1.0)
    return weighted * restored[None, :, None, None]


@dataclass(frozen=True)
class ClipTexts:
    """All text encoders of a pipeline: their outputs are put side by side."""

    encoders: Sequence[ClipEncoder]

    @property
    def layers(self) -> int:
        """Layers of the encoder that has the fewest."""
        return min(encoder.layers for encoder in self.encoders)

    def encode_plain(self, text: str, options: TextOptions = NO_OPTIONS) -> Encoded:
        """(1, tokens, width) float32; and the pooled output (1, width). See `ClipEncoder.encode_plain`."""
        with self._adapted(options):
            outputs = [
                encoder.encode_plain(text, options, options.table(number))
                for number, encoder in enumerate(self.encoders)
            ]
        return _side_by_side(outputs)

    def encode(
        self,
        texts: Sequence[Sequence[Piece]],
        counts: Sequence[int],
        options: TextOptions = NO_OPTIONS,
    ) -> Encoded:
        """(texts, tokens, width) float32, the same tokens for each; and the pooled output (texts, width).

        `counts`: for how many steps each text is one. See `ClipEncoder.encode`.
        """
        chunked = [[encoder.chunks(text, options) for text in texts] for encoder in self.encoders]
        chunks = max(len(text) for of_encoder in chunked for text in of_encoder)
        with self._adapted(options):
            outputs = [
                encoder.encode(of_encoder, counts, chunks, options, options.table(number))
                for number, (encoder, of_encoder) in enumerate(zip(self.encoders, chunked, strict=True))
            ]
        return _side_by_side(outputs)

    def _adapted(self, options: TextOptions) -> contextlib.AbstractContextManager[None]:
        """Meanwhile the encoders have the LoRAs of `options`."""
        if options.loras is None:
            return contextlib.nullcontext()
        return options.loras.within([encoder.model for encoder in self.encoders])


def _side_by_side(
    outputs: Sequence[Encoded],
) -> Encoded:
    pooled = [output for _, output in outputs if output is not None]
    return torch.cat([hidden for hidden, _ in outputs], dim=-1), pooled[-1] if pooled else None


def encoders_of(pipeline: Any) -> Iterator[ClipEncoder]:
    """The text encoders of a Stable Diffusion pipeline, one or two."""
    is_xl = getattr(pipeline, "text_encoder_2", None) is not None
    if pipeline.text_encoder is not None:
        yield ClipEncoder(pipeline.tokenizer, pipeline.text_encoder, is_xl)
    if is_xl:
        yield ClipEncoder(pipeline.tokenizer_2, pipeline.text_encoder_2, is_xl)
