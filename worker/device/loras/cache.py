"""The LoRAs that jobs name: loaded, kept by use, and made the set of a job (`worker.device.loras.job_set`).

A file is read once, and kept in the host's memory and on the device. What was used least lately goes first.
All of it happens on the thread that prepares a job, and no step waits for it.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch

from worker.contract.errors import InvalidJobError, RenderError
from worker.contract.file_index import Kind
from worker.contract.job import Job
from worker.contract.job_files import loras_of
from worker.contract.loras import Lora
from worker.device.errors import is_out_of_memory
from worker.device.family import ModelFamily
from worker.device.loras.factors import StoredFile, joined
from worker.device.loras.job_set import Adaptable, LayerFactors, LoraSet
from worker.device.loras.text import TextLoras
from worker.device.text.embeddings import Files
from worker.model import gpu_memory
from worker.model.beside import lora_files
from worker.model.placement import Choice

logger = logging.getLogger("smallcat.engine")

#: Bytes that are kept in the host's memory beside a GPU, as a multiple of those on the GPU.
HOST_SHARE = 4
#: Bytes that are kept where nobody says: a share of what the model leaves free, and at most.
FREE_SHARE, MOST = 0.1, 8 << 30


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Sized)
Made = TypeVar("Made")


class _Kept(Generic[T]):
    """Things up to so many bytes, those that were used last. Thread-safe."""

    def __init__(self, limit: int) -> None:
        #: Bytes.
        self.limit = limit
        self._things: OrderedDict[Hashable, T] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> T | None:
        """What is kept under a key."""
        with self._lock:
            if (known := self._things.get(key)) is not None:
                self._things.move_to_end(key)
            return known

    def put(self, key: Hashable, thing: T) -> None:
        """Keep it, and let others go. What is larger than all that may be kept is not kept."""
        with self._lock:
            if (before := self._things.pop(key, None)) is not None:
                self._bytes -= before.nbytes
            self._things[key] = thing
            self._bytes += thing.nbytes
            self._shrink_to(self.limit)

    def __contains__(self, key: Hashable) -> bool:
        """Whether something is kept under a key."""
        return key in self._things

    def drop(self, is_useless: Callable[[Hashable], bool]) -> None:
        """Let go of what is kept under such keys."""
        with self._lock:
            for key in [key for key in self._things if is_useless(key)]:
                self._bytes -= self._things.pop(key).nbytes

    def shrink_to(self, limit: int) -> None:
        """Let go of all that is beyond so many bytes."""
        with self._lock:
            self._shrink_to(limit)

    @property
    def nbytes(self) -> int:
        """Of all."""
        return self._bytes

    def _shrink_to(self, limit: int) -> None:
        while self._bytes > limit:
            self._bytes -= self._things.popitem(last=False)[1].nbytes


@dataclass(frozen=True, eq=False)
class JobLoras:
    """What a job's LoRAs change."""

    #: Of the denoising model; None: nothing.
    unet: LoraSet | None = None
    #: Of its text encoders; None: nothing.
    texts: TextLoras | None = None
    #: Bytes that the files' own buffers do not hold.
    nbytes: int = 0
    #: SHA-256 of the files that have no part for text encoders.
    without_texts: frozenset[str] = frozenset()

    def warnings(self, job: Job) -> tuple[str, ...]:
        """A sentence for each LoRA of the job that has a weight of its own in text encoders, and no part."""
        return tuple(
            f'The LoRA "{each.name}" has no part for text encoders, so te={each.text_encoder_weight:g} '
            "changes nothing: leave it out."
            for sha256, each in loras_of(job)
            if each.text_encoder_weight and sha256 in self.without_texts
        )


#: Those of most jobs.
NO_LORAS = JobLoras()


