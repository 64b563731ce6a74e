"""Metadata that tools write as JSON, or as options, as job fields: SwarmUI, Fooocus, InvokeAI, Civitai.

Each has a table of its names. What is in no table is named as left out.
Sources: SwarmUI 0.9 (src/Text2Image/T2IParamTypes.cs), Fooocus 2.5 (modules/meta_parser.py), InvokeAI 5
(app/invocations/metadata.py), InvokeAI 2 (ldm/invoke/args.py), Civitai's generator of 2025.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from worker.contract.errors import InvalidJobError
from worker.contract.explain import short
from worker.contract.job import JOB_FIELDS
from worker.contract.job_fields import truth_of
from worker.contract.metadata.reading import Reading, is_neutral, left_out, number, text
from worker.contract.scheduler_names import pair_of

#: What every tool says beside that and no job needs.
_HARMLESS = frozenset(
    (
        *("model", "model_hash", "model_weights", "base_model", "base_model_hash", "version", "app_version"),
        *("metadata_scheme", "created_by", "performance", "swarm_version", "date", "generation_time"),
        *("images", "aspectratio", "sidelength", "app_id", "metadata_version", "rand_device", "type"),
        *(
            "generation_mode",
            "prep_time",
            "automaticvae",
            "donotsave",
            "personalnote",
            "refiner_swap_method",
            "queue_item_id",
        ),
        *("original_prompt", "original_negativeprompt", "full_prompt", "full_negative_prompt", "workflowid"),
        *(
            "refiner_switch",
            "negative_style_prompt",
            "positive_style_prompt",
            "baseModel".casefold(),
            "engine",
        ),
    )
)


def read_json(value: Mapping[str, Any]) -> Reading | None:
    """What the JSON object of a tool says; None where it is of none of these tools.

    Raises `InvalidJobError` for a value that no job can have.
    """
    if isinstance(params := value.get("sui_image_params"), dict):
        return _swarm(params)
    if "positive_prompt" in value:
        return _invoke(value)
    if isinstance(image := value.get("image"), dict) and "prompt" in image:
        return _old_invoke(image)
    if "negativePrompt" in value and "cfgScale" in value:
        return _civitai(value)
    plain = {re.sub(r"\s+", "_", name.strip().lower()): each for name, each in value.items()}
    if "prompt" in plain and any(each in plain for each in _OF_FOOOCUS):
        return _fooocus(plain)
    return None


def _fields(value: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The job fields of `value` by the table `names` from a tool's names; neutral ones are left open."""
    fields: dict[str, Any] = {}
    for name, field in names.items():
        found = value.get(name)
        if found is None or field in fields:
            continue
        kind = JOB_FIELDS[field].kind
        if kind is str:
            fields[field] = text(name, found)
        elif kind is bool:
            fields[field] = found if (truth := truth_of(str(found))) is None else truth
        elif str(found).strip() not in ("", "-1"):
            fields[field] = number(int if kind is int else float, name, found)
    return fields


def _scheduler(value: Mapping[str, Any], samplers: tuple[str, ...], schedule: str = "") -> dict[str, Any]:
    """The scheduler of the first of `samplers` that is given, with the schedule."""
    sampler = next((value[name] for name in samplers if not is_neutral(value.get(name))), None)
    other = value.get(schedule)
    if sampler is None and is_neutral(other):
        return {}
    if is_neutral(other):
        other = None
    return pair_of(
        None if sampler is None else text(samplers[0], sampler),
        None if other is None else text(schedule, other),
    ).fields()


_SWARM = {
    "prompt": "prompt",
    "negativeprompt": "negative_prompt",
    "seed": "seed",
    "steps": "steps",
    "cfgscale": "guidance_scale",
    "width": "width",
    "height": "height",
}


def _swarm(value: Mapping[str, Any]) -> Reading:
    samplers = ("sampler", "comfyuisampler", "autowebuisampler")
    fields = _fields(value, _SWARM)
    schedule = "scheduler" if "scheduler" in value else "comfyuischeduler"
    fields |= _scheduler(value, samplers, schedule)
    if not is_neutral(value.get("initimage")):
        raise _other_start("initimage")
    return Reading(fields, tuple(left_out(value, (*_SWARM, *samplers, schedule), _HARMLESS)))


#: Names of which Fooocus has one at least.
_OF_FOOOCUS = ("metadata_scheme", "base_model", "adm_guidance", "guidance_scale", "resolution")
_FOOOCUS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "steps": "steps",
    "guidance_scale": "guidance_scale",
}


def _fooocus(value: Mapping[str, Any]) -> Reading:
    """Fooocus' own scheme. Its styles are left out: they add to the prompt."""
    fields = _fields(value, _FOOOCUS)
    fields |= _scheduler(value, ("sampler",), "scheduler")
    if (size := value.get("resolution")) is not None:
        sides = re.fullmatch(r"\(?['\"]?(\d{1,5})['\"]?\s*[,x*×]\s*['\"]?(\d{1,5})['\"]?\)?", str(size)[:40])
        if sides is None:
            raise InvalidJobError(f"The metadata has resolution: {short(size)}, which is no size.")
        fields |= {"width": int(sides[1]), "height": int(sides[2])}
    # Fooocus' own value is the neutral one; 2 is what it does with every model.
    others = {name: each for name, each in value.items() if (name, str(each)) != ("clip_skip", "2")}
    return Reading(
        fields, tuple(left_out(others, (*_FOOOCUS, "sampler", "scheduler", "resolution"), _HARMLESS))
    )


