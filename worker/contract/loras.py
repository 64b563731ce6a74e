"""The LoRAs that a job names, each with its weights: what may be written, and the one form that is kept.

    [{"name": "detail", "weight": 0.8}, {"name": "pixel", "weight": 1.0, "text_encoder_weight": 0.5}]
    {"detail": 0.8}
    detail=0.8; pixel=1:te=0.5

A LoRA of weight 0 is dropped. The order says nothing, so they are sorted by name.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from worker.contract.explain import short

#: LoRAs of a job, at most.
MAX_LORAS: Final = 8
#: A LoRA's weight, at most, and at least with a minus.
MAX_LORA_WEIGHT: Final = 4.0
#: Characters of a LoRA's name, at most: as of all files beside a model, with an @ and a SHA-256 behind it.
MAX_LORA_NAME: Final = 165
SUFFIX: Final = ".safetensors"
#: What parts LoRAs in a text. A name with one of them, or with a colon, is written as JSON.
_PARTS: Final = ";,"
#: Before the text encoders' weight in a text, where it is another one.
_TEXT_WEIGHT: Final = "te="
#: A text that stands for no LoRA.
_NONE: Final = "none"
_KEYS: Final = ("name", "weight", "text_encoder_weight")


class Lora(BaseModel):
    """A LoRA of a job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Its name: that of a file that the workers offer, or a hash of it, 1 to 165 characters.
    name: str = Field(min_length=1, max_length=MAX_LORA_NAME)
    #: How much of it is added to the model, -4 to 4.
    weight: float = Field(default=1.0, ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT, allow_inf_nan=False)
    #: Likewise for the text encoders, where that is another weight; None: the same.
    text_encoder_weight: float | None = Field(
        default=None, ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT, allow_inf_nan=False
    )

    @model_serializer(mode="wrap")
    def _without_none(self, run: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in run(self).items() if value is not None}

    @property
    def in_text_encoders(self) -> float:
        """Its weight in the text encoders."""
        return self.weight if self.text_encoder_weight is None else self.text_encoder_weight


#: What `read_loras` reads, as Python has it.
LorasLike: TypeAlias = (
    str | Mapping[str, float | Mapping[str, Any]] | Sequence[str | Mapping[str, Any] | Lora]
)


def key_of_lora(name: str) -> str:
    """A LoRA in a job's `file_hashes`, as `worker.contract.file_index.key_of` has it."""
    return f"lora:{name}"


def read_loras(value: object) -> list[Lora]:
    """LoRAs as they are written, in the one form that is kept.

    Raises `ValueError` with the end of a sentence that begins with the field's name.
    """
    if isinstance(value, Misread):
        raise ValueError(str(value))
    found = list(_entries(value))
    names = [each.name for each in found]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise ValueError(f"has {short(twice)} twice: name it once, with one weight")
    used = [each for each in found if each.weight or each.in_text_encoders]
    if len(used) > MAX_LORAS:
        raise ValueError(f"has {len(used)} LoRAs, the limit is {MAX_LORAS}: use fewer")
    return sorted(used, key=lambda each: each.name)


class Misread(str):
    """LoRAs that could not be read from a prompt; the text is their error."""


def lora_of(name: object, weight: object = 1.0, text_encoder_weight: object = None) -> Lora:
    """A LoRA as it is kept. Raises `ValueError` as `read_loras` does."""
    if not isinstance(name, str):
        raise ValueError(f"has the name {short(name)}: it must be a text such as detail")
    plain = _plain(name)
    if not plain or len(plain) > MAX_LORA_NAME or not plain.isprintable():
        raise ValueError(
            f"has the name {short(name)}: it must be 1 to {MAX_LORA_NAME} printable characters, those of a "
            "file without .safetensors"
        )
    of_unet = _weight(plain, weight)
    of_text = None if text_encoder_weight is None else _weight(plain, text_encoder_weight)
    return Lora(name=plain, weight=of_unet, text_encoder_weight=None if of_text == of_unet else of_text)


def _plain(name: str) -> str:
    """A name without blanks around it and a file's suffix, with accents composed (NFC)."""
    name = unicodedata.normalize("NFC", name)
    while (plain := name.strip().removesuffix(SUFFIX)) != name:
        name = plain
    return name