class Loras:
    """Loads the LoRAs of jobs. Thread-safe: those wait for each other who want the same file."""

    def __init__(
        self,
        files: Files | None,
        family: ModelFamily,
        device: torch.device,
        memory: int | None,
        planned: int | None = None,
    ) -> None:
        """`memory`: bytes of the device's memory in which they are kept; None: `planned`, which was made sure
        of; None as well: chosen by what is free.
        """
        self._files, self._family, self._device = files, family, device
        if memory is not None:
            limit, reason = memory, "SMALLCAT_LORA_MEMORY asks for it"
        elif planned is not None:
            limit, reason = planned, "planned, see memory"
        else:
            limit, reason = _choose(device)
        #: What was chosen, for the log.
        self.choice = Choice("LoRA memory", f"{limit / 2**30:.2f} GiB", reason)
        self._on_device: _Kept[StoredFile] = _Kept(limit)
        self._sets: _Kept[JobLoras] = _Kept(limit // 4)
        self._in_host: _Kept[StoredFile] = _Kept(limit * HOST_SHARE)
        self._loading: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def limit(self) -> int:
        """Bytes of the device's memory that are kept, at most."""
        return self._on_device.limit

    def of(self, job: Job) -> JobLoras:
        """What a job's LoRAs change. On a GPU all is launched on the current stream.

        Raises `InvalidJobError` for one that the model cannot take, and `RenderError` for one that is gone.
        """
        if not (named := loras_of(job)):
            return NO_LORAS
        key = tuple((sha256, each.weight, each.in_text_encoders) for sha256, each in named)
        if (known := self._sets.get(key)) is not None:
            for sha256, _ in named:
                self._on_device.get(sha256)  # It is in use.
            return known
        adaptable = self._family.adaptable()
        if adaptable is None:
            raise InvalidJobError(f'loras has "{named[0][1].name}", but this model takes none: leave it out.')
        files = [(self._file(sha256, each.name, adaptable), each) for sha256, each in named]
        made = self._with_room(lambda: self._made(key, files, adaptable))
        self._sets.put(key, made)
        # A set holds its files' buffers: where one is let go, the set would keep it.
        self._sets.drop(self._lacks_a_file)
        return made

    def _lacks_a_file(self, key: Hashable) -> bool:
        """Whether a set with this key is made of a file that is not kept."""
        return any(sha256 not in self._on_device for sha256, *_ in cast("tuple[tuple[str, Any], ...]", key))

    def none(self) -> LoraSet | None:
        """A set that changes nothing; None where the model takes none."""
        adaptable = self._family.adaptable()
        return None if adaptable is None else LoraSet.of((), {}, adaptable.places, self._device)

    def example(self, rank: int) -> LoraSet | None:
        """A set that does the work of one of that rank at every layer of attention and feed-forward.

        It changes no picture. None where the model takes none.
        """
        if (adaptable := self._family.adaptable()) is None:
            return None
        sides: dict[str, tuple[int, int]] = {}
        for name in adaptable.places.common:
            weight = adaptable.weights[name]
            sides[name] = weight[0].numel(), len(weight)
        zeros = weight.new_zeros(rank * max(map(max, sides.values())))
        layers = {
            name: LayerFactors(
                zeros[: rank * taken].view(rank, -1), zeros[: rank * given].view(rank, -1), 1.0
            )
            for name, (taken, given) in sides.items()
        }
        return LoraSet.of(("example", rank), layers, adaptable.places, self._device)

    def lower(self) -> None:
        """Keep half of what is kept on the device now: memory ran out. What is in use stays."""
        if not self._on_device.nbytes + self._sets.nbytes:
            return
        for kept in (self._on_device, self._sets):
            if kept.nbytes:
                kept.limit = kept.nbytes // 2
                kept.shrink_to(kept.limit)
        self._sets.drop(self._lacks_a_file)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning(
            "Memory ran out: from now on LoRAs keep at most %.2f GiB of the device.", self.limit / 2**30
        )

    def _made(
        self,
        key: tuple[tuple[str, float, float], ...],
        files: list[tuple[StoredFile, Lora]],
        adaptable: Adaptable,
    ) -> JobLoras:
        unet = joined([(file, each.weight) for file, each in files], 0, adaptable.weights)
        texts = []
        for number, encoder in enumerate(adaptable.text_encoders):
            own = {name: _weight(encoder, name) for name in _names(files, number + 1)}
            texts.append(joined([(file, each.in_text_encoders) for file, each in files], number + 1, own))
        lora_set = LoraSet.of(key, unet, adaptable.places, self._device) if unet else None
        buffers = {file.buffer.untyped_storage().data_ptr() for file, _ in files}
        owned = [tensor for part in (unet, *texts) for each in part.values() for tensor in each.tensors()]
        owned = [each for each in owned if each.untyped_storage().data_ptr() not in buffers]
        if lora_set is not None:
            owned.append(lora_set.table)
        if self._device.type == "cuda":
            for tensor in (*owned, *(file.buffer for file, _ in files)):
                # Its memory is not given to others before the steps that read it are done.
                tensor.record_stream(torch.cuda.default_stream(self._device))
        return JobLoras(
            lora_set,
            TextLoras(key, texts) if any(texts) else None,
            sum(each.nbytes for each in owned),
            frozenset(
                sha256 for (sha256, *_), (file, _) in zip(key, files, strict=True) if not any(file.parts[1:])
            ),
        )

    def _file(self, sha256: str, name: str, adaptable: Adaptable) -> StoredFile:
        """A file's factors on the device."""
        with self._lock:
            loading = self._loading.setdefault(sha256, threading.Lock())
        with loading:
            if (known := self._on_device.get(sha256)) is not None:
                return known
            in_host = self._read(sha256, name, adaptable)
            file = self._with_room(lambda: in_host.to(self._device))
            self._on_device.put(sha256, file)
            return file

    def _read(self, sha256: str, name: str, adaptable: Adaptable) -> StoredFile:
        """A file's factors in the host's memory."""
        if (known := self._in_host.get(sha256)) is not None:
            return known
        path = self._files.path(Kind.LORA, sha256) if self._files else None
        if path is None:
            raise RenderError(f'The LoRA "{name}" was taken away while a job asked for it.')
        dtype = next(iter(adaptable.weights.values())).dtype
        file = StoredFile.of(lora_files.load(path, name, sha256, adaptable.targets), dtype, name)
        if self._device.type != "cpu":
            self._in_host.put(sha256, file)
        return file

    def _with_room(self, make: Callable[[], Made]) -> Made:
        """What `make` makes. Where it does not fit, once more without those that no job uses.

        From then on no more is kept than there was; half of that where it does not fit then either. Raises
        then what torch raises.
        """
        try:
            return make()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        for kept in (self._on_device, self._sets):
            if kept.nbytes:  # One more than these did not fit.
                kept.limit = kept.nbytes
            kept.shrink_to(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning(
            "Memory ran out while a LoRA was loaded: from now on LoRAs keep at most %.2f GiB of the device.",
            self.limit / 2**30,
        )
        try:
            return make()
        except Exception:
            self._on_device.limit //= 2
            self._sets.limit //= 2
            raise


def _weight(model: torch.nn.Module, name: str) -> torch.Tensor:
    return cast(torch.Tensor, model.get_submodule(name).weight)


def _names(files: list[tuple[StoredFile, Lora]], part: int) -> set[str]:
    return {name for file, _ in files if part < len(file.parts) for name in file.parts[part]}


def _choose(device: torch.device) -> tuple[int, str]:
    """Bytes in which LoRAs are kept, and why."""
    if device.type != "cuda":
        return MOST // 8, "as much as anywhere without a GPU"
    free = gpu_memory.room(device)
    return min(MOST, int(free * FREE_SHARE)), (
        f"{FREE_SHARE:.0%} of the {free / 2**30:.1f} GiB that the model leaves free, at most {MOST >> 30} GiB"
    )
