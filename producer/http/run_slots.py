"""How many runs a server feeds at once: in all, and of one tenant.

A run that waits for its tenant's limit gives its slot back, and is tried again once a slot is free.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from producer.ingest.types import Gate

if TYPE_CHECKING:
    from producer.ingest.message_templates import TemplatedJob
    from worker.contract.job import Job

#: Runs that are fed at once, and runs that are fed or wait: at one server, and of one tenant.
AT_ONCE, MAX_RUNS = 16, 500
AT_ONCE_OF_ONE, MAX_RUNS_OF_ONE = 4, 100
#: Seconds that a run without a slot sleeps between two tries, at most: it sleeps longer each time.
_LONGEST_S: Final = 5.0


def tenant_of(run: str) -> str:
    """The digits of the tenant's mark that a run's name begins with; empty: the run is of no tenant."""
    return run[:12] if len(run) == 40 else ""


class RunSlots:
    """The slots of one server. Thread-safe."""

    def __init__(self, ending: threading.Event) -> None:
        """`ending` is set when the server ends: nobody sleeps any longer."""
        self.ending = ending
        self._taken: Counter[str] = Counter()
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, run: str) -> Iterator[Slot]:
        """A slot for a run, when there is one."""
        slot = Slot(self, tenant_of(run))
        with self._changed:
            self._changed.wait_for(lambda: self._take(slot))
        try:
            yield slot
        finally:
            self.give_back(slot)

    def try_take(self, slot: Slot) -> bool:
        """Whether the slot is held now."""
        with self._changed:
            return self._take(slot)

    def give_back(self, slot: Slot) -> None:
        """Let another run have it."""
        with self._changed:
            if slot.is_held:
                slot.is_held = False
                self._taken[slot.tenant] -= 1
                self._changed.notify_all()

    def _take(self, slot: Slot) -> bool:
        of_one = self._taken[slot.tenant] if slot.tenant else 0
        if not slot.is_held and self._taken.total() < AT_ONCE and of_one < AT_ONCE_OF_ONE:
            slot.is_held = True
            self._taken[slot.tenant] += 1
        return slot.is_held


class Slot:
    """The slot of one run, while it holds it."""

    def __init__(self, slots: RunSlots, tenant: str) -> None:
        self.slots, self.tenant, self.is_held = slots, tenant, False

    def gate(self, gate: Gate) -> Gate:
        """The run's gate, which gives the slot back while it is shut."""
        return _SlotGate(gate, self)


class _SlotGate(Gate):
    def __init__(self, gate: Gate, slot: Slot) -> None:
        self._gate, self._slot = gate, slot
        self._tries = 0

    def check(self, job: Job) -> None:
        self._gate.check(job)

    def check_unserved(self, job: Job) -> None:
        self._gate.check_unserved(job)

    def admit(self, first: int, jobs: Sequence[TemplatedJob]) -> tuple[int, str]:
        admitted, why = 0, "the server feeds as many prompt files as it may at once."
        if self._slot.slots.try_take(self._slot):
            admitted, why = self._gate.admit(first, jobs)
        if admitted == len(jobs):
            self._tries = 0
            return admitted, why
        self._slot.slots.give_back(self._slot)
        self._tries = 0 if admitted else self._tries + 1
        if self._tries > 1:
            self._slot.slots.ending.wait(min(self._tries - 1, _LONGEST_S))
        return admitted, why
