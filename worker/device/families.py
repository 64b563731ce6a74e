"""Which family a loaded pipeline belongs to: a new family has its line here."""

from __future__ import annotations

import diffusers

from worker.contract.errors import SettingsError
from worker.device.family import ModelFamily
from worker.device.fp8 import unet as fp8
from worker.device.unet_family import UNetFamily
from worker.model.loader import Loaded


def family_of(loaded: Loaded, *, compiled: bool) -> ModelFamily:
    """The family that the loaded pipeline belongs to. `compiled`: its steps will be.

    Raises `SettingsError` for a pipeline of no known family.
    """
    model = getattr(loaded.pipeline, "unet", None)
    if isinstance(model, diffusers.UNet2DConditionModel):
        if loaded.is_fp8:
            fp8.install(model, loaded.device)
        return UNetFamily(
            loaded.pipeline, loaded.device, loaded.dtype, patched=compiled, own_vae=loaded.own_vae
        )
    raise SettingsError(
        f"The model {loaded.served.name} is a {type(loaded.pipeline).__name__}, which is not served: use a "
        "Stable Diffusion model (1.x, 2.x or XL)."
    )
