"""Makes jobs ready for the first step of a pass: their text is encoded, and the picture that they begin with.

    submit ─► prepare, on the caller's thread ─────────────┐
                                                           ├─► ready: the job waits for its first step
    first pass done ─► begin_second, on the stage's own ───┘

A second pass begins as a job does, and with what the first one gave. It is prepared beside the steps, as the
first one was, so that no step waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic

from worker.contract.errors import OutOfMemoryError, SmallcatError
from worker.engine.runner import FirstPass, Runner, StateT
from worker.engine.ticket import Ticket, as_job_error, is_machine_fault

#: Second passes that are prepared at a time: resizing, and the noise of some schedulers, take a core each.
THREADS = 4


class PrepareStage(Generic[StateT]):
    """Prepares jobs on any thread, and calls back from there.

    `ready` is called with a job that may take its first step; `too_large` with one that did not fit in memory
    beside the steps; `resolve` with a job and its own error; `fail` with a machine fault.
    """

    def __init__(
        self,
        runner: Runner[StateT],
        *,
        ready: Callable[[Ticket[StateT]], None],
        too_large: Callable[[Ticket[StateT]], None],
        resolve: Callable[[Ticket[StateT], SmallcatError], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._runner = runner
        self._ready, self._too_large, self._resolve, self._fail = ready, too_large, resolve, fail
        self._threads = ThreadPoolExecutor(THREADS, "second-pass")
        self._stopped = False

    def prepare(self, ticket: Ticket[StateT], *, is_alone: bool = False) -> None:
        """Make a job ready, on this thread. `is_alone`: nothing runs beside it: it fits now or never."""
        try:
            ticket.state = self._runner.prepare(ticket.job, ticket.inputs)
        except BaseException as error:  # noqa: BLE001 - a job fails alone
            if is_machine_fault(error):
                self._fail(error)
            elif isinstance(error, OutOfMemoryError) and not is_alone:
                self._too_large(ticket)
            else:
                self._resolve(ticket, as_job_error(ticket.job, error))
        else:
            ticket.is_prepared = True
            self._ready(ticket)

    def begin_second(self, ticket: Ticket[StateT], first: FirstPass) -> None:
        """Make a job ready for its second pass, which begins with `first`. After `stop` it is ignored."""
        ticket.is_prepared = False
        ticket.inputs = first
        try:
            self._threads.submit(self.prepare, ticket)
        except RuntimeError:
            if not self._stopped:
                raise

    def stop(self) -> None:
        """Drop the second passes that wait for a thread."""
        self._stopped = True
        self._threads.shutdown(wait=False, cancel_futures=True)
