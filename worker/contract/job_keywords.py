"""The fields of `Job` beside its prompt, as keyword parameters."""

from __future__ import annotations

from typing import Any

from worker.contract.choices import Upscaler
from worker.contract.job_parameters import ParameterFields


class JobFields(ParameterFields, total=False):
    """All of them: `**fields: Unpack[JobFields]`. None means the model's own default.

    tests/worker/contract/test_job.py compares names and types with `Job`.
    """

    # `worker.contract.input_parameters`; `submit_job` makes a reference of what is given as a picture.
    image: Any
    mask: Any
    strength: float | None
    mask_blur: int
    padding: int | None
    preserve_unmasked: bool
    # `worker.contract.second_pass`.
    upscale: float
    upscale_steps: int | None
    upscale_strength: float
    upscaler: Upscaler | str
