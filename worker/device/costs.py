"""What steps of a model cost on its device, and how many rows one may have: measured at the start."""

from __future__ import annotations

import dataclasses

from worker.contract.served_model import Defaults
from worker.device.family import Lane, ModelFamily
from worker.engine import step_cost
from worker.engine.step_cost import Curve, StepCost


class Costs:
    """A `worker.engine.batcher.Costs` of a model. Any thread may read it."""

    def __init__(self, family: ModelFamily, defaults: Defaults, asked_rows: int | None) -> None:
        """`defaults`: those of the model's jobs. `asked_rows`: what the settings ask for; None: nothing."""
        self._family, self._defaults, self._asked_rows = family, defaults, asked_rows
        #: The lane of the default size.
        self.lane: Lane = family.lane(defaults.width, defaults.height)
        #: Tokens of the text encoder's window; 0: not yet known.
        self.window = 0
        self._cost = StepCost((), family.area(self.lane), asked_rows or step_cost.MIN_CAP)

    def measured(self, curve: Curve, max_rows: int) -> None:
        """`curve` was measured at the default size, of which a step should have so many rows at most."""
        self._cost = dataclasses.replace(self._cost, curve=curve, max_rows=max_rows)

    def measured_loras(self, share: float) -> None:
        """A row with LoRAs costs more, by this share of itself."""
        self._cost = dataclasses.replace(self._cost, lora_share=share)

    @property
    def max_rows(self) -> int:
        """The cap in rows of a step of the default size."""
        return self._cost.max_rows

    @property
    def job_s(self) -> float:
        """Seconds of the device's time for the steps of a job of the model's defaults, in full batches."""
        step_s = self._cost.seconds(self.max_rows, self._cost.area)
        rows = self._family.rows(self._defaults.guidance_scale)
        return self._defaults.steps * rows * step_s / self.max_rows

    def cap(self, lane: Lane) -> int:
        """The cap in rows of a step of `lane`, >= 1: as many latent pixels as in the measured one."""
        return self._asked_rows or self._cost.cap(self._family.area(lane))

    def step_s(self, lane: Lane, rows: int, text_tokens: int = 0, lora_rows: int = 0) -> float:
        """What a step of `rows` rows of `lane` costs, whose longest text has so many tokens."""
        more = max(0.0, text_tokens / self.window - 1) if self.window else 0.0
        return self._cost.seconds(rows, self._family.area(lane), more, lora_rows)
