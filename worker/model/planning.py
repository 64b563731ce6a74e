"""Plans the memory of the GPU that a worker has taken, before its model is loaded."""

from __future__ import annotations

import torch

from worker.contract.errors import SettingsError
from worker.contract.settings import WorkerSettings
from worker.model import gpu_memory, memory_sizes
from worker.model.files import ModelFiles
from worker.model.gpu_memory import gib
from worker.model.memory_plan import UNPLANNED, Asked, DoesNotFitError, MemoryPlan, plan
from worker.model.placement import Choice

#: The choice of a worker without a GPU.
NO_GPU = Choice("memory", "as much as it takes", "SMALLCAT_GPU_MEMORY is for a GPU, and there is none")


def planned(
    files: ModelFiles, settings: WorkerSettings, device: torch.device, dtype: torch.dtype, *, helps: bool
) -> tuple[MemoryPlan, tuple[Choice, ...]]:
    """The plan for the model in `files`, and what to log of it. From here on the settings' limit holds.

    `helps`: this process only compiles for a worker, whose plan counts. Raises `SettingsError` where the
    model does not fit.
    """
    if device.type != "cuda":
        return UNPLANNED, (NO_GPU,) if settings.gpu_memory else ()
    limited = gpu_memory.limit(device, settings.gpu_memory)
    naive = settings.attention_backend == "naive"
    sizes = memory_sizes.sizes_of(files, dtype.itemsize, naive=naive)
    if helps or sizes is None:
        return UNPLANNED, ()
    asked = Asked(
        compile=settings.compile,
        exact=settings.exact,
        rows=settings.max_batch,
        loras=bool(settings.loras),
        lora_memory=settings.lora_memory,
    )
    budget = gpu_memory.budget(device)
    try:
        found = plan(sizes, budget, asked)
    except DoesNotFitError as error:
        total = torch.cuda.get_device_properties(device).total_memory
        raise SettingsError(_too_small(files.source, settings, dtype, budget, total, error)) from None
    limits = (Choice("GPU memory", f"{gib(budget)} GiB for torch", limited),) if limited else ()
    return found, (*limits, Choice("memory", found.what, found.why))


def _too_small(
    source: str,
    settings: WorkerSettings,
    dtype: torch.dtype,
    budget: int,
    total: int,
    error: DoesNotFitError,
) -> str:
    there = f"{gib(budget)} of its {gib(total)} GiB are free"
    remedies = []
    if settings.gpu_memory:
        there = f"SMALLCAT_GPU_MEMORY={settings.gpu_memory} leaves {gib(budget)} of its {gib(total)} GiB"
        if (needed := error.needed + gpu_memory.OUTSIDE) <= total:
            # Rounded up, so that it is enough.
            remedies.append(f"set it to {gib(needed + (1 << 30) // 20)}GiB or more")
    if dtype == torch.float32:
        remedies.append("set SMALLCAT_DTYPE=fp16, which takes half of it")
    if settings.attention_backend == "naive":
        remedies.append("set another SMALLCAT_ATTENTION than naive")
    if error.loras:
        remedies.append("lower SMALLCAT_LORA_MEMORY")
    remedies.append("serve a smaller model or use a GPU with more memory")
    first = "".join(f"{each}, " for each in remedies[:-1])
    return (
        f"The model {source} needs {gib(error.needed)} GiB of the GPU's memory at least, "
        f"{gib(error.weights)} of them for weights, and {there}: {first}{'or ' if first else ''}"
        f"{remedies[-1]}."
    )
