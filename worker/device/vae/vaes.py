"""VAEs that jobs name, loaded when a first job asks for one, and kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from worker.contract.errors import RenderError
from worker.contract.file_index import Kind
from worker.contract.job import Job
from worker.contract.job_files import vae_of
from worker.device.compiling.compiler import Compiler
from worker.device.family import ModelFamily
from worker.device.text.embeddings import Files
from worker.device.vae.decoder import VaeDecoder
from worker.device.vae.encoder import VaeEncoder
from worker.model.memory_plan import Decoding

#: VAEs that are kept on the device, at most: one of SDXL in fp32 has 335 MB. Jobs in flight keep theirs.
KEPT = 4


@dataclass(frozen=True)
class Vae:
    """Both ways through one VAE."""

    encoder: VaeEncoder
    decoder: VaeDecoder

    @classmethod
    def of(
        cls,
        family: ModelFamily,
        device: torch.device,
        *,
        alone: bool,
        planned: Decoding,
        compiler: Compiler | None = None,
    ) -> Vae:
        """That of a family. `planned`: by the plan of the memory. `alone`, `compiler`: as `VaeDecoder`."""
        decoder = VaeDecoder(family, device, alone=alone, compiler=compiler, decoding=planned)
        return cls(VaeEncoder(family, planned, compiler=compiler), decoder)


class Vaes:
    """The VAEs that jobs name. Thread-safe: loading makes those wait who want a VAE."""

    def __init__(
        self, files: Files | None, family: ModelFamily, vae_of: Callable[[ModelFamily], Vae]
    ) -> None:
        """`vae_of`: makes that of a family."""
        self._files, self._family, self._vae_of = files, family, vae_of
        self._kept: OrderedDict[str, Vae] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, job: Job) -> Vae | None:
        """The VAE that a job names; None: the model's own.

        Raises `InvalidJobError` for a VAE that does not fit the model, `RenderError` for one that is gone.
        """
        if not (sha256 := vae_of(job)):
            return None
        with self._lock:
            if (known := self._kept.get(sha256)) is None:
                path = self._files.path(Kind.VAE, sha256) if self._files else None
                if path is None:
                    raise RenderError(f'The VAE "{job.vae}" was taken away while a job asked for it.')
                family = self._family.with_vae(path, job.vae, sha256)
                # Not compiled: it would take minutes, at a moment that nobody chose.
                known = self._kept[sha256] = self._vae_of(family)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(sha256)
            return known
