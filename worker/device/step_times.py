"""What compiled steps of jobs take on a GPU, for whoever searches the best batch size."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from worker.device.costs import Costs
from worker.device.job_state import JobState
from worker.device.step import Step

Groups = Sequence[Sequence[JobState]]


class StepTimes:
    """Times steps by events of the GPU, while `costs` asks for it. For one thread."""

    def __init__(
        self,
        costs: Costs,
        is_compiled: Callable[[], bool],
        event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True),
    ) -> None:
        """`is_compiled`: whether the last step was. `event`: makes an event that can be timed."""
        self._costs, self._is_compiled, self._event = costs, is_compiled, event
        self._running: deque[tuple[int, Any, Any]] = deque()

    def run(self, run: Callable[[Groups], list[Step]], groups: Groups) -> list[Step]:
        """`run(groups)`."""
        if not self._costs.is_searching:
            return run(groups)
        begun, ended = self._event(), self._event()
        begun.record()
        steps = run(groups)
        ended.record()
        [states, *others] = groups
        is_plain = all(not state.lora_rows and state.text_tokens <= self._costs.window for state in states)
        # Steps of another kind say nothing of the measured ones.
        if not others and states[0].lane == self._costs.lane and is_plain and self._is_compiled():
            self._running.append((sum(state.rows for state in states), begun, ended))
        while self._running and self._running[0][2].query():
            rows, begun, ended = self._running.popleft()
            self._costs.stepped(rows, begun.elapsed_time(ended) / 1e3)
        return steps
