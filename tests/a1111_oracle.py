"""AUTOMATIC1111's prompt syntax, apart from the product: for tests alone.

Written from the rules of the web UI's version 1.10.1 (modules/prompt_parser.py, sd_hijack_clip.py,
sd_emphasis.py), in other ways than the product's: brackets are taken from the innermost outwards, weights are
those of single characters, chunks are cut by looking ahead, and every text of every step is encoded.
It reads prompts whose brackets match, and such as have a few too many.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

#: Where texts that are done with stand in a prompt: characters of Unicode's private plane.
_FIRST = 0xF0000
_BROKEN = "\U0010fffd"
_INNERMOST = re.compile(r"\[([^][()]*)\]|\(([^][()]*)\)")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
#: Escaped characters as others, from Unicode's other private plane.
_ESCAPES = {character: chr(0x100000 + number) for number, character in enumerate("\\()[]:|")}


def text_at(prompt: str, step: int, steps: int) -> tuple[str, set[int]]:
    """The text at a step, from 1; and the steps that some part of it ends after."""
    hidden = re.sub(r"\\([\\()\[\]:|])", lambda found: "\ue000" + _ESCAPES[found[1]], prompt)
    if re.search(r"\\(\n|$)", hidden):
        return prompt, set()
    done: list[str] = []
    ends: set[int] = set()

    def keep(text: str) -> str:
        done.append(text)
        return chr(_FIRST + len(done) - 1)

    def evaluate(found: re.Match[str]) -> str:
        inner = found[1] if found[1] is not None else found[2]
        sections = re.split("[:|]", inner)
        is_square, marks = found[1] is not None, re.sub("[^:|]", "", inner)
        if _BROKEN in inner:
            pass
        elif not marks or (not is_square and marks == ":"):
            return keep(found[0])
        elif is_square and not marks.strip("|"):
            ends.update(range(1, steps + 1))
            return keep(sections[(step - 1) % len(sections)])
        elif is_square and marks in (":", "::") and _NUMBER.fullmatch(sections[-1].strip()):
            number = sections[-1].strip()
            end = min(steps, int(float(number) * steps if "." in number else float(number)))
            if end >= 1:
                ends.add(end)
            before = sections[0] if len(sections) == 3 else ""
            return keep(before if step <= end else sections[-2])
        # Brackets that mean nothing: from here outwards nothing else may.
        return f"{_BROKEN}{keep(found[0][0])}{inner}{keep(found[0][-1])}"

    while True:
        less = _INNERMOST.sub(evaluate, hidden)
        if less == hidden:
            break
        hidden = less
    if "|" in hidden:
        return prompt, set()
    while any(_FIRST <= ord(character) < _FIRST + len(done) for character in hidden):
        hidden = "".join(
            done[ord(each) - _FIRST] if _FIRST <= ord(each) < _FIRST + len(done) else each for each in hidden
        )
    for character, other in _ESCAPES.items():
        hidden = hidden.replace("\ue000" + other, "\\" + character)
    return hidden.replace(_BROKEN, ""), ends


def schedule(prompt: str, steps: int) -> list[tuple[int, str]]:
    """(end, text) for each text that a prompt is."""
    ends = {steps}
    for step in range(1, steps + 1):  # What is inside an option shows at its own steps alone.
        ends |= text_at(prompt, step, steps)[1]
    return [(end, text_at(prompt, end, steps)[0]) for end in sorted(ends)]


def weighted(text: str) -> list[tuple[str | None, float]]:
    """(text, weight) of runs of one weight; None is a new chunk."""
    words = re.findall(r"\\[\\()\[\]]|:\s*[+-]?[.\d]+\s*\)|(?s:.)", text)
    closed: list[tuple[int, int, float]] = []
    late: list[tuple[int, int, float]] = []
    for opening, closing, factor in (("(", ")", 1.1), ("[", "]", 1 / 1.1)):
        stack: list[int] = []
        for place, word in enumerate(words):
            if word == opening:
                stack.append(place)
            elif stack and word == closing:
                closed.append((place, stack.pop(), factor))
            elif stack and opening == "(" and re.match(r":.*\)$", word, re.DOTALL):
                closed.append((place, stack.pop(), float(word[1:-1].strip())))
        late += [(len(words), start, factor) for start in stack]
    factors: list[list[float]] = [[] for _ in words]
    # In the order in which they close: runs are of weights that are equal to the last bit.
    for place, start, factor in [*sorted(closed), *late]:
        words[start] = ""
        if place < len(words):
            words[place] = ""
        for inside in range(start, place):
            factors[inside].append(factor)
    found: list[tuple[str, float]] = []
    for word, of_word in zip(words, factors, strict=True):
        weight = 1.0
        for factor in of_word:
            weight *= factor
        plain = "" if word == "\\" else word[1:] if word.startswith("\\") else word
        found += [(character, weight) for character in plain]
    return [
        run
        for weight, characters in groupby(found, key=lambda each: each[1])
        for run in _breaks("".join(character for character, _ in characters), weight)
    ] or [("", 1.0)]


def _breaks(text: str, weight: float) -> list[tuple[str | None, float]]:
    """BREAK is one in text of weight 1 alone. (The prompts of the tests have none in brackets.)"""
    parts = re.split(r"\s*\bBREAK\b\s*", text)
    runs: list[tuple[str | None, float]] = [(parts[0], weight)]
    for part in parts[1:]:
        runs += [(None, -1.0), (part, weight)]
    return runs


def chunks(
    runs: list[tuple[str | None, float]], tokenizer: Any, length: int = 75
) -> list[list[tuple[int, float]]]:
    """(token, weight) of each chunk, cut by looking ahead, without marks and padding."""
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    found: list[list[tuple[int, float]]] = []
    for is_break, group in groupby(runs, key=lambda run: run[0] is None):
        if is_break:
            found += [[] for _ in list(group)[1:]]
            continue
        left = [
            (token, weight)
            for text, weight in group
            for token in tokenizer(text, add_special_tokens=False).input_ids
        ]
        first = True
        while left or first:
            cut = length
            if len(left) > length and left[length][0] != comma:
                commas = [place for place in range(length - 20, length) if left[place][0] == comma]
                cut = commas[-1] + 1 if commas else length
            found.append(left[:cut])
            left, first = left[cut:], False
    if len(found) > 1 and not found[-1]:
        found.pop()  # Nothing follows the last BREAK.
    return found


class Names:
    """The names of embeddings, as modules/textual_inversion/textual_inversion.py of the web UI finds them."""

    def __init__(self, tokenizer: Any, vectors: dict[str, torch.Tensor]) -> None:
        self.vectors = vectors
        ids = {name: list(tokenizer(name, add_special_tokens=False).input_ids) for name in sorted(vectors)}
        self.longest_first = sorted(ids.items(), key=lambda each: len(each[1]), reverse=True)

    def found(self, tokens: list[int]) -> list[int | str]:
        """The tokens, and in the place of those of a name the name."""
        found: list[int | str] = []
        while tokens:
            name, size = next(
                ((name, len(ids)) for name, ids in self.longest_first if tokens[: len(ids)] == ids), (None, 1)
            )
            found.append(tokens[0] if name is None else name)
            tokens = tokens[size:]
        return found


def chunks_with_names(
    runs: list[tuple[str | None, float]], tokenizer: Any, names: Names, length: int = 75
) -> list[list[tuple[int | tuple[str, int], float]]]:
    """As `chunks`; (name, number) for each vector of an embedding, all of which are in one chunk.

    The web UI leaves the vectors behind of an embedding that goes to the next chunk with what follows a
    comma. That is not followed here.
    """
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    found: list[list[tuple[int | tuple[str, int], float]]] = []
    for is_break, group in groupby(runs, key=lambda run: run[0] is None):
        if is_break:
            found += [[] for _ in list(group)[1:]]
            continue
        left = [
            (unit, weight)
            for text, weight in group
            for unit in names.found(list(tokenizer(text, add_special_tokens=False).input_ids))
        ]
        sizes = [1 if isinstance(unit, int) else len(names.vectors[unit]) for unit, _ in left]
        first = True
        while left or first:
            fit = max(number for number in range(len(left) + 1) if sum(sizes[:number]) <= length)
            if fit < len(left) and sum(sizes[:fit]) == length and left[fit][0] != comma:
                near = [n for n in range(fit) if left[n][0] == comma and sum(sizes[:n]) >= length - 20]
                fit = near[-1] + 1 if near else fit
            chunk: list[tuple[int | tuple[str, int], float]] = []
            for (unit, weight), size in zip(left[:fit], sizes, strict=False):
                places = [unit] if isinstance(unit, int) else [(unit, number) for number in range(size)]
                chunk += [(place, weight) for place in places]
            found.append(chunk)
            left, sizes, first = left[fit:], sizes[fit:], False
    if len(found) > 1 and not found[-1]:
        found.pop()
    return found


def with_vectors(model: Any, names: Names) -> tuple[Any, dict[tuple[str, int], int]]:
    """A copy of a text encoder that knows a token for each vector, and these tokens."""
    layer = model.get_input_embeddings()
    places = [(name, number) for name, rows in names.vectors.items() for number in range(len(rows))]
    copied = copy.deepcopy(model)
    more = torch.cat([layer.weight.detach(), *names.vectors.values()])
    copied.set_input_embeddings(torch.nn.Embedding.from_pretrained(more))
    return copied, {place: layer.num_embeddings + row for row, place in enumerate(places)}


@dataclass
class Encoder:
    """A text encoder and its tokenizer; `skips`: its last layer and last norm are left out."""

    tokenizer: Any
    model: Any
    skips: bool
    #: The setting "CLIP skip", which the web UI's class for SDXL reads nowhere (sd_hijack_clip.py).
    clip_skip: int = 1
    #: The vectors of embeddings, by their names.
    embeddings: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = Names(self.tokenizer, self.embeddings)
        self.places: dict[tuple[str, int], int] = {}
        if self.embeddings:
            self.model, self.places = with_vectors(self.model, self.names)

    def cut(self, text: str) -> list[list[tuple[int, float]]]:
        """The chunks of a text."""
        if not self.embeddings:
            return chunks(weighted(text), self.tokenizer)
        return [
            [(each if isinstance(each, int) else self.places[each], weight) for each, weight in chunk]
            for chunk in chunks_with_names(weighted(text), self.tokenizer, self.names)
        ]

    def __call__(self, texts: list[str], count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(texts, tokens, width), all texts encoded together, chunk by chunk; and the first one's pooled."""
        tokenizer, start, end = self.tokenizer, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        cut = [self.cut(text) for text in texts]
        outputs, pooled = [], None
        for number in range(count):
            ids, weights = [], []
            for each in cut:
                chunk = each[number] if number < len(each) else []
                row = [start, *(token for token, _ in chunk), end]
                ids.append(row + [tokenizer.pad_token_id] * (77 - len(row)))
                weights.append([1.0, *(weight for _, weight in chunk)] + [1.0] * (76 - len(chunk)))
            output = self.model(torch.tensor(ids), output_hidden_states=True)
            hidden = output.hidden_states[-2] if self.skips else output.last_hidden_state
            if self.clip_skip > 1 and not self.skips:
                hidden = self.model.final_layer_norm(output.hidden_states[-self.clip_skip])
            mean = hidden.mean()
            hidden = hidden * torch.tensor(weights)[..., None]
            outputs.append(hidden * (mean / hidden.mean()))
            pooled = output.text_embeds if number == 0 and hasattr(output, "text_embeds") else pooled
        return torch.cat(outputs, dim=1), pooled

    def length(self, texts: list[str]) -> int:
        """Chunks of the longest of these texts."""
        return max(len(self.cut(text)) for text in texts)


def encoded(encoders: list[Encoder], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the model takes of these texts: the encoders' outputs side by side."""
    count = max(encoder.length(texts) for encoder in encoders)
    outputs = [encoder(texts, count) for encoder in encoders]
    return torch.cat([hidden for hidden, _ in outputs], dim=-1), outputs[-1][1]
