"""What prompts say and no picture shows: syntax that they are not read in, drawn as words; unused texts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from worker.contract import a1111_syntax
from worker.contract.choices import PromptSyntax

if TYPE_CHECKING:
    from worker.contract.job import Job

#: AUTOMATIC1111's syntax (modules/prompt_parser.py and extra_networks.py of its version 1.10), which a plain
#: prompt does not have: what each is called, and how it is found.
SYNTAX: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "(x:1.3)": re.compile(r"(?<!\\)\([^()]*:\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)\s*\)"),
        "<lora:...>": re.compile(r"<(?:lora|lyco|locon|hypernet):[^<>]+>", re.IGNORECASE),
        "[x:y:0.5]": re.compile(r"(?<!\\)\[[^\[\]]*:\s*(?:\d+(?:\.\d*)?|\.\d+)\s*\]"),
        "BREAK": re.compile(r"\bBREAK\b"),
        "AND": re.compile(r"\bAND\b"),
    }
)
#: The sentence for a negative prompt that changes no picture.
UNUSED_NEGATIVE: Final = (
    "The negative prompt has no effect: it needs guidance_scale above 1, and guidance_start below "
    "guidance_stop."
)
#: The sentence for rescaled guidance where there is none.
UNUSED_RESCALE: Final = "guidance_rescale has no effect: it needs guidance_scale above 1."
#: The sentences for comments in AUTOMATIC1111's syntax, which has no mark that makes a # a word.
COMMENT_IN_A1111: Final = (
    "The text behind a # in a prompt is a comment in the syntax a1111, to the end of its line, and is left "
    "out. To draw it, give prompt_syntax plain."
)
ONLY_COMMENTS: Final = "The prompt is empty without its comments: the picture is of no prompt."
_NETWORKS = "<lora:...>"
#: Characters of what is quoted from a prompt, at most.
_QUOTED: Final = 40
#: Each of them has one of these: most prompts have none.
_MARK = re.compile(r":\s*[+-]?\.?\d|<[A-Za-z]+:|BREAK|AND")


def only_words(*prompts: object) -> tuple[str, ...]:
    """The names in `SYNTAX` of what the prompts have; in linear time."""
    texts = [
        text
        for text in prompts
        if isinstance(text, str)
        and (":" in text or "BREAK" in text or "AND" in text)
        and _MARK.search(text) is not None
    ]
    if not texts:
        return ()
    return tuple(
        name for name, pattern in SYNTAX.items() if any(pattern.search(text) is not None for text in texts)
    )


def only_words_in(*prompts: str) -> tuple[str, ...]:
    """The first text of the prompts for each of these names, of 40 characters at most."""
    found = []
    for name in only_words(*prompts):
        matches = (SYNTAX[name].search(text) for text in prompts)
        text = next(match[0] for match in matches if match is not None)
        found.append(text if len(text) <= _QUOTED else f"{text[: _QUOTED - 3]}...")
    return tuple(found)


def only_words_warning(
    names: tuple[str, ...] | list[str], found: tuple[str, ...] = (), remedy: str = "prompt_syntax a1111"
) -> str:
    """The sentence that tells of them, or of the texts that were `found`; `remedy` as it is written there."""
    shown = f"{', '.join(found or names)} in the prompt: only drawn as words"
    return f"{shown}, since its syntax is plain. {remedy} reads them."


def has_unused_negative(fields: Mapping[str, Any]) -> bool:
    """Whether job fields have a negative prompt and no guidance. A scale that is open counts as guidance."""
    scale = fields.get("guidance_scale")
    if not fields.get("negative_prompt"):
        return False
    start, stop = fields.get("guidance_start", 0.0), fields.get("guidance_stop", 1.0)
    return bool((scale is not None and scale <= 1) or start >= stop)


def warnings_of(job: Job) -> tuple[str, ...]:
    """The warnings that a job's prompts deserve."""
    unused = (UNUSED_NEGATIVE,) if has_unused_negative(vars(job)) else ()
    if job.guidance_rescale and job.guidance_scale is not None and job.guidance_scale <= 1:
        unused = (*unused, UNUSED_RESCALE)
    if job.prompt_syntax is PromptSyntax.A1111:
        return (*odd_in_a1111(job.prompt, job.negative_prompt), *unused)
    prompts = job.prompt, job.negative_prompt
    names = only_words(*prompts)
    return (*((only_words_warning(names, only_words_in(*prompts)),) if names else ()), *unused)


def odd_in_a1111(prompt: str, negative: str) -> tuple[str, ...]:
    """The warnings of what AUTOMATIC1111 draws as words, or leaves out, where nobody would expect it."""
    warnings = []
    if "#" in prompt or "#" in negative:
        warnings.append(COMMENT_IN_A1111)
        if prompt.strip() and not a1111_syntax.without_comments(prompt).strip():
            warnings.append(ONLY_COMMENTS)
    odd = [name for name in only_words(negative) if name in (_NETWORKS, "AND")]
    found = [f"{name} in the negative prompt" for name in odd]
    if "BREAK" in prompt or "BREAK" in negative:
        texts = [part.text for part in a1111_syntax.parts(prompt)]
        texts.append(a1111_syntax.without_comments(negative))
        if any(
            "BREAK" in (piece.text or "").split() for text in texts for piece in a1111_syntax.pieces(text)
        ):
            found.append("BREAK in brackets")
    if found:
        warnings.append(f"{', '.join(found)}: only drawn as words, as AUTOMATIC1111 draws them.")
    return tuple(warnings)
