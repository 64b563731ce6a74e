"""The jobs of a prompt file's line: its dynamic prompts' texts, each with every seed and cell of the grid.

    --images 4              four seeds for each prompt
    --grid steps=20,30      values that are crossed with all texts and seeds

Samples and seeds are derived from the line itself. A run that is resumed or repeated makes the same jobs, and
a line that was not edited keeps its pictures.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from producer.prompts import dynamic_prompts_v1
from producer.prompts.dynamic_prompts import SYNTAX, Scope, is_dynamic, parse
from producer.prompts.entries import Entry
from producer.prompts.expansion import all_of, sample
from producer.prompts.wildcards import Wildcards
from worker.contract.choices import PromptSyntax

#: The seed of those who want any, as AUTOMATIC1111 has it.
DRAWN = -1


class Variant(NamedTuple):
    """One job of a line, not yet checked."""

    #: Job fields, the seed among them.
    fields: dict[str, Any]
    #: Its values of the grid's axes.
    grid: Mapping[str, Any]


#: The cells of no grid.
_ONE_CELL: tuple[Mapping[str, Any], ...] = (MappingProxyType({}),)


@dataclass(frozen=True)
class Variants:
    """How lines become jobs: the same line and options give the same jobs in the same order, every time."""

    #: Job fields of lines that do not name them.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    #: Seeds for each prompt, >= 1.
    images: int = 1
    #: The first seed of prompts that name none; None: derived from the line.
    seed_start: int | None = None
    #: The values of each axis, by its job field. Those of all axes are crossed.
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    #: Texts to draw from those that a line's dynamic prompts stand for, >= 1; None: all of them.
    sample: int | None = None
    #: The files of `__name__`.
    wildcards: Wildcards = field(default_factory=lambda: Wildcards(None))
    #: Whether braces and wildcards are left as they are.
    literal: bool = False
    #: The version of dynamic prompts: that of new runs, or the one that a run was begun with.
    syntax: int = SYNTAX
    #: Whether a seed of -1 is one that is to be drawn; the first version took it for a number.
    draws_seeds: bool = True

    def expand(self, entry: Entry, file: int, prompt_syntax: str = "") -> Iterator[Variant]:
        """The jobs of one line of file number `file`, lazily. Raises `LineError` for an unknown wildcard.

        `prompt_syntax` is that of lines which do not say theirs.
        """
        merged = {**self.defaults, **entry.fields}
        if "metadata" in self.defaults and isinstance(entry.fields.get("metadata"), dict):
            merged["metadata"] = self.defaults["metadata"] | entry.fields["metadata"]
        cells = self._cells() if self.grid else _ONE_CELL
        place = f"{file}\0{entry.line}\0"
        for texts in self._texts(merged, place, str(merged.get("prompt_syntax", prompt_syntax))):
            for image in range(self.images * entry.images):
                seed = self._seed(merged, texts, image, place)
                for number, cell in enumerate(cells):
                    if cell.get("seed") == DRAWN:
                        drawn = _hash(f"seed\0{place}{image}\0{number}\0{texts.get('prompt', '')}")
                        cell = {**cell, "seed": drawn}
                    yield Variant({**merged, **texts, "seed": seed, **cell}, cell)

    def _cells(self) -> list[dict[str, Any]]:
        return [
            dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())
        ]

    def _seed(self, fields: Mapping[str, Any], texts: Mapping[str, Any], image: int, place: str) -> Any:
        start = fields.get("seed", self.seed_start)
        # Drawn from the line, so that a run that is resumed draws it again.
        if start is None or (start == DRAWN and self.draws_seeds):
            return _hash(f"seed\0{place}{image}\0{texts.get('prompt', '')}")
        # What is no seed stays, and the job's own error names it.
        is_seed = type(start) is int and (start >= 0 or not self.draws_seeds)
        return start + image if is_seed else start

    def _texts(self, fields: Mapping[str, Any], place: str, prompt_syntax: str) -> Iterator[dict[str, Any]]:
        texts = {name: fields[name] for name in ("prompt", "negative_prompt") if name in fields}
        are_dynamic = False
        for text in texts.values():
            if self.literal or not isinstance(text, str):
                are_dynamic = False
                break
            are_dynamic = are_dynamic or is_dynamic(text)
        if not are_dynamic:
            yield texts
            return
        for text in self._joined_texts(texts, place, prompt_syntax):
            prompt, _, negative = text.partition("\0")
            yield {"prompt": prompt} | ({"negative_prompt": negative} if "negative_prompt" in texts else {})

    def _joined_texts(self, texts: Mapping[str, str], place: str, prompt_syntax: str) -> Iterator[str]:
        """Both prompts as one text each, with a character between them that no prompt may have.

        They are expanded together, so that a sample is one of their pairs.
        """
        prompt, negative = (texts.get(name, "") for name in ("prompt", "negative_prompt"))
        rng = random.Random(_hash(f"sample\0{place}{texts}"))  # noqa: S311 - repeatable on purpose
        if self.syntax == 1:
            yield from dynamic_prompts_v1.texts(prompt, negative, self._wildcards_v1, self.sample, rng)
            return
        if any("#" in text.replace("\\#", "") for text in texts.values()):
            # In A1111's syntax what \# leaves is a comment again.
            remedy = "" if prompt_syntax == PromptSyntax.A1111 else ": or write \\#"
            self.wildcards.notice(f"The text behind a # in a prompt is a comment and is left out{remedy}.")
        joined = (Scope(parse(prompt)), "\0", Scope(parse(negative)))
        if self.sample is None:
            yield from all_of(joined, self.wildcards, rng)
        else:
            yield from sample(joined, self.wildcards, self.sample, rng)

    @functools.cached_property
    def _wildcards_v1(self) -> dynamic_prompts_v1.Wildcards:
        return dynamic_prompts_v1.Wildcards(self.wildcards.folder)


def _hash(text: str) -> int:
    """A number of 32 bits that depends on `text` alone."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "big"
    )