_INVOKE = {
    "positive_prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "steps": "steps",
    "cfg_scale": "guidance_scale",
    "width": "width",
    "height": "height",
}


def _invoke(value: Mapping[str, Any]) -> Reading:
    """InvokeAI from version 3 on."""
    mode = value.get("generation_mode")
    if mode is not None and not str(mode).endswith("txt2img"):
        raise InvalidJobError(f"The metadata has generation_mode: {short(mode)}, which is no text to image.")
    fields = _fields(value, _INVOKE) | _scheduler(value, ("scheduler",))
    left = list(left_out(value, (*_INVOKE, "scheduler"), _HARMLESS))
    for name, same in (("positive_style_prompt", "prompt"), ("negative_style_prompt", "negative_prompt")):
        if not is_neutral(value.get(name)) and value[name] != fields.get(same):
            left.append(f"{name}: {short(value[name])}")
    return Reading(fields, tuple(left))


_OLD_INVOKE = {
    "seed": "seed",
    "steps": "steps",
    "cfg_scale": "guidance_scale",
    "width": "width",
    "height": "height",
}


def _old_invoke(image: Mapping[str, Any]) -> Reading:
    """InvokeAI's first two versions: several prompts with weights, and the negative one in brackets."""
    if str(image.get("type", "txt2img")) != "txt2img":
        raise _other_start(f"type: {short(image['type'])}")
    prompt = image["prompt"]
    if isinstance(prompt, list):
        if len(prompt) != 1 or not isinstance(prompt[0], dict):
            raise InvalidJobError(f"The metadata has {len(prompt)} prompts with weights: a job has one.")
        prompt = prompt[0].get("prompt")
    fields = (
        _in_brackets(text("prompt", prompt)) | _fields(image, _OLD_INVOKE) | _scheduler(image, ("sampler",))
    )
    return Reading(fields, tuple(left_out(image, (*_OLD_INVOKE, "prompt", "sampler"), _HARMLESS)))


def _in_brackets(prompt: str) -> dict[str, Any]:
    negatives = re.findall(r"\[([^\[\]]*)\]", prompt)
    if not negatives:
        return {"prompt": prompt}
    plain = re.sub(r"\s*\[[^\[\]]*\]", "", prompt).strip()
    return {"prompt": plain, "negative_prompt": " ".join(negatives)}


#: InvokeAI's options of "Dream", with a job field or the JSON's name for those that are left out.
_DREAM = {"s": "steps", "S": "seed", "W": "width", "H": "height", "C": "cfg_scale", "A": "sampler"}
#: An option with its value, which may stand right behind a letter: -s50.
_DREAM_OPTION = re.compile(r"(?:^|(?<=\s))-(-[A-Za-z][\w-]*|[A-Za-z])(?:[ =]?([^\s\"=-][^\s\"]*))?")
_DREAM_TEXT = re.compile(r'\s*"((?:[^"\\]++|\\.)*+)"(.*)|(.*?)(?=\s-[A-Za-z])(.*)', re.DOTALL)
#: A command is no longer than this.
_LONGEST_DREAM = 20_000


def read_dream(command: str) -> Reading | None:
    """InvokeAI's command, `"a cat" -s 50 -S 7 -W 512 -H 512 -C 7.5 -A k_lms`; None where it is none."""
    found = _DREAM_TEXT.fullmatch(command) if len(command) <= _LONGEST_DREAM else None
    if found is None:
        return None
    prompt, options = (found[1], found[2]) if found[1] is not None else (found[3], found[4])
    given: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for key, value in _DREAM_OPTION.findall(options):
        (given if key in _DREAM else others)[_DREAM.get(key, f"-{key}")] = value or "yes"
    if "steps" not in given or "seed" not in given:
        return None
    if "-I" in others or "--init_img" in others:
        raise _other_start("-I")
    fields = _in_brackets(prompt.replace('\\"', '"')) | _fields(given, _OLD_INVOKE)
    return Reading(fields | _scheduler(given, ("sampler",)), tuple(left_out(others, (), ("-n", "-b", "-o"))))


_CIVITAI = {
    "prompt": "prompt",
    "negativePrompt": "negative_prompt",
    "seed": "seed",
    "steps": "steps",
    "cfgScale": "guidance_scale",
    "width": "width",
    "height": "height",
}


def _civitai(value: Mapping[str, Any]) -> Reading:
    """What Civitai's generator writes beside its graph."""
    fields = _fields(value, _CIVITAI) | _scheduler(value, ("sampler",), "scheduler")
    return Reading(fields, tuple(left_out(value, (*_CIVITAI, "sampler", "scheduler"), _HARMLESS)))


def _other_start(name: str) -> InvalidJobError:
    return InvalidJobError(
        f"The metadata has {name}: the picture began with another one, a job with noise alone."
    )
