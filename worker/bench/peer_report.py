"""The results of experiment d, beside what people would use instead. Nothing is measured or drawn here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

#: Ways to draw the same pictures, in the order of measuring.
PeerName = Literal["naive", "eager", "batched", "compiled", "smallcat"]
#: What each is, for tables.
TITLES: dict[PeerName, str] = {
    "naive": "diffusers, naive attention, one by one",
    "eager": "diffusers, one by one",
    "batched": "diffusers",
    "compiled": "diffusers, compiled",
    "smallcat": "smallcat's engine",
}


@dataclass(frozen=True)
class Task:
    """What a process is to measure."""

    peer: PeerName
    #: A folder in the format of diffusers, or a name on the hub.
    model: str
    steps: int
    #: Seconds to warm up, after the first batch, and to measure.
    warm_s: float
    seconds: float
    #: torch.compile's mode.
    mode: str
    #: Pictures in a batch; 0: as many as are usual for the model's size.
    batch: int
    #: Where the pictures for the comparison are put: an .npy file.
    pictures: str


@dataclass(frozen=True)
class Peer:
    """The rate of one way to draw."""

    peer: PeerName
    #: Pictures in a batch; 0: the engine decides.
    batch: int
    images_s: float | None = None
    #: Medians while it was measured: clock of the GPU in MHz, power in W.
    mhz: float | None = None
    watts: float | None = None
    #: Peak of the GPU's memory in GiB, weights included.
    memory_gib: float | None = None
    #: Seconds until the first batch was drawn: loading and compiling.
    first_s: float | None = None
    #: How near its pictures are to those of diffusers one at a time, in dB, of the worst one; 100: equal.
    psnr_db: float | None = None
    #: Why there are no figures.
    left_out: str = ""

    @property
    def title(self) -> str:
        """What it is."""
        return TITLES[self.peer] + (f", batches of {self.batch}" if self.batch > 1 else "")


@dataclass(frozen=True)
class PeerReport:
    """All figures of one model, and their conditions."""

    device: str
    dtype: str
    versions: dict[str, str]
    #: Day, ISO 8601.
    date: str
    command: str
    model: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    warm_s: float
    seconds: float
    #: torch.compile's mode.
    mode: str
    peers: Sequence[Peer] = ()

    def ratio(self, peer: Peer) -> float | None:
        """How many times as fast as diffusers one at a time; None where one of the two has no figure."""
        base = next((each.images_s for each in self.peers if each.peer == "eager"), None)
        return peer.images_s / base if base and peer.images_s else None

    @property
    def conditions(self) -> str:
        """How and on what it was measured, for the caption."""
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.model}, {self.width}x{self.height} px, {self.steps} steps, guidance "
            f"{self.guidance_scale:g}, euler, text and decoding included; {self.seconds:g} s each after "
            f"{self.warm_s:g} s of load; compiled: channels_last, fused QKV, mode {self.mode}. "
            f"{self.device}, {self.dtype}, {packages}, {self.date}. {self.command}"
        )

    def as_json(self) -> str:
        """All fields as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, text: str) -> Self:
        """From `as_json`."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "peers": [Peer(**each) for each in fields["peers"]]})
