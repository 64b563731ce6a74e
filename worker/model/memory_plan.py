"""Plans what a model takes of a GPU's memory, before any of it is loaded. Numbers alone, no torch.

A worker takes the first of `_WAYS` that fits. All on the GPU is the fastest and comes first, so on a large
GPU nothing is given up. Then gives way first what costs least: the place of the text encoders, the size of a
batch, the decoding of whole pictures (tiles give the same but for rounding, and take four times as long), and
last compilation. No way changes a picture by more than rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

GIB: Final = 1 << 30
#: Bytes of torch's memory that belong to no part of the model: workspaces of cuBLAS and cuDNN on each stream,
#: texts that are kept (`worker.device.text.encoder.KEPT`), latents, and weights that compiled steps change.
#: SD 1.x at 2 rows takes 0.2 GiB beside its weights and its step (docs/performance.md).
BASE: Final = GIB // 2
#: Bytes that text encoders take which come to the GPU layer by layer: the largest table and its successor.
MOVED: Final = GIB // 4
#: Most pixels that are decoded at once, where memory allows: 8 pictures of 512 x 512.
CHUNK_PIXELS: Final = 8 * 512 * 512
#: What tiles take (`worker.device.vae.tiles`), in pixels that would be decoded whole: those of one tile, of
#: 256 px with its margin; and of each picture a share, 1 in so many, for what is kept whole between levels.
TILE_PIXELS, KEPT_SHARE = 320 * 320, 8
#: Rows of a step: of the one guided job that must fit; of two, which share a step, so that batching is of
#: use; beyond which memory goes to decoding first; and the most that are ever measured.
LEAST_ROWS, SHARED_ROWS, GOOD_ROWS, MOST_ROWS = 2, 4, 16, 64
#: The share of the memory, 1 in so many, that is left for what nobody plans; only what must fit takes of it.
SLACK: Final = 20
#: Forwards of one job each that a GPU runs side by side in exact mode: one alone does not fill it.
EXACT_AT_ONCE: Final = 4
#: Where nobody says how much LoRAs may take: a share of what the weights leave, and at most. As
#: `worker.device.loras.cache` chooses. Sets take a quarter more.
LORA_SHARE, LORA_MOST, LORA_SETS = 0.1, 8 * GIB, 1.25


class Texts(StrEnum):
    """Where text encoders are."""

    GPU = "on the GPU"
    MOVED = "in the host's memory, moved to the GPU layer by layer"
    HOST = "on the host, by its CPU"


@dataclass(frozen=True)
class Sizes:
    """What a model takes, in bytes, known before it is loaded."""

    #: Weights of the text encoders, and of all else.
    texts: int
    others: int
    #: Working memory of one row of a step at the default size, and of a pixel while the VAE decodes it.
    row: int
    pixel: int
    #: Pixels of a picture of the default size.
    pixels: int
    #: Working memory while the model is loaded, which is free again before the first step.
    loading: int = 0


@dataclass(frozen=True)
class Asked:
    """What the settings ask for."""

    compile: bool = True
    exact: bool = False
    #: Rows of a step; None: measured.
    rows: int | None = None
    #: Whether LoRAs are offered, and bytes in which they are kept; None: chosen.
    loras: bool = False
    lora_memory: int | None = None


class Decoding(NamedTuple):
    """How a VAE's working memory is bounded."""

    #: Pixels that are decoded at once, at most: of one picture or of several.
    pixels: int = CHUNK_PIXELS
    #: Whether a picture of more pixels is encoded and decoded in tiles. Otherwise it is tried whole.
    tiled: bool = False

    def is_tiled(self, width: int, height: int) -> bool:
        """Whether a picture of so many pixels goes through the VAE in tiles from the first on."""
        return self.tiled and width * height > self.pixels


