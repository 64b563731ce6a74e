"""The loop that owns the device: one denoising step a turn.

    submit ─► prepare ─► inbox ─► batcher ─► step ─► finished? ─► decode ─► the job's future
    (its own thread)     (the engine's thread) │                  (worker.engine.decode_stage)
                                               └─ cancelled, late, failed: leaves now, alone

Jobs join at the next step and leave at their last. The loop does nothing but steps: a job's text is encoded
on the thread that submits it, and its picture is decoded beside the next step where the device has room for
that. Whatever happens to one job happens to it alone: a forward that fails is run again in halves from the
same latents until the one that cannot run is found; one that does not fit in memory lowers the lane's cap;
and a job is too large only when it does not fit with the device to itself.
Every future is resolved, whatever happens. Only a `MachineError` of the runner ends the loop: then all jobs
go back to the queue, and the process ends.

The engine is given its runner (`worker.engine.runner`) and imports no torch.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Generic

from worker.contract.errors import (
    EngineStoppedError,
    JobCancelledError,
    JobTimeoutError,
    JobTooLargeError,
    OutOfMemoryError,
    SmallcatError,
)
from worker.contract.job import Job
from worker.engine.batcher import Batcher
from worker.engine.decode_stage import Decoding
from worker.engine.runner import Outcome, Picture, R, Runner
from worker.engine.ticket import Rendered, Ticket, as_job_error, ends_the_engine

logger = logging.getLogger("smallcat.engine")


class Engine(Generic[R]):
    """Renders jobs together, a step at a time, on a thread of its own.

    `job_timeout_s` (> 0) bounds each job's stay. `on_death` is called once, from the engine's thread, if
    the loop itself fails: all jobs have been given back by then, and the process should exit.
    `on_step` is told the rows of each step and the seconds it took. `clock` returns monotonic seconds.
    All public methods may be called from any thread.
    """

    def __init__(
        self,
        runner: Runner[R],
        *,
        job_timeout_s: float,
        on_death: Callable[[BaseException], None],
        on_step: Callable[[int, float], None] = lambda rows, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._job_timeout_s = job_timeout_s
        self._on_death = on_death
        self._on_step = on_step
        self._clock = clock
        self._batcher: Batcher[Ticket[R]] = Batcher(runner)
        #: On board: from `submit` until resolved.
        self._tickets: dict[str, Ticket[R]] = {}
        #: Prepared, for the batcher.
        self._inbox: list[Ticket[R]] = []
        #: Whose text or picture did not fit in memory beside a step, for the engine's thread.
        self._crowded: list[Ticket[R]] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._died = False
        #: What ends the loop, found on another thread.
        self._failure: BaseException | None = None
        #: When the present turn began; None between two.
        self._turn_since_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        #: Of those past their last step.
        self._decoding: Decoding[Ticket[R]] = Decoding(
            self._decode, self._deliver, self._fail, self._wake, beside=runner.decodes_beside, clock=clock
        )

    @property
    def max_rows(self) -> int:
        """Rows in one step, at most."""
        return self._runner.max_rows

    @property
    def job_s(self) -> float:
        """Seconds of the device's time that a job takes which leaves all to the model's defaults, > 0."""
        return self._runner.job_s

    def start(self) -> None:
        """Begin to render."""
        self._thread.start()

    def submit(self, job_id: str, job: Job) -> Future[Rendered]:
        """Take a job on board: encode its text now, on the caller's thread, and let it wait for a seat.

        The future resolves to a `Rendered`, or to the job's own `SmallcatError`. A job of an id that is on
        board already joins it. A stopped engine answers `EngineStoppedError`.
        """
        with self._changed:
            if (known := self._tickets.get(job_id)) is not None:
                # Whoever submits a job again after its cancellation wants it.
                known.cancelled = False
                return known.future
            ticket: Ticket[R] = Ticket(job_id, job, self._clock() + self._job_timeout_s)
            if self._stopped:
                ticket.resolve(EngineStoppedError("The engine has stopped: the job goes back to the queue."))
                return ticket.future
            self._tickets[job_id] = ticket
        try:
            self._prepare(ticket)
        except OutOfMemoryError:
            self._wait_in(self._crowded, ticket)
        return ticket.future

    def cancel(self, job_id: str) -> None:
        """Let a job leave at the next step with `JobCancelledError`. One that is not on board: nothing."""
        with self._changed:
            if ticket := self._tickets.get(job_id):
                ticket.cancelled = True
                self._changed.notify()

    def progress(self) -> dict[str, tuple[int, int]]:
        """(steps done, steps in all) of each job on board, by id; in all is 0 until its text is encoded."""
        with self._changed:
            tickets = list(self._tickets.values())
        return {
            ticket.job_id: (ticket.render.step, ticket.render.steps) if ticket.render else (0, 0)
            for ticket in tickets
        }

    def is_lost(self) -> bool:
        """Whether the loop will not go on: it has failed, or it hangs."""
        return self._died or self.is_hung()

    def is_hung(self) -> bool:
        """Whether the device has been at one step or one decoding for longer than any job may take."""
        begun = (self._turn_since_s, *self._decoding.since_s)
        return any(since is not None and self._clock() - since > self._job_timeout_s for since in begun)

    def drain(self, timeout_s: float) -> None:
        """Wait until all jobs on board are done, at most `timeout_s` seconds; then `stop`."""
        deadline = self._clock() + timeout_s
        with self._changed:
            self._changed.wait_for(lambda: not self._tickets, timeout=max(0.0, deadline - self._clock()))
        self.stop()

    def stop(self) -> None:
        """Give back all jobs on board, with `EngineStoppedError`, and end the loop after its current step."""
        self._give_all_back(EngineStoppedError("The worker is stopping: the job goes back to the queue."))
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=60)

    # What follows runs on the engine's thread.

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn_since_s = self._clock()
                self._admit()
                self._evict()
                self._relieve()
                if not self._is_early() and (batch := self._batcher.next_batch(self._clock())):
                    self._step(batch)
                    self._retire(batch)
                self._turn_since_s = None
        except BaseException as error:
            self._died = True
            logger.critical("The engine is lost: %r", error, exc_info=True)
            self._give_all_back(EngineStoppedError(f"The engine is lost ({error!r}): the job goes back."))
            self._on_death(error)

    def _wait_for_work(self) -> bool:
        """Sleep while there is none. False: stop. Raises what was found on another thread."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stopped
                    or self._failure
                    or self._inbox
                    or self._crowded
                    or (len(self._batcher) and not self._is_early())
                )
            )
            if self._failure is not None:
                raise self._failure
            return not self._stopped

    def _is_early(self) -> bool:
        """Whether a step would only finish jobs for which the decoder has no room yet.

        More may come meanwhile to share it: where jobs have few steps, small batches are what costs most.
        """
        if not self._decoding.is_full:
            return False
        renders = [ticket.render for ticket in self._batcher if ticket.render is not None]
        rows = sum(render.rows for render in renders)
        return rows < self._runner.max_rows and all(render.step == render.steps - 1 for render in renders)

    def _admit(self) -> None:
        """Let those who came in since the last step wait for a seat."""
        with self._changed:
            arrived = list(self._inbox)
            self._inbox.clear()
        for ticket in arrived:
            if ticket.render is not None:
                self._batcher.add(
                    ticket,
                    lane=ticket.render.lane,
                    rows=ticket.render.rows,
                    priority=ticket.job.priority,
                    now_s=self._clock(),
                )

    def _evict(self) -> None:
        """Let go of those who were cancelled or are past their time."""
        now_s = self._clock()
        for ticket in list(self._batcher):
            if ticket.cancelled:
                self._drop(ticket, JobCancelledError("The job was cancelled."))
            elif now_s > ticket.deadline_s and ticket.render is not None:
                limit = f"{self._job_timeout_s:g} s (SMALLCAT_JOB_TIMEOUT_S)"
                done = f"step {ticket.render.step} of {ticket.render.steps}"
                self._drop(ticket, JobTimeoutError(f"The job was at {done} after its limit of {limit}."))

    def _step(self, batch: Sequence[Ticket[R]], *, settled: bool = False) -> None:
        """One step of `batch`. On failure: again in halves, from the same latents, until it works.

        One job for which there is no memory has it to itself before it is called too large: `settled`.
        """
        renders = [ticket.render for ticket in batch if ticket.render is not None]
        rows = sum(render.rows for render in renders)
        started_s = self._clock()
        try:
            outcomes = self._runner.step(renders)
        except BaseException as error:
            if ends_the_engine(error):
                raise
            is_full = isinstance(error, OutOfMemoryError)
            if len(batch) == 1 and is_full and not settled:
                logger.warning("A job alone does not fit in memory: once more, with nothing beside it.")
                self._decoding.settle()
                self._step(batch, settled=True)
                return
            if len(batch) == 1:
                self._drop(batch[0], as_job_error(batch[0].job, error))
                return
            if is_full:
                self._batcher.lower_cap(renders[0].lane, rows)
                cap = self._batcher.cap(renders[0].lane)
                logger.warning("%d rows do not fit: the cap is %d now.", rows, cap)
            else:
                jobs = len(batch)
                logger.warning("A step of %d jobs failed (%r): finding the job that did it.", jobs, error)
            self._step_halves(batch)
            return
        self._on_step(rows, self._clock() - started_s)
        for ticket, render, failure in zip(batch, renders, outcomes, strict=True):
            if failure is not None:
                self._drop(ticket, failure)
            else:
                self._batcher.resize(ticket, render.rows)

    def _step_halves(self, batch: Sequence[Ticket[R]]) -> None:
        middle = len(batch) // 2
        self._step(batch[:middle])
        self._step(batch[middle:])

    def _retire(self, batch: Iterable[Ticket[R]]) -> None:
        """Hand those of `batch` that are finished to the decoder."""
        finished = [
            ticket
            for ticket in batch
            if ticket in self._batcher and ticket.render and ticket.render.step >= ticket.render.steps
        ]
        if not finished:
            return
        for ticket in finished:
            self._batcher.remove(ticket)
        self._decoding.add(finished)

    def _drop(self, ticket: Ticket[R], outcome: SmallcatError) -> None:
        """Let a job go before its time: its seat is free, its future resolved."""
        self._batcher.remove(ticket)
        self._leave(ticket, outcome)

    def _relieve(self) -> None:
        """Do once more what did not fit in memory beside a step, now with the device to itself."""
        with self._changed:
            tickets = list(self._crowded)
            self._crowded.clear()
        if not tickets:
            return
        logger.warning("%d jobs did not fit in memory beside a step: once more, by themselves.", len(tickets))
        # Only this thread sets a decoding off.
        self._decoding.settle()
        for ticket in tickets:
            if ticket.render is not None:
                for outcome in self._decode([ticket]):
                    self._finish(ticket, outcome)
                continue
            try:
                self._prepare(ticket)
            except OutOfMemoryError as error:
                self._leave(ticket, as_job_error(ticket.job, error))

    # What follows runs on `worker.engine.decode_stage`'s threads, where it has some.

    def _decode(self, tickets: Sequence[Ticket[R]]) -> Iterator[Outcome]:
        """Decode together; on failure in halves, until the one that cannot be decoded is found."""
        if not tickets:
            return iter(())
        try:
            return self._runner.decode([ticket.render for ticket in tickets if ticket.render is not None])
        except BaseException as error:
            if ends_the_engine(error):
                raise
            if len(tickets) == 1:
                return iter((as_job_error(tickets[0].job, error),))
            logger.warning("Decoding %d pictures together failed (%r): trying halves.", len(tickets), error)
            middle = len(tickets) // 2
            return itertools.chain(self._decode(tickets[:middle]), self._decode(tickets[middle:]))

    def _deliver(self, ticket: Ticket[R], outcome: Outcome) -> None:
        """Let a job go with its picture, or without; but what did not fit beside a step is done once more."""
        if isinstance(outcome, JobTooLargeError) and self._runner.decodes_beside:
            self._wait_in(self._crowded, ticket)
        else:
            self._finish(ticket, outcome)

    # What follows runs on any thread.

    def _prepare(self, ticket: Ticket[R]) -> None:
        """Make a job ready for its first step. Raises `OutOfMemoryError`: it may fit at another time."""
        try:
            ticket.render = self._runner.prepare(ticket.job)
        except OutOfMemoryError:
            raise
        except BaseException as error:  # noqa: BLE001 - a job fails alone
            if ends_the_engine(error):
                self._fail(error)
            else:
                self._leave(ticket, as_job_error(ticket.job, error))
        else:
            self._wait_in(self._inbox, ticket)

    def _wait_in(self, tickets: list[Ticket[R]], ticket: Ticket[R]) -> None:
        """Let a job wait for the engine's thread."""
        with self._changed:
            tickets.append(ticket)
            self._changed.notify_all()

    def _finish(self, ticket: Ticket[R], outcome: Outcome) -> None:
        """Let a job go with its picture, or without."""
        if isinstance(outcome, Picture):
            assert ticket.render is not None  # noqa: S101 - it had its last step
            self._leave(ticket, Rendered(outcome, ticket.render.warnings))
        else:
            self._leave(ticket, outcome)

    def _leave(self, ticket: Ticket[R], outcome: Rendered | SmallcatError) -> None:
        """The only way out: off the books, its future resolved."""
        with self._changed:
            if self._tickets.get(ticket.job_id) is ticket:
                del self._tickets[ticket.job_id]
            self._changed.notify_all()
        ticket.resolve(outcome)

    def _wake(self) -> None:
        """Let the engine's thread look again."""
        with self._changed:
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        """Let the loop end with `error`."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _give_all_back(self, error: EngineStoppedError) -> None:
        with self._changed:
            self._stopped = True
            tickets = list(self._tickets.values())
            self._tickets.clear()
            self._inbox.clear()
            self._crowded.clear()
            self._changed.notify_all()
        self._decoding.stop()
        for ticket in tickets:
            ticket.resolve(error)
