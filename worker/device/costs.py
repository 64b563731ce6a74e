"""What steps of a model cost on its device, and how many rows one may have.

Measured at the start, and again by steps of jobs where these are compiled only later.
"""

from __future__ import annotations

import dataclasses
import logging

from worker.contract.served_model import Defaults
from worker.device.cuda_graphs import captured_below
from worker.device.family import Lane, ModelFamily
from worker.engine import step_cost
from worker.engine.cap_search import CapSearch
from worker.engine.step_cost import Curve, StepCost

logger = logging.getLogger("smallcat.engine")


class Costs:
    """A `worker.engine.batcher.Costs` of a model. Any thread may read it."""

    def __init__(
        self,
        family: ModelFamily,
        defaults: Defaults,
        asked_rows: int | None,
        planned_rows: int | None = None,
    ) -> None:
        """`defaults`: those of the model's jobs. `asked_rows`: what the settings ask for; None: nothing.

        `planned_rows`: rows of the default size that fit in memory, by its plan; None: as many as gain.
        """
        self._family, self._defaults = family, defaults
        self._asked_rows, self._planned_rows = asked_rows, planned_rows
        #: The lane of the default size.
        self.lane: Lane = family.lane(defaults.width, defaults.height)
        #: Tokens of the text encoder's window; 0: not yet known.
        self.window = 0
        self._search: CapSearch | None = None
        self._cost = StepCost((), family.area(self.lane), asked_rows or step_cost.MIN_CAP)

    def measured(self, curve: Curve, max_rows: int) -> None:
        """`curve` was measured at the default size, of which a step should have so many rows at most."""
        most = max_rows if self._asked_rows else step_cost.choose_most(curve, max_rows)
        self._cost = dataclasses.replace(self._cost, curve=curve, max_rows=max_rows, most_rows=most)
        if most > max_rows:
            logger.info("max rows while many jobs wait: %d (least time a row)", most)

    def measured_loras(self, share: float) -> None:
        """A row with LoRAs costs more, by this share of itself."""
        self._cost = dataclasses.replace(self._cost, lora_share=share)

    def search(self) -> None:
        """Find out by compiled steps of jobs how many rows one should have: `stepped` is told of them."""
        if self._asked_rows is None:
            self._search = CapSearch(self._planned_rows)

    @property
    def is_searching(self) -> bool:
        """Whether `stepped` is to be called."""
        return self._search is not None

    def stepped(self, rows: int, seconds: float) -> None:
        """A compiled step of the default size and so many rows took so long."""
        if self._search is None:
            return
        curve = self._search.note(rows, seconds, is_full=rows >= self.max_rows)
        if curve is None:
            return
        gave_up, self._search = self._search.gave_up, None
        if not curve:
            return
        cap, reason = step_cost.choose_cap(curve)
        if gave_up:
            # There were too few jobs to try larger ones.
            cap = max(cap, self.max_rows)
        self.measured(curve, cap)
        logger.info("max rows: %d (of compiled steps: %s)", cap, reason)

    @property
    def max_rows(self) -> int:
        """The cap in rows of a step of the default size."""
        return self._cost.max_rows

    @property
    def most_rows(self) -> int:
        """The same while many jobs wait."""
        return self._planned(self.lane, self._cost.most(self._cost.area))

    @property
    def job_s(self) -> float:
        """Seconds of the device's time for the steps of a job of the model's defaults, in full batches."""
        step_s = self._cost.seconds(self.max_rows, self._cost.area)
        rows = self._family.rows(self._defaults.guidance_scale)
        return self._defaults.steps * rows * step_s / self.max_rows

    def cap(self, lane: Lane) -> int:
        """The cap in rows of a step of `lane`, >= 1: as many latent pixels as in the measured one."""
        return self._tried(lane) or self._planned(lane, self._cost.cap(self._family.area(lane)))

    def most(self, lane: Lane) -> int:
        """The same while many jobs wait, >= `cap`."""
        return self._tried(lane) or self._planned(lane, self._cost.most(self._family.area(lane)))

    def _tried(self, lane: Lane) -> int | None:
        """The size that is being tried in `lane`."""
        return self._search.cap if self._search is not None and lane == self.lane else None

    def _planned(self, lane: Lane, gaining: int) -> int:
        """What the settings ask for, or `gaining` rows, as far as they fit in memory by its plan."""
        area, rows = self._family.area(lane), self._asked_rows or gaining
        if self._planned_rows is None or rows * area <= self._planned_rows * self._cost.area:
            return rows
        return max(1, captured_below(self._planned_rows * self._cost.area // area))

    def step_s(self, lane: Lane, rows: int, text_tokens: int = 0, lora_rows: int = 0) -> float:
        """What a step of `rows` rows of `lane` costs, whose longest text has so many tokens."""
        more = max(0.0, text_tokens / self.window - 1) if self.window else 0.0
        return self._cost.seconds(rows, self._family.area(lane), more, lora_rows)
