"""Lines of options, as AUTOMATIC1111's script "Prompts from file or textbox" reads them.

    --prompt "a small cat" --negative_prompt "blurry" --steps 30 --seed 7 --width 512 --cfg_scale 7

The line is split into words as by a shell. The two prompts take all words up to the next option.
"""

from __future__ import annotations

import difflib
import shlex
from dataclasses import dataclass, field
from typing import Any

from worker.contract.job import JOB_FIELDS

#: Options that mean a job field, by their names.
_FIELDS = {each.a1111_option: each for each in JOB_FIELDS.values() if each.a1111_option}
#: For each of these the choices by AUTOMATIC1111's names for them, in lower case.
_CHOICES = {
    option: {name.lower(): str(choice) for choice, name in each.a1111_values.items()}
    for option, each in _FIELDS.items()
}
#: Options that ask for several pictures: their product is the number of pictures.
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


@dataclass
class Options:
    """What a line of options means."""

    #: Job fields.
    fields: dict[str, Any] = field(default_factory=dict)
    #: Number of pictures it asks for.
    images: int = 1
    #: Names of options that have no meaning here.
    ignored: list[str] = field(default_factory=list)


def read_options(line: str) -> Options:
    """The options of a line. Raises `ValueError` that says what is wrong and what to do."""
    words = shlex.split(line)
    options = Options()
    while words:
        word = words.pop(0)
        name = word.removeprefix("--")
        if name == word:
            raise ValueError(f'"{word}" stands where an option should: put quotes around texts.')
        if name not in _FIELDS and name not in _COUNTS and name not in _IGNORED:
            near = difflib.get_close_matches(name, [*_FIELDS, *_COUNTS], 1)
            hint = f"did you mean --{near[0]}?" if near else f"known are {', '.join(_FIELDS)}."
            raise ValueError(f"there is no option --{name}: {hint}")
        if not words:
            raise ValueError(f"--{name} is the last word: give it a value.")
        value = words.pop(0)
        if name in _FIELDS and _FIELDS[name].is_prompt:
            while words and not words[0].startswith("--"):
                value += " " + words.pop(0)
        _take(options, name, value)
    return options


def _take(options: Options, name: str, value: str) -> None:
    if name in _FIELDS:
        entry = _FIELDS[name]
        typed = _typed(entry.kind, name, value)
        # -1 is AUTOMATIC1111's way of asking for a random seed.
        if name != "seed" or typed != -1:
            options.fields[entry.name] = _CHOICES[name].get(value.lower(), typed)
    elif name in _COUNTS:
        count = _typed(int, name, value)
        if not 1 <= count <= 10_000:
            raise ValueError(f"--{name} is {count}: it must be 1 to 10,000.")
        options.images *= count
    else:
        options.ignored.append(name)


def _typed(kind: type, name: str, value: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f'--{name} is "{value}": it must be a number.') from None
