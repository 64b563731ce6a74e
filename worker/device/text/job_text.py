"""A job's texts, encoded: which of them a step takes, and texts of different lengths in one batch."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

#: One text, encoded: what the model takes of it, by name, (1, ...) each, in the model's dtype. What has three
#: axes has a vector for each token: (1, tokens, width).
Row = Mapping[str, torch.Tensor]
#: The name of the bias that hides the tokens that a text of a batch does not have: (rows, tokens), 0 or -inf.
TEXT_BIAS = "text_bias"


@dataclass(frozen=True)
class Timed:
    """A text that may be another one at other steps."""

    #: The last step, from 0, of each of its texts, rising. The last one's is not read.
    ends: Sequence[int]
    rows: Sequence[Row]

    def at(self, step: int) -> Row:
        """The text of a step, from 0."""
        return self.rows[min(bisect.bisect_left(self.ends, step), len(self.rows) - 1)]


@dataclass(frozen=True)
class JobText:
    """The texts of a job. Jobs of equal texts share it, and nobody changes it."""

    #: What to draw: one text, or those that AND composes.
    prompts: Sequence[Timed]
    #: The share of each in the guidance (Liu et al., 2022).
    weights: Sequence[float] = (1.0,)
    #: The negative prompt; None where the job is not guided.
    negative: Timed | None = None
    #: One sentence for each thing that the caller should know of its texts.
    warnings: tuple[str, ...] = ()

    def rows(self, step: int, *, guided: bool) -> list[Row]:
        """The texts of a step's rows: the negative prompt's first if `guided`, then the prompts'."""
        prompts = _as_long([each.at(step) for each in self.prompts])
        return [self.negative.at(step), *prompts] if guided and self.negative is not None else prompts

    def tensors(self) -> Iterator[torch.Tensor]:
        """All of them."""
        for text in (*self.prompts, *([self.negative] if self.negative is not None else [])):
            for row in text.rows:
                yield from row.values()

    def tokens(self, step: int) -> int:
        """Tokens of the longest text of a step; 0 where the model has no tokens of texts."""
        texts = self.prompts if self.negative is None else (*self.prompts, self.negative)
        return max(_tokens(text.at(step)) for text in texts)


def plain_text(conditions: Mapping[str, torch.Tensor], warnings: tuple[str, ...], *, guided: bool) -> JobText:
    """The texts of a job in no syntax: a prompt, and if `guided` a negative prompt, which is first."""
    rows = [{name: tensor[[row]] for name, tensor in conditions.items()} for row in range(1 + guided)]
    negative = Timed((0,), rows[:1]) if guided else None
    return JobText((Timed((0,), rows[-1:]),), (1.0,), negative, warnings)


def _tokens(row: Row) -> int:
    return max((tensor.shape[1] for tensor in row.values() if tensor.ndim == 3), default=0)


def _as_long(rows: list[Row]) -> list[Row]:
    """Texts that are composed, as long as the longest of them: their last vector is repeated.

    So the web UI has it (modules/prompt_parser.py, `stack_conds`), and it shows in the picture.
    """
    longest = max(map(_tokens, rows))
    if all(_tokens(row) == longest for row in rows):
        return rows
    return [
        {
            name: torch.cat([tensor, tensor[:, -1:].expand(-1, longest - tensor.shape[1], -1)], dim=1)
            if tensor.ndim == 3
            else tensor
            for name, tensor in row.items()
        }
        for row in rows
    ]


def batched(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """The texts of all rows of a batch, by name, (R, ...) each.

    Where they are of different lengths, all become as long as the longest, L, and attend as before:

    - A text whose length divides L is repeated. Attention to keys that are all there n times is attention to
      each of them once, since softmax gives each a share of 1/n.
    - If one does not divide L, each text is repeated as often as it fits, and what is left of L is hidden by
      a bias, under the name `TEXT_BIAS`. Attention with a bias is slower, so it is for such batches alone.
    """
    found: dict[str, torch.Tensor] = {}
    for name in rows[0]:
        tensors = [row[name] for row in rows]
        lengths = [tensor.shape[1] for tensor in tensors] if tensors[0].ndim == 3 else []
        if len(set(lengths)) > 1:
            longest = max(lengths)
            tensors = [_repeated(tensor, longest) for tensor in tensors]
            if any(longest % length for length in lengths):
                found[TEXT_BIAS] = _bias(lengths, longest).to(tensors[0].device, tensors[0].dtype)
        found[name] = torch.cat(tensors)
    return found


def _repeated(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """(1, tokens, width), repeated as often as it fits, then zeros: (1, length, width)."""
    times, rest = divmod(length, tensor.shape[1])
    return torch.nn.functional.pad(tensor.repeat(1, times, 1), (0, 0, 0, rest))


def _bias(lengths: Sequence[int], longest: int) -> torch.Tensor:
    """(R, longest): 0 where a row has a token, -inf where it has none."""
    ends = torch.tensor([longest - longest % length for length in lengths])
    hidden = torch.arange(longest) >= ends[:, None]
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
