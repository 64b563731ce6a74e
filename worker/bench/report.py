"""The results of a benchmark: records for tables, JSON and plots. Nothing is measured or drawn here.

a  `Cat`    one picture, "a small cat", with and without memory-efficient attention, as PhotoRoom in 2022
b  `Point`  time and memory of one attention layer by the size of the picture
c  `Rate`   throughput by the number of jobs in a batch
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

#: The experiments that are measured in one process; d is in `peer_report`.
Experiment = Literal["a", "b", "c"]
#: Rows of the attention in b: a guided job has two.
ROWS = 2
#: Packages whose versions are reported with the figures.
PACKAGES = ("smallcat", "torch", "diffusers", "xformers")


@dataclass(frozen=True)
class Setup:
    """How the UNet runs."""

    #: Attention backend: naive is the baseline of 2022, xformers and sdpa are memory-efficient.
    attention: str
    #: Whether it is compiled and captured in CUDA graphs; otherwise it is eager, as in 2022.
    compiled: bool

    @property
    def how(self) -> str:
        """In one word."""
        return "compiled" if self.compiled else "eager"

    def __str__(self) -> str:
        return f"{self.attention}, {self.how}"


@dataclass(frozen=True)
class Cat:
    """One picture alone, including text encoding and decoding."""

    setup: Setup
    #: Seconds from the prompt to the pixels.
    seconds: float | None = None
    #: Peak memory of the GPU with the weights, in GiB; None on a CPU, and if compiled.
    memory_gib: float | None = None
    #: Why there are no figures.
    left_out: str = ""


@dataclass(frozen=True)
class Point:
    """One self-attention layer alone, for `ROWS` rows."""

    attention: str
    #: Side of the square picture in pixels, and its tokens in this layer.
    side_px: int
    tokens: int
    milliseconds: float | None = None
    #: Peak memory beyond its inputs, in MiB; None if the system does not report it.
    memory_mib: float | None = None
    #: Why there are no figures.
    left_out: str = ""


@dataclass(frozen=True)
class Rate:
    """The throughput of a batch of jobs: its steps, then its decoding."""

    setup: Setup
    jobs: int
    #: Milliseconds of one step of the batch, and of decoding all its pictures.
    step_ms: float | None = None
    decode_ms: float | None = None
    #: Pictures a second, from these two and the number of steps.
    images_per_s: float | None = None
    #: As in `Cat`.
    memory_gib: float | None = None
    #: Why there are no figures.
    left_out: str = ""


@dataclass(frozen=True)
class Report:
    """All figures, and the conditions that they depend on."""

    #: Such as "cuda (NVIDIA H200)" or "cpu (2 threads)".
    device: str
    #: Versions by package, and of Python.
    versions: dict[str, str]
    #: Day, ISO 8601.
    date: str
    #: The command that was run.
    command: str
    #: The model's name and dtype.
    model: str
    dtype: str
    #: Size in pixels, steps and guidance of every picture in a and c.
    width: int
    height: int
    steps: int
    guidance_scale: float
    #: Attention backends that do not work on this machine, with the reason.
    refused: dict[str, str]
    cats: Sequence[Cat] = ()
    points: Sequence[Point] = ()
    rates: Sequence[Rate] = ()

    def conditions(self, experiment: Experiment) -> str:
        """How and on what `experiment` was measured, for the caption below its figures."""
        size = f"{self.width}x{self.height} px"
        of = {
            "a": f"{size}, {self.steps} steps, guidance {self.guidance_scale:g}, including text and decoding",
            "b": f"the UNet's first attention, {ROWS} rows",
            "c": f"{size}, {self.steps} steps, guidance {self.guidance_scale:g}, steps, then decoding",
        }[experiment]
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.model}, {of}. {self.device}, {self.dtype}, {packages}, {self.date}. {self.command}"

    def as_json(self) -> str:
        """All fields as JSON. Numbers keep all digits."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def images_per_s(jobs: int, steps: int, step_s: float, decode_s: float) -> float:
    """Throughput of batches of `jobs` jobs that take `steps` steps each and are then decoded."""
    return jobs / (steps * step_s + decode_s)


def exponent(pairs: Iterable[tuple[float, float]]) -> float | None:
    """The p for which y grows as x to the power of p, for pairs (x, y); None for less than two pairs.

    1 is linear, 2 is quadratic. By least squares on logarithms.
    """
    logs = [(math.log(x), math.log(y)) for x, y in pairs if x > 0 and y > 0]
    mean_x = sum(x for x, _ in logs) / max(1, len(logs))
    mean_y = sum(y for _, y in logs) / max(1, len(logs))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread if spread else None


def growth(points: Sequence[Point], attention: str) -> tuple[float | None, float | None]:
    """The powers of the number of tokens with which a backend's time and memory grow.

    Only the larger half of the sizes counts: at small ones, launches and the allocator dominate.
    """
    measured = [each for each in points if each.attention == attention and not each.left_out]
    measured = measured[-max(2, len(measured) // 2) :]
    return (
        exponent((each.tokens, each.milliseconds) for each in measured if each.milliseconds is not None),
        exponent((each.tokens, each.memory_mib) for each in measured if each.memory_mib is not None),
    )
