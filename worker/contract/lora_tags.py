"""LoRAs in a prompt of AUTOMATIC1111's syntax: `<lora:name:0.8>`, as job fields.

Source: its version 1.10.1, modules/extra_networks.py and extensions-builtin/Lora/extra_networks_lora.py.

    <lora:name>                  weight 1
    <lora:name:0.8>              in the text encoders and in the UNet
    <lora:name:0.5:0.8>          in the text encoders, in the UNet
    <lora:name:te=0.5:unet=0.8>  the same

A tag is taken from the prompt before anything else is read in it, but for comments; one in a comment is none.
`lyco` is another name of `lora`. A negative prompt has no tags: there they are words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from worker.contract.choices import PromptSyntax
from worker.contract.explain import short
from worker.contract.loras import SUFFIX, Lora, Misread, lora_of, number_text, read_loras, weight_of

#: A comment, or an extra network: a comment in one is no part of it.
_FOUND: Final = re.compile(r"#[^\n]*+|<(\w+):((?:[^>#]++|#[^\n]*+)++)>")
_COMMENT: Final = re.compile(r"#[^\n]*+")
_KINDS: Final = ("lora", "lyco")
#: What an argument sets, in the order of those without a name.
_ARGUMENTS: Final = ("te", "unet", "dyn")
#: What a name in a tag cannot have: the tag's own marks.
_MARKS: Final = frozenset(">:=#\n")


def without_tags(values: Any) -> Any:
    """The fields of a job with the LoRAs that its prompt names among its `loras`, and out of its prompt.

    Only in the syntax `a1111`. What cannot be read is left to the check of `loras`, so that the error stands
    beside those of other fields.
    """
    prompt = values.get("prompt") if isinstance(values, dict) else None
    if not isinstance(prompt, str) or "<l" not in prompt or not _is_a1111(values.get("prompt_syntax")):
        return values
    try:
        rest, tagged = taken(prompt)
        if not tagged:
            return values
        given = read_loras(values.get("loras", []))
        return values | {"prompt": rest, "loras": [*given, *tagged]}
    except ValueError as error:
        # Without marks, so that no other check refuses the same tag.
        return values | {"prompt": prompt.replace("<", " "), "loras": Misread(error)}


def _is_a1111(syntax: object) -> bool:
    return isinstance(syntax, str) and syntax.strip().lower() in (PromptSyntax.A1111, "automatic1111")


def taken(prompt: str) -> tuple[str, list[Lora]]:
    """A prompt without its LoRAs, and these, also such of weight 0.

    Raises `ValueError` with the end of a sentence that begins with "loras".
    """
    found: list[Lora] = []

    def take(match: re.Match[str]) -> str:
        if match[1] not in _KINDS:
            return match[0]
        found.append(_lora(match[0], _COMMENT.sub("", match[2])))
        return ""

    rest = _FOUND.sub(take, prompt)
    if not found:
        return prompt, []
    rest = rest.strip()
    if again := next((each[0] for each in _FOUND.finditer(rest) if each[1] in _KINDS), ""):
        raise ValueError(f"has {short(again)} in the prompt once other tags are out of it: write it apart")
    if not rest:
        raise ValueError("are all that the prompt has: say what to draw, too")
    return rest, found


def _lora(tag: str, arguments: str) -> Lora:
    named: dict[str, str] = {}
    positional: list[str] = []
    for each in arguments.split(":"):
        key, equals, value = each.partition("=")
        if equals:
            named[key.strip()] = value
        else:
            positional.append(each)
    if not positional or len(positional) > 1 + len(_ARGUMENTS) or not named.keys() <= set(_ARGUMENTS):
        raise ValueError(
            f"has {short(tag)} in the prompt: write <lora:name:0.8>, or <lora:name:0.5:0.8> for the text "
            "encoders and the UNet"
        )
    values = dict(zip(_ARGUMENTS, positional[1:], strict=False)) | named
    if "dyn" in values:
        raise ValueError(
            f"has {short(tag)} in the prompt, and a part of a LoRA's rank is not offered: take out "
            f"{'dyn=' if 'dyn' in named else 'its third number'}"
        )
    text_weight = _number(tag, values.get("te", "1"))
    return lora_of(
        positional[0], _number(tag, values["unet"]) if "unet" in values else text_weight, text_weight
    )


def _number(tag: str, text: str) -> float:
    return weight_of(text, f"{short(tag)} in the prompt")


def tags_of(loras: Iterable[Lora]) -> str:
    """Tags that AUTOMATIC1111 reads as these LoRAs, but those whose name cannot stand in one."""
    return " ".join(_tag(each) for each in loras if _MARKS.isdisjoint(each.name))


def _tag(lora: Lora) -> str:
    weights = [number_text(lora.weight)]
    if lora.text_encoder_weight is not None:
        weights.insert(0, number_text(lora.text_encoder_weight))
    return f"<lora:{lora.name.removesuffix(SUFFIX)}:{':'.join(weights)}>"