#: Where memory is no question.
PLENTY: Final = Decoding()


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided. The defaults are those of a GPU with room for all."""

    texts: Texts = Texts.GPU
    #: Rows of a step of the default size, at most; None: as many as gain.
    rows: int | None = None
    decoding: Decoding = PLENTY
    #: Whether steps may be compiled and captured as CUDA graphs.
    compile: bool = True
    #: Bytes in which LoRAs are kept; None: chosen when the model is loaded.
    lora_memory: int | None = None
    #: What was decided, and why, for the log.
    what: str = ""
    why: str = ""


#: Where nothing is planned: all is where it always was.
UNPLANNED: Final = MemoryPlan()


class DoesNotFitError(Exception):
    """Raised when no way fits."""

    def __init__(self, needed: int, weights: int, loras: int) -> None:
        """Bytes of the way that takes the least; of them those of weights, and of LoRAs."""
        super().__init__(f"{needed} bytes")
        self.needed, self.weights, self.loras = needed, weights, loras


class _Way(NamedTuple):
    """A way to fit a model."""

    texts: Texts
    tiled: bool
    compiled: bool
    #: It is taken only where so many rows fit.
    rows: int


#: From the best to the smallest.
_WAYS: Final = (
    _Way(Texts.GPU, tiled=False, compiled=True, rows=SHARED_ROWS),
    _Way(Texts.MOVED, tiled=False, compiled=True, rows=SHARED_ROWS),
    _Way(Texts.MOVED, tiled=False, compiled=True, rows=LEAST_ROWS),
    _Way(Texts.MOVED, tiled=True, compiled=True, rows=SHARED_ROWS),
    _Way(Texts.MOVED, tiled=True, compiled=True, rows=LEAST_ROWS),
    _Way(Texts.MOVED, tiled=True, compiled=False, rows=LEAST_ROWS),
    _Way(Texts.HOST, tiled=True, compiled=False, rows=LEAST_ROWS),
)


def plan(sizes: Sizes, budget: int, asked: Asked) -> MemoryPlan:
    """How a model of these `sizes` is served within `budget` bytes. Raises `DoesNotFitError`."""
    loras = _loras(sizes, budget, asked)
    ways = dict.fromkeys(way._replace(compiled=way.compiled and asked.compile) for way in _WAYS)
    of_ways = [_Parts(sizes, asked, way, loras) for way in ways]
    for parts in of_ways:
        if parts.needs(parts.least_rows) <= budget:
            pixels = parts.chunk(budget)
            rows = parts.rows_within(budget, pixels)
            return _as_plan(of_ways[0], parts, rows, pixels, budget)
    smallest = min(of_ways, key=lambda parts: parts.needs(parts.least_rows))
    raise DoesNotFitError(smallest.needs(smallest.least_rows), smallest.weights, loras)


def _loras(sizes: Sizes, budget: int, asked: Asked) -> int:
    """Bytes for LoRAs, what is made of them included."""
    if not asked.loras:
        return 0
    kept = asked.lora_memory
    if kept is None:
        kept = min(LORA_MOST, int(LORA_SHARE * max(0, budget - sizes.texts - sizes.others)))
    return int(LORA_SETS * kept)


class _Parts:
    """What one way takes of the memory, part by part."""

    def __init__(self, sizes: Sizes, asked: Asked, way: _Way, loras: int) -> None:
        self.sizes, self.asked, self.way, self.loras = sizes, asked, way, loras
        self.weights = sizes.others + (sizes.texts if way.texts is Texts.GPU else 0)
        self.other = BASE + loras + (MOVED if way.texts is Texts.MOVED else 0)
        #: Forwards that hold memory of their own. Captured graphs keep theirs: those of the plain steps,
        #: which serve first, and those of the compiled ones, while one replaces the other.
        self.forwards = 1 + (EXACT_AT_ONCE if asked.exact else 1) * way.compiled
        #: Pixels of the default size that are decoded at once, at least.
        self.least_pixels = sizes.pixels
        if way.tiled:
            self.least_pixels = min(sizes.pixels, TILE_PIXELS) + sizes.pixels // KEPT_SHARE

    @property
    def least_rows(self) -> int:
        """Rows without which the way is not taken."""
        if self.asked.exact:
            return LEAST_ROWS
        return max(LEAST_ROWS, min(self.way.rows, self.asked.rows or self.way.rows))

    def steps(self, rows: int) -> int:
        """Of steps of so many rows. In exact mode each job is alone."""
        return self.forwards * self.sizes.row * (LEAST_ROWS if self.asked.exact else rows)

    def needs(self, rows: int, pixels: int | None = None) -> int:
        """All together, with so many `pixels` decoded at once."""
        working = self.steps(rows) + self.sizes.pixel * (pixels or self.least_pixels)
        return self.weights + self.other + max(working, self.sizes.loading)

    def chunk(self, budget: int) -> int:
        """Pixels that are decoded at once, where steps have `GOOD_ROWS` or as many as fit."""
        if self.way.tiled or self.asked.exact:
            return self.least_pixels
        fixed = self.weights + self.other + self.steps(self.rows_within(budget, None, GOOD_ROWS))
        pixels = min(CHUNK_PIXELS, (budget - budget // SLACK - fixed) // self.sizes.pixel)
        return max(1, pixels // self.sizes.pixels) * self.sizes.pixels

    def rows_within(self, budget: int, pixels: int | None, most: int = MOST_ROWS) -> int:
        """The most rows that fit, up to `most`, in steps in which captured batches grow."""
        most = min(most, self.asked.rows or most)
        if self.asked.exact:
            return most
        fixed = self.weights + self.other + self.sizes.pixel * (pixels or self.least_pixels)
        fit = (budget - budget // SLACK - fixed) // (self.forwards * self.sizes.row)
        fit -= fit % (2 if fit <= 8 else 4 if fit <= 32 else 8)
        return max(self.least_rows, min(most, fit))


def _as_plan(first: _Parts, parts: _Parts, rows: int, pixels: int, budget: int) -> MemoryPlan:
    way, asked = parts.way, parts.asked
    bounded = rows < (asked.rows or MOST_ROWS)
    is_whole = not bounded and pixels >= min(CHUNK_PIXELS, parts.sizes.pixels) and parts is first
    words = [] if way.texts is Texts.GPU else [f"text encoders {way.texts}"]
    if way.tiled:
        words.append("pictures decoded in tiles")
    if asked.compile and not way.compiled:
        words.append("steps not compiled")
    if bounded:
        words.append(f"at most {rows} rows in a step")
    made_of = (
        f"weights {_gib(parts.weights)}, steps {_gib(parts.steps(rows))}, decoding "
        f"{_gib(parts.sizes.pixel * pixels)}, other {_gib(parts.other)}"
    )
    why = f"{_gib(parts.needs(rows, pixels))} of {_gib(budget)} GiB planned: {made_of}"
    if parts is not first:
        why += f"; with all on the GPU it would be {_gib(first.needs(first.least_rows))}"
    return MemoryPlan(
        texts=way.texts,
        rows=rows if bounded else None,
        decoding=PLENTY if is_whole else Decoding(pixels, way.tiled),
        compile=way.compiled or not asked.compile,
        lora_memory=None if is_whole or not asked.loras else int(parts.loras / LORA_SETS),
        what="; ".join(["all on the GPU" if way.texts is Texts.GPU else words.pop(0), *words]),
        why=why,
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
