"""Lines of options, as AUTOMATIC1111's script "Prompts from file or textbox" reads them.

    --prompt "a small cat" --negative_prompt "blurry" --steps 30 --seed 7 --width 512 --cfg_scale 7

The words are cut as a shell would; the two prompts take all words up to the next option.
"""

from __future__ import annotations

import difflib
import shlex
from dataclasses import dataclass, field
from typing import Any

from worker.contract.infotext import SAMPLERS

#: Options with a meaning here: the job field, and what its text becomes.
_MEANT: dict[str, tuple[str, type]] = {
    "prompt": ("prompt", str),
    "negative_prompt": ("negative_prompt", str),
    "seed": ("seed", int),
    "steps": ("steps", int),
    "cfg_scale": ("guidance_scale", float),
    "width": ("width", int),
    "height": ("height", int),
    "sampler_name": ("scheduler", str),
    "sd_model": ("model", str),
}
#: Options that ask for several pictures: their product is how many.
_COUNTS = ("batch_size", "n_iter")
#: Options without a meaning here.
_IGNORED = (
    "outpath_samples",
    "outpath_grids",
    "prompt_for_display",
    "styles",
    "subseed_strength",
    "subseed",
    "seed_resize_from_h",
    "seed_resize_from_w",
    "sampler_index",
    "restore_faces",
    "tiling",
    "do_not_save_samples",
    "do_not_save_grid",
)
_SCHEDULERS = {name.lower(): str(scheduler) for scheduler, name in SAMPLERS.items()}


@dataclass
class Options:
    """What a line of options says."""

    #: Job fields.
    fields: dict[str, Any] = field(default_factory=dict)
    #: Pictures it asks for.
    images: int = 1
    #: Names of options that have no meaning here.
    ignored: list[str] = field(default_factory=list)


def read_options(line: str) -> Options:
    """The options of a line. Raises `ValueError` with what is wrong and what to do."""
    words = shlex.split(line)
    options = Options()
    while words:
        word = words.pop(0)
        name = word.removeprefix("--")
        if name == word:
            raise ValueError(f'"{word}" stands where an option should: put quotes around texts.')
        if name not in _MEANT and name not in _COUNTS and name not in _IGNORED:
            near = difflib.get_close_matches(name, [*_MEANT, *_COUNTS], 1)
            hint = f"did you mean --{near[0]}?" if near else f"known are {', '.join(_MEANT)}."
            raise ValueError(f"there is no option --{name}: {hint}")
        if not words:
            raise ValueError(f"--{name} is the last word: give it a value.")
        value = words.pop(0)
        if name in ("prompt", "negative_prompt"):
            while words and not words[0].startswith("--"):
                value += " " + words.pop(0)
        _take(options, name, value)
    return options


def _take(options: Options, name: str, value: str) -> None:
    if name in _IGNORED:
        options.ignored.append(name)
        return
    target, kind = _MEANT.get(name, (name, int))
    try:
        typed = kind(value)
    except ValueError:
        raise ValueError(f'--{name} is "{value}": it must be a number.') from None
    if name in _COUNTS:
        if not 1 <= typed <= 10_000:
            raise ValueError(f"--{name} is {typed}: it must be 1 to 10,000.")
        options.images *= typed
    elif name == "sampler_name":
        options.fields[target] = _SCHEDULERS.get(value.lower(), value)
    elif name == "seed" and typed == -1:
        return  # AUTOMATIC1111's way of asking for a random one.
    else:
        options.fields[target] = typed
