"""Texts that are no prompt but parameters of one, as people paste them from a picture or a web page."""

from __future__ import annotations

import re

from producer.prompts.entries import LineError

#: AUTOMATIC1111's line of parameters, and what stands before its negative prompt.
_PARAMETERS = re.compile(r"\bSteps: ?\d{1,5}, ?(Sampler|Schedule type|CFG scale|Seed|Size|Model|Version)\b")
_NEGATIVE = re.compile(r"(?:^|\s)Negative prompt: ")


def refuse_parameters(prompt: object) -> None:
    """Raise `LineError` where a prompt has a program's parameters in it, which would be drawn as words."""
    if not isinstance(prompt, str):
        return
    if "Steps: " in prompt and _PARAMETERS.search(prompt):
        raise LineError(
            "prompt",
            'It has AUTOMATIC1111\'s parameters in it ("Steps: ..."), which would be drawn as words: write '
            "them as options, such as --steps 20, or in columns of their own.",
        )
    if "egative prompt:" in prompt and _NEGATIVE.search(prompt):
        raise LineError(
            "prompt",
            'It has "Negative prompt:" in it, which would be drawn as words: write it as an option, '
            "--negative_prompt, or in a column of its own.",
        )
