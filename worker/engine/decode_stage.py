"""Decodes finished jobs to pictures, in parallel with the steps where the device gains by it.

    add ─► the runner's decode, which starts it ─► wait for each outcome ─► deliver
           (thread "decode")                       (thread "deliver")

There are two threads, because each delivered picture wakes a thread that encodes and uploads it. While those
compete for Python's lock, the device must have its next pictures already.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic

from worker.engine.runner import Outcome, Runner, StateT
from worker.engine.ticket import Ticket, as_job_error, is_machine_fault

logger = logging.getLogger("smallcat.engine")

#: Decode calls in flight, at most: one that is waited for, and the next. Jobs that finish meanwhile are
#: decoded together, which takes less time for each.
MAX_IN_FLIGHT = 2


class DecodeStage(Generic[StateT]):
    """Decodes jobs in the order in which they are added, all that wait in one call.

    `deliver` is called with each job and its outcome, in order; `fail` with what `deliver` raises or with a
    machine fault; `on_free_slot` when another decode call may start. If the runner does not decode beside
    steps, all of this happens inside `add`. Public methods may be called from any thread.
    """

    def __init__(
        self,
        runner: Runner[StateT],
        deliver: Callable[[Ticket[StateT], Outcome], None],
        fail: Callable[[BaseException], None],
        on_free_slot: Callable[[], None],
        *,
        clock: Callable[[], float],
    ) -> None:
        self._runner = runner
        self._deliver = deliver
        self._fail = fail
        self._on_free_slot = on_free_slot
        self._clock = clock
        self._waiting: list[Ticket[StateT]] = []
        self._started_s: list[float] = []
        self._stopped = False
        self._changed = threading.Condition()
        has_threads = runner.decodes_beside
        self._decode_thread = ThreadPoolExecutor(1, "decode") if has_threads else None
        self._deliver_thread = ThreadPoolExecutor(1, "deliver") if has_threads else None

    @property
    def started_s(self) -> Sequence[float]:
        """When each decode call in flight started, by `clock`."""
        return tuple(self._started_s)

    @property
    def is_full(self) -> bool:
        """Whether a job that is added now has to wait for a decode call to end."""
        return len(self._started_s) >= MAX_IN_FLIGHT

    def add(self, tickets: Iterable[Ticket[StateT]]) -> None:
        """Decode finished jobs. After `stop` they are ignored."""
        with self._changed:
            if self._stopped:
                return
            for ticket in tickets:
                ticket.stepped_s = self._clock()
                self._waiting.append(ticket)
        self._run_on(self._decode_thread, self._start_next)

    def wait_until_idle(self) -> None:
        """Wait until no job is being decoded or waits for it, or until `stop`."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not (self._waiting or self._started_s))

    def stop(self) -> None:
        """Drop the jobs that wait. Those being decoded are still delivered, or dropped."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify_all()
        for thread in (self._decode_thread, self._deliver_thread):
            if thread is not None:
                thread.shutdown(wait=False, cancel_futures=True)

    def decode(self, tickets: Sequence[Ticket[StateT]], *, is_alone: bool = False) -> Iterator[Outcome]:
        """The outcomes of `tickets`, in order, decoded together.

        If that fails, each half is decoded by itself, down to the job that fails alone. Raises only what is
        the machine's fault. `is_alone`: as `Runner.decode` has it.
        """
        if not tickets:
            return iter(())
        try:
            states = [ticket.state for ticket in tickets if ticket.state is not None]
            return self._runner.decode(states, is_alone=is_alone)
        except BaseException as error:
            if is_machine_fault(error):
                raise
            if len(tickets) == 1:
                return iter((as_job_error(tickets[0].job, error),))
            logger.warning(
                "Decoding %d pictures failed (%r): trying each half, to find the job.", len(tickets), error
            )
            middle = len(tickets) // 2
            halves = (self.decode(half, is_alone=is_alone) for half in (tickets[:middle], tickets[middle:]))
            return itertools.chain(*halves)

    def _start_next(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self.is_full)
            tickets, self._waiting = self._waiting, []
            if not tickets:
                return  # An earlier call took them.
            started_s = self._clock()
            self._started_s.append(started_s)
        try:
            outcomes = self.decode(tickets)
            self._run_on(self._deliver_thread, lambda: self._deliver_all(tickets, outcomes, started_s))
        except BaseException as error:  # noqa: BLE001 - `fail` reports it
            self._end(started_s)
            self._fail(error)

    def _deliver_all(
        self, tickets: Sequence[Ticket[StateT]], outcomes: Iterator[Outcome], started_s: float
    ) -> None:
        try:
            for ticket, outcome in zip(tickets, outcomes, strict=True):
                self._deliver(ticket, outcome)
        except BaseException as error:  # noqa: BLE001 - `fail` reports it
            self._fail(error)
        finally:
            self._end(started_s)

    def _end(self, started_s: float) -> None:
        with self._changed:
            self._started_s.remove(started_s)
            self._changed.notify_all()
        self._on_free_slot()

    def _run_on(self, thread: ThreadPoolExecutor | None, work: Callable[[], None]) -> None:
        """Do `work` on `thread`, or here if there is none."""
        if thread is None:
            work()
            return
        try:
            thread.submit(work)
        except RuntimeError:
            if not self._stopped:
                raise
