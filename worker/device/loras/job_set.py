"""What LoRAs change of a model's layers, and how a step of mixed jobs finds it.

A job's LoRAs are one set: for each layer that they change, one pair of factors and what DoRA needs besides.
On a GPU the set is also a table of addresses. The tables of a batch's jobs are an input of its step, and
the kernels read from them where each row's factors are. So a captured CUDA graph serves whatever LoRAs come
and go, nothing is copied before a step, and sets may have any number of LoRAs of any rank.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from worker.model.beside.lora_names import Targets

#: Numbers of a layer in a table, int64: the addresses of `down` and `up`, the rank, the bits of the scale in
#: float32, and the address of `after`. All are 0 where a job's LoRAs leave the layer as it is.
FIELDS = 5
#: Ranks that a step has room for. A batch takes the first that its sets fit in: of the first one, kernels do
#: two products at once.
ROOMS = (32, 128, 512, 2_048)


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """What is added to the output of one layer, W x without its bias: scale (x @ downᵀ) @ up.

    All tensors are contiguous, on the device.
    """

    #: (rank, in), or (rank, taps, in) of a convolution: a tap for each weight of its kernel, by rows.
    down: torch.Tensor
    #: (rank, out).
    up: torch.Tensor
    scale: float
    #: (out,) float32: DoRA's share of the layer's own output, which is multiplied with it; None: 1.
    after: torch.Tensor | None = None
    #: (in,) float32: the same of the layer's input, for magnitudes of inputs; None: 1.
    before: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """> 0."""
        return len(self.up)

    def beside(self, x: torch.Tensor) -> LayerFactors:
        """The same on the device and, but for DoRA's shares, in the dtype of `x`."""
        if self.down.device == x.device and self.down.dtype == x.dtype:
            return self
        return dataclasses.replace(
            self,
            down=self.down.to(x),
            up=self.up.to(x),
            after=None if self.after is None else self.after.to(x.device),
            before=None if self.before is None else self.before.to(x.device),
        )

    def tensors(self) -> list[torch.Tensor]:
        """All that there are."""
        return [each for each in (self.down, self.up, self.after, self.before) if each is not None]

    def entry(self) -> list[int]:
        """Its numbers in a table."""
        (bits,) = struct.unpack("<i", struct.pack("<f", self.scale))
        after = 0 if self.after is None else self.after.data_ptr()
        return [self.down.data_ptr(), self.up.data_ptr(), self.rank, bits, after]


@dataclass(frozen=True)
class Places:
    """Where the layers of a UNet are in a table."""

    #: The index of each layer, by its name.
    index: Mapping[str, int]
    #: Those that files change that change no convolution: attention and feed-forward.
    common: frozenset[str]


@dataclass(frozen=True)
class Adaptable:
    """What of a model LoRAs may change."""

    targets: Targets
    #: The layers of the UNet.
    places: Places
    #: The weight of each of them.
    weights: Mapping[str, torch.Tensor]
    #: The text encoders.
    text_encoders: Sequence[torch.nn.Module]


@dataclass(frozen=True, eq=False)
class LoraSet:
    """The LoRAs of a job, as one. Jobs of equal LoRAs share it, and nobody changes it."""

    #: Equal for sets of equal LoRAs at equal weights.
    key: Hashable
    layers: Mapping[str, LayerFactors]
    #: (layers of the model, FIELDS) int64, on the device.
    table: torch.Tensor
    #: Whether other layers than the common ones change.
    is_wide: bool = False
    #: Whether inputs of layers change, which the kernels do not do.
    needs_loop: bool = field(init=False)
    #: The largest rank of a layer.
    rank: int = field(init=False)

    def __post_init__(self) -> None:
        changes_inputs = any(each.before is not None for each in self.layers.values())
        object.__setattr__(self, "needs_loop", changes_inputs)
        object.__setattr__(self, "rank", max((each.rank for each in self.layers.values()), default=0))

    @classmethod
    def of(
        cls, key: Hashable, layers: Mapping[str, LayerFactors], places: Places, device: torch.device
    ) -> LoraSet:
        """The set of these factors. Without any, it changes nothing."""
        table = torch.zeros((len(places.index), FIELDS), dtype=torch.int64)
        for name, factors in layers.items():
            table[places.index[name]] = torch.tensor(factors.entry())
        return cls(key, layers, table.to(device), not places.common.issuperset(layers))


@dataclass(frozen=True)
class RowLoras:
    """The LoRAs of a batch's jobs."""

    #: (J, layers of the model, FIELDS) int64; zeros for jobs without.
    table: torch.Tensor
    #: (most rank,) int8: its length alone counts, so that it may differ from one CUDA graph to another while
    #: the compiled code is the same.
    room: torch.Tensor
    #: Whether other layers than the common ones change.
    is_wide: bool
    #: Whether the kernels cannot do it: then it is done without.
    needs_loop: bool
    #: The set of each job, None for one without; empty in a batch that stands for others.
    sets: tuple[LoraSet | None, ...] = ()

    @classmethod
    def of(cls, sets: Sequence[LoraSet | None]) -> RowLoras | None:
        """Those of jobs with these sets; None where no job has one."""
        there = [each for each in sets if each is not None]
        if not there:
            return None
        none = torch.zeros_like(there[0].table)
        rank = max(each.rank for each in there)
        room = next(room for room in ROOMS if rank <= room)
        return cls(
            torch.stack([none if each is None else each.table for each in sets]),
            torch.empty(room, dtype=torch.int8, device=none.device),
            any(each.is_wide for each in there),
            any(each.needs_loop for each in there),
            tuple(sets),
        )

    @property
    def kind(self) -> str:
        """What differs in the code of their step, for log and metrics."""
        return "LoRAs with convolutions" if self.is_wide else "LoRAs"

    def zeros(self, jobs: int) -> RowLoras:
        """Those of so many jobs without any, in the same room."""
        table = self.table.new_zeros((jobs, *self.table.shape[1:]))
        return RowLoras(table, torch.empty_like(self.room), self.is_wide, self.needs_loop)

    def padded(self, jobs: int) -> RowLoras:
        """The same for so many jobs, of which the last ones have none."""
        table = torch.nn.functional.pad(self.table, (0, 0, 0, 0, 0, jobs - len(self.table)))
        return dataclasses.replace(self, table=table)