def _weight(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"has the weight {short(value)} for {short(name)}: it must be a number, -4 to 4")
    if not abs(value) <= MAX_LORA_WEIGHT or not math.isfinite(value):
        raise ValueError(f"has the weight {short(value)} for {short(name)}: it must be -4 to 4")
    return float(value) + 0.0  # -0.0 is 0.0.


def _entries(value: object) -> Iterator[Lora]:
    if isinstance(value, str):
        yield from _of_text(value)
    elif isinstance(value, Mapping):
        if "name" in value and set(value) <= set(_KEYS):
            yield _of_object(value)
            return
        for name, each in value.items():
            yield _of_object({"name": name, **each}) if isinstance(each, Mapping) else lora_of(name, each)
    elif isinstance(value, list | tuple):
        for each in value:
            if isinstance(each, Lora):
                yield lora_of(each.name, each.weight, each.text_encoder_weight)
            elif isinstance(each, str):
                if len(value) > 1 and each.strip().lower() == _NONE:
                    raise ValueError(f"has {short(each)} beside others: it stands alone, for no LoRA")
                yield from _of_text(each)
            elif isinstance(each, Mapping):
                yield _of_object(each)
            else:
                raise ValueError(f"has {short(each)}: {_HOW}")
    else:
        raise ValueError(f"is {short(value)}: {_HOW}")


_HOW: Final = 'write a list such as [{"name": "detail", "weight": 0.8}], or detail=0.8'


def _of_object(value: Mapping[Any, Any]) -> Lora:
    if unknown := [each for each in value if each not in _KEYS]:
        raise ValueError(f"has {short(unknown[0])} beside a name: known are {', '.join(_KEYS)}")
    if "name" not in value:
        raise ValueError(f"has {short(dict(value))}, which has no name: {_HOW}")
    weight = value.get("weight")
    return lora_of(value["name"], 1.0 if weight is None else weight, value.get("text_encoder_weight"))


def _of_text(text: str) -> Iterator[Lora]:
    text = text.strip()
    if text[:1] in ("[", "{"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is {short(text)}, which is no JSON ({short(str(error))})") from None
        yield from _entries(value)
        return
    if text.lower() == _NONE:
        return
    for part in text.replace(",", ";").split(";"):
        if not part.strip():
            continue
        head, *rest = part.split(":")
        name, equals, weight = head.rpartition("=")
        text_weights = [each.strip() for each in rest]
        if len(rest) > 1 or not all(each.startswith(_TEXT_WEIGHT) for each in text_weights):
            raise ValueError(
                f"has {short(part.strip())}: write name, name=0.8, or name=0.8:te=0.5 for another weight "
                "in the text encoders"
            )
        where = short(part.strip())
        text_weight = weight_of(text_weights[0].removeprefix(_TEXT_WEIGHT), where) if text_weights else None
        yield (
            lora_of(name, weight_of(weight, where), text_weight)
            if equals
            else lora_of(head, 1.0, text_weight)
        )


def weight_of(text: str, where: str) -> float:
    """A weight that is written as text. Raises `ValueError`, with `where` it stands, as `read_loras` does."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"has {where}, and {short(text.strip())} is no weight: write a number, -4 to 4")
    return value


def shown_loras(value: object) -> str:
    """LoRAs as a text that `read_loras` reads: `detail=0.8; pixel=1:te=0.5`. Raises as that does."""
    loras = read_loras(value)
    if any(each in _PARTS or each == ":" for lora in loras for each in lora.name) or any(
        lora.name[0] in "[{" for lora in loras
    ):
        return json.dumps([each.model_dump() for each in loras], ensure_ascii=False)
    return "; ".join(
        f"{each.name}={number_text(each.weight)}"
        + (
            ""
            if each.text_encoder_weight is None
            else f":{_TEXT_WEIGHT}{number_text(each.text_encoder_weight)}"
        )
        for each in loras
    )


def number_text(value: float) -> str:
    """A weight as people write it: 1, 0.8."""
    return repr(value).removesuffix(".0")
