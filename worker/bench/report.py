"""What a benchmark found: records that become a table, JSON and plots. No measuring here, and no drawing.

a  `Cat`    the origin's experiment: one picture, with and without memory-efficient attention
b  `Point`  one attention of the UNet by the picture's size: its time and its memory
c  `Rate`   pictures a second by the number of jobs in a batch
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

#: The three experiments.
Experiment = Literal["a", "b", "c"]
#: Rows of the attention in b: a guided job has two.
ROWS = 2
#: Packages whose versions belong to a figure.
PACKAGES = ("smallcat", "torch", "diffusers", "xformers")


@dataclass(frozen=True)
class Setup:
    """How the UNet runs."""

    #: Attention backend: naive is the baseline of 2022, xformers and sdpa are memory-efficient.
    attention: str
    #: Compiled and captured as CUDA graphs; else eager, as in 2022.
    compiled: bool

    @property
    def how(self) -> str:
        """In a word."""
        return "compiled" if self.compiled else "eager"

    def __str__(self) -> str:
        return f"{self.attention}, {self.how}"


@dataclass(frozen=True)
class Cat:
    """One picture alone, text and decoding included."""

    setup: Setup
    #: Seconds from the prompt to the pixels.
    seconds: float | None = None
    #: Most memory of the GPU at any time, weights included, in GiB; None on a CPU, and where compiled.
    memory_gib: float | None = None
    #: Why there are no figures.
    left_out: str = ""


@dataclass(frozen=True)
class Point:
    """One self-attention, alone, of `ROWS` rows."""

    attention: str
    #: Side of the square picture, in pixels, and the tokens that this makes.
    side_px: int
    tokens: int
    milliseconds: float | None = None
    #: Most memory beyond its inputs, in MiB; None where the system does not tell.
    memory_mib: float | None = None
    #: Why there are no figures.
    left_out: str = ""


@dataclass(frozen=True)
class Rate:
    """A batch of jobs: its steps and its decoding, one after the other."""

    setup: Setup
    jobs: int
    #: Milliseconds of one step of all, and of decoding all.
    step_ms: float | None = None
    decode_ms: float | None = None
    #: Pictures a second, from the two and the number of steps.
    images_per_s: float | None = None
    #: As a `Cat`'s.
    memory_gib: float | None = None
    #: Why there are no figures.
    left_out: str = ""


@dataclass(frozen=True)
class Report:
    """All that was found, with what it depends on."""

    #: Such as "NVIDIA H200" or "CPU, 2 threads".
    device: str
    #: By package, and of Python.
    versions: dict[str, str]
    #: ISO 8601 day.
    date: str
    #: What to type to get the same.
    command: str
    #: The model's name, and its arithmetic.
    model: str
    dtype: str
    #: Of every picture in a and c.
    width: int
    height: int
    steps: int
    guidance_scale: float
    #: Attention backends that do not work here, with the reason.
    refused: dict[str, str]
    cats: Sequence[Cat] = ()
    points: Sequence[Point] = ()
    rates: Sequence[Rate] = ()

    def conditions(self, experiment: Experiment) -> str:
        """What a figure of `experiment` was measured on and how, in a few sentences for under it."""
        size = f"{self.width}x{self.height} px"
        of = {
            "a": f"{size}, {self.steps} steps, guidance {self.guidance_scale:g}, text and decoding included",
            "b": f"the UNet's first attention, {ROWS} rows",
            "c": f"{size}, {self.steps} steps, guidance {self.guidance_scale:g}, steps and decoding in turn",
        }[experiment]
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.model}, {of}. {self.device}, {self.dtype}, {packages}, {self.date}. {self.command}"

    def as_json(self) -> str:
        """Everything, for other programs. Numbers keep their digits."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def images_per_s(jobs: int, steps: int, step_s: float, decode_s: float) -> float:
    """Pictures a second of batches of `jobs` jobs that all take `steps` steps and are then decoded."""
    return jobs / (steps * step_s + decode_s)


def exponent(pairs: Iterable[tuple[float, float]]) -> float | None:
    """The p for which the second of each pair grows as the first to the p; None for less than two pairs.

    By least squares on logarithms: 1 is linear, 2 is quadratic.
    """
    logs = [(math.log(x), math.log(y)) for x, y in pairs if x > 0 and y > 0]
    mean_x = sum(x for x, _ in logs) / max(1, len(logs))
    mean_y = sum(y for _, y in logs) / max(1, len(logs))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread if spread else None


def growth(points: Sequence[Point], attention: str) -> tuple[float | None, float | None]:
    """With which powers of the number of tokens time and memory of that backend grow, over the larger sizes.

    Small ones tell more of launches and of the allocator than of the algorithm.
    """
    told = [each for each in points if each.attention == attention and not each.left_out]
    told = told[-max(2, len(told) // 2) :]
    return (
        exponent((each.tokens, each.milliseconds) for each in told if each.milliseconds is not None),
        exponent((each.tokens, each.memory_mib) for each in told if each.memory_mib is not None),
    )
