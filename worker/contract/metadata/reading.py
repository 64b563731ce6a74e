"""What was read from a picture's metadata: job fields, and what a job cannot say."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from worker.contract.choices import PromptSyntax
from worker.contract.errors import InvalidJobError
from worker.contract.explain import short
from worker.contract.job import Job

#: Names that are listed in one warning, at most; and in a job's metadata, which has a limit of its own.
_SHOWN = 12
MAX_LEFT_OUT = 30
#: Values that leave a picture as it is.
_NEUTRAL = ("", "none", "false", "null", "automatic", "[]", "{}", "0", "0.0", "off", "disabled")
#: How such values begin in Fooocus: "None : 1.0" for a LoRA, "Default (model)" for the VAE.
_NEUTRAL_STARTS = ("none :", "default (")


@dataclass(frozen=True)
class Reading:
    """What one text says about its picture."""

    #: Job fields, as `Job.parse` takes them.
    fields: dict[str, Any]
    #: What else made the picture and is no job field, such as "Hires upscale: 2".
    left: tuple[str, ...] = ()
    #: Whether smallcat wrote it: then the fields say all.
    is_ours: bool = False

    @property
    def job(self) -> Job:
        """The job: one that smallcat wrote is a stored one. Raises `InvalidJobError`."""
        return Job.parse(self.fields, is_new=not self.is_ours)

    @property
    def left_out(self) -> list[str]:
        """What else made the picture, each once; nothing where smallcat wrote it."""
        return [] if self.is_ours else [*dict.fromkeys((*self.left, *_syntax(self.fields)))]

    @property
    def warning(self) -> str:
        """The sentence that names what is left out; empty where the fields say all."""
        left = self.left_out
        if not left:
            return ""
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        return (
            f"The picture was also made with {', '.join(left[:_SHOWN])}{more}, which a job cannot say: "
            "it gives another picture."
        )


def left_out(values: Mapping[str, Any], read: Collection[str], harmless: Collection[str]) -> Iterator[str]:
    """Those of `values` that are neither read, nor harmless, nor neutral, as "name: value"."""
    for name, value in values.items():
        if name in read or name.casefold() in harmless or is_neutral(value):
            continue
        shown = value if isinstance(value, str | int | float) else type(value).__name__
        yield f"{short(name)[1:-1]}: {short(str(shown))[1:-1][:40]}"


def is_neutral(value: object) -> bool:
    """Whether a value says that nothing was done."""
    plain = str(value)[:20].strip().casefold()
    return plain in _NEUTRAL or plain.startswith(_NEUTRAL_STARTS)


def number(kind: type[int] | type[float], name: str, value: object) -> int | float:
    """A number, also where it is written as a text. Raises `InvalidJobError` that names it."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        if isinstance(value, int) and kind is int:
            return value
        text = str(value).strip()
        if kind is int and re.fullmatch(r"[+-]?\d{1,30}(\.0*)?", text):
            return int(text.partition(".")[0])
        found = float(text)
        if kind is int and not found.is_integer():
            raise ValueError
    except (ValueError, OverflowError):
        raise InvalidJobError(f"The metadata has {name}: {short(value)}, which is no number.") from None
    return int(found) if kind is int else found


def text(name: str, value: object) -> str:
    """A text. Raises `InvalidJobError` that names what is none."""
    if not isinstance(value, str):
        raise InvalidJobError(f"The metadata has {name}: {short(value)}, which is no text.")
    return value


#: What AUTOMATIC1111 and those after it read in a prompt, and here is only drawn as words.
_SYNTAX = {
    "weights such as (x:1.3)": re.compile(r"\([^():]{1,200}:\s?\d"),
    "extra networks such as <lora:x:1>": re.compile(r"<(?:lora|lyco|hypernet|embed)\b", re.IGNORECASE),
    "BREAK or AND": re.compile(r"\b(?:BREAK|AND)\b"),
}


def _syntax(fields: Mapping[str, Any]) -> Iterator[str]:
    if fields.get("prompt_syntax") == PromptSyntax.A1111:
        return iter(())
    both = f"{fields.get('prompt', '')}\n{fields.get('negative_prompt', '')}"[:8_000]
    return (name for name, pattern in _SYNTAX.items() if pattern.search(both))
