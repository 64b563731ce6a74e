"""Which words of a prompt are names of embeddings, before any token of it is known.

In `plain` it is `<name>`, as diffusers' tokens are written. In `a1111` it is the bare word, as in the web UI
(its version 1.10.1, modules/textual_inversion/textual_inversion.py): in any case, the longest name first,
within one piece of a text, so not across a change of weight. The web UI compares tokens. CLIP's tokens begin
anew at each of the words that `words_of` gives, so comparing these is the same, but for one thing: the web UI
also finds a name that is the end of a longer word, where CLIP happens to part it there.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from worker.contract import a1111_syntax
from worker.contract.choices import PromptSyntax

if TYPE_CHECKING:
    from worker.contract.job import Job

#: What may be an embedding in a plain prompt, and what looks like one.
_IN_MARKS = re.compile(r"<([^<>:\n]{1,100})>")
_LOOKS = re.compile(r"<([^\W\d_][^<>:\n]{0,99})>")
#: How CLIP's tokenizer parts a text before it makes tokens of it.
_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)


class Name(NamedTuple):
    """The name of an embedding, in its place in a text."""

    name: str


def words_of(text: str) -> Iterator[tuple[str, int, int]]:
    """(word, start, end) of each word of a text, as CLIP's tokenizer compares it."""
    for found in _WORD.finditer(text):
        yield unicodedata.normalize("NFC", found[0]).lower(), found.start(), found.end()


class EmbeddingNames:
    """The names of embeddings that there are."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        #: By first word: all words of a name, and the name; those of the most words first.
        self._by_word: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        for name in sorted(self.names):
            words = tuple(word for word, _, _ in words_of(name))
            if words:
                self._by_word.setdefault(words[0], []).append((words, name))
        for candidates in self._by_word.values():
            candidates.sort(key=lambda each: -len(each[0]))

    def may_be_in(self, prompt: str) -> bool:
        """Whether a prompt may have one of them, in either syntax. Fast, and never wrong about a No."""
        if not self.names:
            return False
        return "<" in prompt or any(word in self._by_word for word, _, _ in words_of(prompt))

    def split(self, text: str, syntax: PromptSyntax) -> list[str | Name]:
        """A plain prompt, or a piece of one in the syntax `a1111`, with the names in it taken out."""
        found = self._in_plain(text) if syntax is PromptSyntax.PLAIN else self._in_words(text)
        parts: list[str | Name] = []
        last = 0
        for start, end, name in found:
            parts += [text[last:start], Name(name)]
            last = end
        return [each for each in (*parts, text[last:]) if each != ""]

    def _in_plain(self, text: str) -> Iterator[tuple[int, int, str]]:
        for found in _IN_MARKS.finditer(text):
            if found[1] in self.names:
                yield found.start(), found.end(), found[1]

    def _in_words(self, text: str) -> Iterator[tuple[int, int, str]]:
        words = list(words_of(text))
        place = 0
        while place < len(words):
            word, start, _ = words[place]
            for name_words, name in self._by_word.get(word, ()):
                end = place + len(name_words)
                if tuple(each for each, _, _ in words[place:end]) == name_words:
                    yield start, words[end - 1][2], name
                    place = end
                    break
            else:
                place += 1

    def of(self, job: Job) -> list[str]:
        """Those that the prompts of a job name. Its steps are known."""
        prompts = (job.prompt, job.negative_prompt)
        if not any(self.may_be_in(each) for each in prompts):
            return []
        texts: Iterable[str] = prompts
        if job.prompt_syntax is not PromptSyntax.PLAIN:
            passes = [(job.steps or 1, 0)]
            passes += [(job.second_pass.steps_run, job.steps or 1)] if job.second_pass else []
            texts = _pieces(*prompts, passes)
        parts = [part for text in texts for part in self.split(text, job.prompt_syntax)]
        return sorted({part.name for part in parts if isinstance(part, Name)})


def _pieces(prompt: str, negative: str, passes: Sequence[tuple[int, int]]) -> Iterator[str]:
    """The texts of one weight that prompts in the syntax `a1111` have at any step.

    `passes`: the steps of each pass, and those before it.
    """
    parts = [part.text for part in a1111_syntax.parts(prompt)]
    found = {
        text
        for part in (*parts, a1111_syntax.without_comments(negative))
        for steps, done in passes
        for _, text in a1111_syntax.schedule(part, steps, done)
    }
    for text in found:
        yield from (piece.text for piece in a1111_syntax.pieces(text) if piece.text)


def unknown_in(plain_prompt: str, known: Container[str]) -> list[str]:
    """What looks like an embedding in a plain prompt, and is none of `known`."""
    found = dict.fromkeys(each[1] for each in _LOOKS.finditer(plain_prompt))
    return [name for name in found if name not in known]
