"""What prompts say and no picture shows: syntax of other programs, which is drawn as words; unused texts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from worker.contract.job import Job

#: AUTOMATIC1111's syntax (modules/prompt_parser.py and extra_networks.py of its version 1.10) that is not
#: offered: what each is called, and how it is found.
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


def only_words_warning(names: tuple[str, ...] | list[str]) -> str:
    """The sentence that tells of them."""
    return f"{', '.join(names)} in the prompt: not supported, and only drawn as words."


def has_unused_negative(fields: Mapping[str, Any]) -> bool:
    """Whether job fields have a negative prompt and no guidance. A scale that is open counts as guidance."""
    scale = fields.get("guidance_scale")
    if not fields.get("negative_prompt"):
        return False
    start, stop = fields.get("guidance_start", 0.0), fields.get("guidance_stop", 1.0)
    return bool((scale is not None and scale <= 1) or start >= stop)


def warnings_of(job: Job) -> tuple[str, ...]:
    """The warnings that a job's prompts deserve."""
    names = only_words(job.prompt, job.negative_prompt)
    unused = (UNUSED_NEGATIVE,) if has_unused_negative(vars(job)) else ()
    return (*((only_words_warning(names),) if names else ()), *unused)
